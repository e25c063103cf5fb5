"""decode: one token of each sequence behind a prompt; on a GPU as a CUDA graph."""

from _inference import check_case, decode_of, inference_work
from _suite import Case

__all__ = ["check_case", "work"]


def work(case: Case):
    def least(n):
        flops = 2 * case.batch * (n["blocks"] + n["head"])
        return {"flops": flops, "bytes": n["element"] * (n["blocks"] + n["head"]) + n["cache"]}

    return inference_work(case, decode_of, least)
