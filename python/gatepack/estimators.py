"""Stage 1, gates: estimators, which map logits and noise to gate values with exact zeros."""

import hashlib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class STG:
    """z = clamp(tanh(l) + 0.5 + sigma * eps, 0, 1), eps ~ N(0, 1), or 0 without noise.

    Stochastic gates (Yamada et al. 2020, arXiv 1810.04247) with the shift of FineGates (arXiv
    2412.12951). A clamped gate has zero gradient.
    """

    sigma: float
    default_logit = 1.0
    # FineGates' penalty width: wider than the noise, so that saturated gates still feel the budget.
    penalty_sigma = 0.5

    def noise_like(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Noise [N], fp32, in the estimator's own units."""
        return self.sigma * torch.randn(
            logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
        )

    def values(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N] -> gate values [N] in [0, 1]."""
        shifted = torch.tanh(logits) + 0.5
        return (shifted if noise is None else shifted + noise).clamp(0.0, 1.0)

    def open_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Phi((tanh(l) + 0.5) / 0.5) [N]: a smooth stand-in for "open" whose gradient never
        vanishes."""
        return torch.special.ndtr((torch.tanh(logits) + 0.5) / self.penalty_sigma)

    def logits_of(self, values: torch.Tensor) -> torch.Tensor:
        """Logits whose noiseless gate is values [N], before clamping, within (-0.5, 1.5)."""
        return torch.atanh((values - 0.5).clamp(-0.995, 0.995))


@dataclass(frozen=True)
class HardConcrete:
    """z = clamp(s * (zeta - gamma) + gamma, 0, 1), s = sigmoid((logit(u) + l) / beta), u ~ U(0, 1).

    Louizos et al. 2018 (arXiv 1712.01312) with their beta 2/3, gamma -0.1, zeta 1.1; without noise
    s = sigmoid(l).
    """

    sigma: float
    default_logit = 3.0
    beta = 2.0 / 3.0
    gamma = -0.1
    zeta = 1.1

    def noise_like(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """logit(u) [N], fp32."""
        u = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        return torch.logit(u, eps=1e-6)

    def values(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N] -> gate values [N] in [0, 1]."""
        s = torch.sigmoid(logits if noise is None else (noise + logits) / self.beta)
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)

    def open_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """P(z > 0) = sigmoid(l - beta * log(-gamma / zeta)) [N]."""
        return torch.sigmoid(logits - self.beta * math.log(-self.gamma / self.zeta))

    def logits_of(self, values: torch.Tensor) -> torch.Tensor:
        """Logits whose noiseless gate is values [N], before clamping, within (-0.1, 1.1)."""
        return torch.logit(((values - self.gamma) / (self.zeta - self.gamma)).clamp(1e-4, 1 - 1e-4))


def mix(seed: int, draw: int) -> int:
    """One 64-bit generator seed from both numbers; the CPU generator reads its low 32 bits only."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=8).digest(), "little"
    )


ESTIMATORS = {"stg": STG, "hard_concrete": HardConcrete}
