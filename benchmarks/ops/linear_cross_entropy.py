"""linear_cross_entropy: the lm_head over a packed vocabulary, labels of the full one."""

import torch
import torch.nn.functional as F
from _contenders import why_missing
from _suite import Case, Contender, Work, bf16

VOCABULARY = {  # tokens of each model of MODEL_SHAPES
    "minilm-l6": 30522,
    "smollm2-135m": 49152,
    "roberta-base": 50265,
    "llama-2-7b": 32000,
    "llama-3-8b": 128256,
}


def _call(vocabulary, *, train_x=True, train_w=True, bias=False):
    """The matmuls really run: few tokens and features, which no kernel here is compiled for."""
    from gatepack.kernels import linear_cross_entropy_fn

    inputs = {"x": bf16(64, 16), "w": bf16(vocabulary, 16, grad=train_w)}
    if bias:
        inputs["bias"] = bf16(vocabulary)
    remap = torch.zeros(2 * vocabulary, dtype=torch.int32)
    labels = torch.zeros(64, dtype=torch.int64)
    with torch.set_grad_enabled(train_x):
        loss = linear_cross_entropy_fn(**inputs, labels=labels, remap=remap, chunk=32).loss
    if train_x:
        torch.autograd.grad(loss, [i for i in inputs.values() if i.requires_grad])


AOT = {
    "train": lambda: _call(76928),
    "frozen head": lambda: _call(76928, train_w=False),
    "bias": lambda: _call(30522, bias=True),
    "evaluate": lambda: _call(76928, train_x=False),
}


def work(case: Case) -> Work:
    """Loss, dx and dw with `kept` of the vocabulary packed, to a multiple of 128 rows."""
    from gatepack.kernels import linear_cross_entropy_fn, linear_cross_entropy_ref

    old, d, t = VOCABULARY[case.model], case.shape.hidden, case.tokens
    rows = min(old, 128 * max(1, round(case.kept * old / 128)))
    kept = torch.randperm(old, device=case.device)[:rows].sort().values
    remap = torch.full((old,), -1, dtype=torch.int32, device=case.device)
    remap[kept] = torch.arange(rows, dtype=torch.int32, device=case.device)
    packed = torch.randint(rows, (t,), device=case.device)
    labels = kept[packed]
    x, w = case.normal(t, d, grad=True), case.normal(rows, d, scale=d**-0.5, grad=True)
    dense = case.normal(old, d, scale=d**-0.5, grad=True)

    def masked(x, w):
        return linear_cross_entropy_ref(x, w, labels, remap=remap).loss

    contenders = {
        "ours": Contender(
            lambda x, w: linear_cross_entropy_fn(x, w, labels, remap=remap).loss, (x, w)
        ),
        "masked": Contender(masked, (x, w)),
        "oracle": Contender(lambda x, w: F.cross_entropy(F.linear(x, w), packed), (x, w)),
        "dense": Contender(lambda x, w: F.cross_entropy(F.linear(x, w), labels), (x, dense)),
    }
    liger = _liger()
    if liger:
        contenders["liger"] = Contender(lambda x, w: liger(x, w, packed), (x, w))
    reason = why_missing("liger_kernel", "liger-kernel")
    return Work(
        contenders=contenders,
        truth=Contender(masked, tuple(i.detach().double().requires_grad_() for i in (x, w))),
        flops=6 * t * rows * d,
        bytes=x.element_size() * 3 * d * (t + rows),
        skipped={"liger": reason} if reason else {},
    )


def _liger():
    """Liger's fused op as loss(x, w, labels), or None where liger_kernel is not installed."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def loss(x, w, labels):
        result = LigerFusedLinearCrossEntropyFunction.apply(x, w, labels)
        return result[0] if isinstance(result, tuple) else result

    return loss
