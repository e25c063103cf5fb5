"""prefill: a prompt through a packed model, only the last logits computed."""

from _inference import check_case, inference_work, prefill_of
from _suite import Case

__all__ = ["check_case", "work"]


def work(case: Case):
    rows = case.batch * case.tokens

    def least(n):
        flops = 2 * rows * n["blocks"] + 2 * case.batch * n["head"]
        return {"flops": flops, "bytes": n["element"] * (n["blocks"] + n["head"]) + n["cache"]}

    return inference_work(case, prefill_of, least)
