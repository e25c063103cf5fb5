"""Other people's ways to compute a gated or pruned layer, as their authors run them.

FineGates   an eager version of the published code (arXiv 2412.12951; github jsvir/FineGates)
Liger       Liger-Kernel's Triton kernels put into a masked model, instance by instance
Torch-Pruning   what its DependencyGraph cuts to the widths of a case
Each is optional but the first: absence gives a reason, which the table prints.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

MISSING = "not installed (pip install {})"


def why_missing(module: str, distribution: str) -> str | None:
    """Why a package cannot be compared with, or None if it is there."""
    found = importlib.util.find_spec(module)
    return None if found else MISSING.format(distribution)


class FineGatesLinear(nn.Module):
    """y = z_rows * (W (z_columns * x) + b), z = clamp(tanh(l) + 0.5 + 0.1 eps, 0, 1), unfused.

    Two logit vectors per linear, each sampled by operations of its own in every forward, and full
    matmuls whatever is closed, in training and in evaluation, as published. Two of its defects stay
    out: a random bias where the base has none, and logits in half precision.
    """

    def __init__(self, linear: nn.Linear, kept: float):
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.rows, self.columns = (
            nn.Parameter(_logits(size, kept, device)) for size in linear.weight.shape
        )

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        mu = torch.tanh(logits)
        noise = 0.1 * torch.randn_like(mu) if self.training else 0.0
        return torch.clamp(mu + noise + 0.5, 0.0, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z_columns, z_rows = self.sample(self.columns), self.sample(self.rows)
        y = F.linear(x * z_columns.to(x.dtype), self.linear.weight, self.linear.bias)
        return y * z_rows.to(y.dtype)

    def penalty(self, target_sparsity: float) -> torch.Tensor:
        """(|mean_rows p - k| + |mean_columns p - k|) / 2, p = Phi((tanh(l) + 0.5) / 0.5)."""
        distances = []
        for logits in (self.rows, self.columns):
            p = 0.5 - 0.5 * torch.erf((-0.5 - torch.tanh(logits)) / (0.5 * 2**0.5))
            distances.append((p.mean() - (1 - target_sparsity)).abs())
        return (distances[0] + distances[1]) / 2


def _logits(size: int, kept: float, device) -> torch.Tensor:
    """N(1, 0.1^2) as published; round((1 - kept) * size) of them so low that noise opens none."""
    logits = 1.0 + 0.1 * torch.randn(size, device=device)
    logits[torch.randperm(size, device=device)[round(kept * size) :]] = -3.0
    return logits


def with_fine_gates(model: nn.Module, names: set[str], kept: float) -> list[FineGatesLinear]:
    """Puts a FineGatesLinear in place of every linear that has one of these names."""
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                found.append(FineGatesLinear(child, kept))
                setattr(parent, name, found[-1])
    return found


def with_liger(model: nn.Module) -> nn.Module:
    """Liger-Kernel's SwiGLU and RMSNorm in one Llama; its own patch changes the class for all."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def swiglu(mlp):
        return lambda x: mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    def norm(module):
        return lambda x: LigerRMSNormFunction.apply(
            x, module.weight, module.variance_epsilon, 0.0, "llama", False
        )

    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.forward = swiglu(module)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
    return model


def prune_mlp(mlp: nn.Module, closed: torch.Tensor, x: torch.Tensor) -> nn.Module:
    """Torch-Pruning's cut of channels: its dependency graph finds up_proj and down_proj itself."""
    import torch_pruning

    for p in mlp.parameters():  # the graph is traced through gradients
        p.requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(mlp, example_inputs=x.detach()[:, :2])
    cut = torch_pruning.prune_linear_out_channels
    graph.get_pruning_group(mlp.gate_proj, cut, idxs=closed.tolist()).prune()
    return mlp.requires_grad_(False)
