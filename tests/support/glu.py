"""What the tests of gated_swiglu and gated_mlp share: inputs by name, and calls that take them."""

import torch
from ops import make_gate, run, to

from gatepack.kernels import GatedMLPConfig, Tile
from gatepack.kernels._common import rows_of
from gatepack.testing import assert_close_to_fp64, poisoned_empty

T, F, K, RANK = 5, 40, 48, 3
SMALL_TILES = GatedMLPConfig(*[Tile(16, 16, 16, num_warps=1, num_stages=1, group_m=2)] * 6)
PERSISTENT_TILES = GatedMLPConfig(
    *[Tile(16, 32, 16, num_warps=1, num_stages=1, group_m=2, persistent=1)] * 6
)
SCALES = {"a": 0.7, "u": 0.7, "d": 1.5}


def normal(*shape, seed=3):
    """fp32 [shape], the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(dtype, t=T, f=F, k=K, *, rank=RANK, z="fractional", branches="aud", seed=0):
    """CPU tensors by name; z names a kind of gate, or None. branches: the linears that exist."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    inputs = {"x": normal(t, k)}
    for name in branches:
        out, size = (k, f) if name == "d" else (f, k)
        inputs[f"w_{name}"] = normal(out, size) / max(size, 1) ** 0.5
        inputs[f"bias_{name}"] = normal(out)
        if rank:
            inputs[f"a_of_{name}"] = normal(rank, size) / max(size, 1) ** 0.5
            inputs[f"b_of_{name}"] = normal(out, rank)
    if z is not None:
        inputs["z"] = make_gate(z, f, seed + 1)
    return inputs


def with_pairs(fn, scales=SCALES):
    """fn, called with the low-rank factors as separate tensors."""

    def call(**inputs):
        inputs = {"w_a": None} | inputs
        for name, scale in scales.items():
            if f"a_of_{name}" in inputs:
                factors = inputs.pop(f"a_of_{name}"), inputs.pop(f"b_of_{name}")
                inputs[f"lora_of_{name}"] = (*factors, scale)
        return fn(**inputs)

    return call


def check(fn, ref, inputs, device, config=None, dy=None, scales=SCALES, **settings):
    """Forward and every gradient, from poisoned memory, against fp64 and torch's own error."""
    fn, ref = with_pairs(fn, scales), with_pairs(ref, scales)
    inputs = to(inputs, device)
    truth_inputs = {name: t.double() for name, t in inputs.items()}
    if dy is None:
        with torch.no_grad():
            shape = ref(**inputs, **settings).shape
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    dy = dy.to(device, inputs["x"].dtype)
    truth = run(ref, truth_inputs, dy, **settings)
    theirs = run(ref, inputs, dy, **settings)
    with poisoned_empty():
        ours = run(fn, inputs, dy, config=config, **settings)
    for name, got in ours.items():
        factor, dtype = 2 if name == "y" else 3, inputs["x"].dtype
        terms = summed_terms(name, ref, truth_inputs, dy, settings)
        assert_close_to_fp64(name, got, theirs[name], truth[name], factor, dtype, terms)
    closed = inputs["z"] == 0 if "z" in inputs else torch.zeros(len(inputs["w_u"])) > 0
    closed = closed.to(device)
    for name, got in ours.items():
        if name in ("dw_a", "dw_u", "dbias_a", "dbias_u", "db_of_a", "db_of_u", "dz"):
            assert (got[closed] == 0).all(), f"{name}: closed channels are not 0"
        if name in ("dw_d", "da_of_d"):
            assert (got[:, closed] == 0).all(), f"{name}: closed channels are not 0"
    return ours


def summed_terms(name, ref, inputs, dy, settings):
    """The largest sum of |terms| behind one bias gradient: those of a bias for each token."""
    if name not in ("dbias_a", "dbias_u"):
        return 0.0
    name, x = name.removeprefix("d"), rows_of(inputs["x"])
    per_token = inputs[name].expand(len(x), -1).contiguous()
    terms = run(ref, inputs | {"x": x, name: per_token}, rows_of(dy), **settings)[f"d{name}"]
    return max(terms.abs().sum(0).tolist(), default=0.0)


def without(inputs, *names):
    """The inputs but for tensors of these names."""
    return {name: t for name, t in inputs.items() if name not in names}


def with_layout(inputs, layout):
    """The same values in memory laid out otherwise: channel_major, sliced or every_second."""
    changed = {}
    for name, t in inputs.items():
        if layout == "every_second":
            changed[name] = t.repeat_interleave(2, dim=-1)[..., ::2]
        elif t.dim() == 2 and layout == "channel_major":
            changed[name] = t.t().contiguous().t()
        elif t.dim() == 2 and layout == "sliced":
            changed[name] = torch.nn.functional.pad(t, (3, 5))[:, 3:-5]
        else:
            changed[name] = t
    return changed


def with_nan_in_closed_channels(inputs):
    """The inputs with NaN in all that belongs to a closed channel."""
    inputs = {name: t.clone() for name, t in inputs.items()}
    closed = inputs["z"] == 0
    for name in inputs:
        if name in ("w_a", "w_u", "bias_a", "bias_u", "b_of_a", "b_of_u"):
            inputs[name][closed] = float("nan")
        if name in ("w_d", "a_of_d"):
            inputs[name][:, closed] = float("nan")
    return inputs


def packed(inputs):
    """The inputs with open channels only."""
    is_open = inputs["z"] != 0
    rows = ("z", "w_a", "w_u", "bias_a", "bias_u", "b_of_a", "b_of_u")
    columns = ("w_d", "a_of_d")
    return {
        name: t[is_open] if name in rows else t[:, is_open] if name in columns else t
        for name, t in inputs.items()
    }
