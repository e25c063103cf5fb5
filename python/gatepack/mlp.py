"""Stage 3, modules: a gated MLP, as one op where its linears allow it.

On the "triton" path gated_mlp looks the open channels up in the full weights; on the "folded" path
it takes the packed ones, with SwiGLU, the gate and LoRA inside its kernels. Where a linear cannot
be taken apart, or someone listens to it, the MLP runs linear by linear; on the "dense" path with
the gate inside the pass of SwiGLU.
"""

import torch
from torch import nn

from gatepack import _env
from gatepack.adopt import adopt
from gatepack.functional import swiglu
from gatepack.gates import Gate
from gatepack.in_place import open_mlp
from gatepack.modules import (
    Operands,
    as_operand,
    base_linear,
    fits,
    is_gated,
    most_in_place,
    multipliers,
    operands_of,
    path_of,
    ungated_forward,
)
from gatepack.paths import has_kernels
from gatepack.sites import RowBlock

# Class of an activation -> its name in gated_mlp
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


_SILU = tuple(name for name, activation in _ACTIVATIONS.items() if activation == "silu")


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over open channels, dense in and dense out.

    Stands in for the HF MLP it is made from: same children, state-dict keys and attributes. x [*,
    hidden] -> [*, hidden].
    """

    @classmethod
    def from_mlp(cls, mlp: nn.Module, up: tuple[str, ...], down: str) -> "GatedMLP":
        """up: names of the gate and up projections, in order; down: that of the down projection."""
        gated = adopt(mlp, cls)
        gated.roles = (*up, down)
        gated.dense_class = type(mlp)
        return gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = self._operands()
        if isinstance(operands, str):
            y = self._in_place(x)
            if y is not None:
                return y
            gate, up, down = self.linears()
            if type(self.act_fn).__name__ in _SILU and not _is_watched(self.act_fn):
                if _takes_gated(down, x):
                    z = down.site.in_gate.values()
                    return ungated_forward(down, swiglu(gate(x), up(x), z))
                return down(swiglu(gate(x), up(x)))
            return down(self.act_fn(gate(x)) * up(x))
        return _fused(self, operands, x)

    def linears(self) -> list[nn.Module]:
        """gate, up and down projection."""
        return [getattr(self, role) for role in self.roles]

    def why_not_fused(self) -> str:
        """Why the MLP runs linear by linear in its present state, or ""."""
        operands = self._operands()
        return operands if isinstance(operands, str) else ""

    def _operands(self) -> list[Operands] | str:
        """The operands of gate, up and down for the op, or why the MLP runs linear by linear."""
        device = base_linear(self.linears()[-1]).weight.device
        if not has_kernels(device):
            return f"no kernels on {device.type}"
        return self._whole()

    def _in_place(self, x: torch.Tensor) -> torch.Tensor | None:
        """The MLP in one pass over the open channels of weights that stay where they are, or None
        where that is not its path or not all that acts on it."""
        down = self.linears()[-1]
        # First what many tokens and other devices end with: this runs in each of their forwards.
        if x.numel() // max(x.shape[-1], 1) > most_in_place(down):
            return None
        if type(self.act_fn).__name__ not in _SILU:
            return None
        operands = self._whole()
        if isinstance(operands, str) or any(linear.adapters for linear in operands):
            return None
        if path_of(down, x) != "folded":
            return None
        current = down.site.in_gate.open()
        weights, biases = [linear.w for linear in operands], [linear.bias for linear in operands]
        return open_mlp(x, weights, biases, multipliers(current), current.lanes)

    def _whole(self) -> list[Operands] | str:
        """The operands of gate, up and down where the MLP is more than its linears, or why not."""
        *ups, down = self.linears()
        if not is_gated(down) or down.site.in_gate is None:
            return "no channel gate"
        if _env.backend() in ("folded", "dense"):
            return "GATEPACK_BACKEND"
        if type(self.act_fn).__name__ not in _ACTIVATIONS:
            return f"activation {type(self.act_fn).__name__}"
        if not all(_feeds(up, down.site.in_gate) for up in ups) or down.site.out_gate is not None:
            return "gates beside that of the channels"
        if any(_is_watched(part) for part in (*ups, down, self.act_fn)):
            return "hooks on its parts"
        operands = [operands_of(linear) for linear in (*ups, down)]
        return next(filter(None, map(_why_not_whole, operands)), operands)


def ungate_mlp(module: GatedMLP) -> nn.Module:
    """The MLP that a GatedMLP stands in for, with its present children."""
    plain = adopt(module, module.dense_class)
    del plain.roles, plain.dense_class
    return plain


def _feeds(linear: nn.Module, channels: Gate) -> bool:
    """Whether a linear's rows are the channels of a gate, and no other gate acts on it."""
    if not is_gated(linear):
        return False
    site = linear.site
    alone = site.in_gate is None and site.out_gate is None
    return alone and site.rows_gate is channels and site.row_blocks == (RowBlock(),)


def _takes_gated(down: nn.Module, x: torch.Tensor) -> bool:
    """Whether the channel gate is all that acts on the down projection, and its path is "dense"."""
    if not is_gated(down) or down.site.in_gate is None or _is_watched(down):
        return False
    return down.site.out_gate is None and path_of(down, x) == "dense"


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook inside the module would be left out by an op that does not call it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ) or any(_is_watched(part) for part in module._modules.values() if part is not None)


def _why_not_whole(operands: Operands | str) -> str:
    """Why the op cannot take a linear with all that is on it, or ""."""
    if isinstance(operands, str):
        return operands
    if len(operands.adapters) > 1:
        return "several adapters"
    if not all(fits(adapter, operands.w.dtype) for adapter in operands.adapters):
        return "an adapter of another dtype"
    drops = any(adapter.drop_probability for adapter in operands.adapters)
    return "LoRA dropout" if drops else ""


def _fused(mlp: GatedMLP, operands: list[Operands], x: torch.Tensor) -> torch.Tensor:
    from gatepack.kernels import gated_mlp_fn

    down = mlp.linears()[-1]
    gate = down.site.in_gate
    x = as_operand(x, operands[-1].w)
    a, u, d = (linear.cast(x.dtype) for linear in operands)
    packed = path_of(down, x) == "folded"
    if packed:
        lanes, z = gate.open().lanes, multipliers(gate.open())
        a, u, d = a.part(rows=lanes), u.part(rows=lanes), d.part(cols=lanes)
    else:
        z = gate.values()
    return gated_mlp_fn(
        x, a.w, u.w, d.w, z, bias_a=a.bias, bias_u=u.bias, bias_d=d.bias, lora_of_a=a.lora,
        lora_of_u=u.lora, lora_of_d=d.lora, activation=_ACTIVATIONS[type(mlp.act_fn).__name__],
        packed=packed,
    )  # fmt: skip
