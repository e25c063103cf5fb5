"""Stage 4, methods: FineGates, gates on the rows and columns of linears, trained to a sparsity."""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.calibration import Batch, token_mask, token_rows
from gatepack.config import GateConfig
from gatepack.functional import spread_lanes
from gatepack.gate_training import GateSchedule, GateTraining
from gatepack.gates import Gate
from gatepack.hf import attach, gates_of
from gatepack.layers import GATES_NAME, hf_model, layers_of
from gatepack.modules import base_linear, weight_matrix
from gatepack.sharding import over_ranks, whole

LINEARS = ("blocks", "blocks_and_output", "all_but_down")
TRAINED = ("head_and_biases", "biases", "gates", "all")
WEIGHTINGS = ("mean", "units", "kurtosis")


@dataclass(frozen=True)
class FineGates:
    """y = z_rows * (W (z_columns * x) + b) of each linear, z = clamp(tanh(l) + 0.5 + noise, 0, 1).

    noise is normal, of that standard deviation, and 0 in eval mode. l starts at N(1, 0.1^2), in
    fp32 whatever the model's dtype. Added to the loss is penalty * mean over linears of
    (|mean_rows p - k| + |mean_columns p - k|) / 2, with k = 1 - target_sparsity and
    p = Phi((tanh(l) + 0.5) / 0.5). p of a closed gate is still 0.16 to 0.30 and gates may all end
    in between, so this does not say what is removed: that is counted on exact zeros, together with
    what they leave dead in coupled linears. budget: the kept fraction of the weights, so counted,
    to end at within 0.5 %, by closing what has the lowest logits; None keeps what the penalty left.

    linears: "blocks", "blocks_and_output" (the output layer too, unless it is tied),
    "all_but_down", or names as in GateConfig.targets. trains: "head_and_biases" (the task's head
    and the biases that gated linears have), "biases", "gates" or "all". LoRA of a PEFT model is
    inside the gates and trains along. weighting: "mean", as published, pulls on each gate by
    1 / (gates of its side), so that wide linears lag; "units" multiplies that by the gates of its
    side over the average; "kurtosis" replaces the mean by softmax(-sqrt(kurtosis) /
    kurtosis_temperature), of mean(x)_j W_ij along the other axis, over all gates, so that k does
    not move as gates close, renewed every kurtosis_every steps, without padding (attention_mask).

    warmup, freeze: fractions of all steps before which the penalty is 0, and from which the gates
    stay as they are. learning_rate: of Adam on the logits, without weight decay, down a cosine to
    final_rate of it; a gate closes at l = -0.55, so that steps * learning_rate until then must be
    well above 1.55, or budget closes what nothing has prepared. Source: FineGates, arXiv 2412.12951
    and 2602.09169; the values are those of its code for fine-tuning.
    """

    target_sparsity: float = 0.4
    penalty: float = 50.0
    noise: float = 0.1
    learning_rate: float = 1e-3
    final_rate: float = 1.0
    warmup: float = 0.0
    freeze: float = 1.0
    budget: float | None = None
    linears: str | tuple[str, ...] = "blocks"
    trains: str = "head_and_biases"
    weighting: str = "mean"
    kurtosis_temperature: float = 100.0
    kurtosis_every: int = 100
    init_std: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for field in ("target_sparsity", "final_rate", "warmup", "freeze"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(
                    f"{field}: expected a number in [0, 1], got {getattr(self, field)}"
                )
        for field in ("penalty", "noise", "init_std"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}: expected a number >= 0, got {getattr(self, field)}")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"budget: expected a kept fraction in (0, 1), got {self.budget}")
        if not 0 < self.kurtosis_temperature < math.inf:
            raise ValueError(
                f"kurtosis_temperature: expected a positive number, got {self.kurtosis_temperature}"
            )
        if self.kurtosis_every < 1:
            raise ValueError(f"kurtosis_every: expected at least 1, got {self.kurtosis_every}")
        for field, allowed in (("trains", TRAINED), ("weighting", WEIGHTINGS)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {allowed}, got {getattr(self, field)!r}"
                )
        if isinstance(self.linears, str) and self.linears not in LINEARS:
            raise ValueError(
                f"linears: expected one of {LINEARS} or a tuple of names, got {self.linears!r}"
            )

    @classmethod
    def post_train(cls, **fields) -> "FineGates":
        """With the published values for a language model that stays frozen: gates only."""
        published = {
            "target_sparsity": 0.3,
            "learning_rate": 1e-2,
            "final_rate": 0.5,
            "linears": "blocks_and_output",
            "trains": "gates",
        }
        return cls(**{**published, **fields})

    @classmethod
    def pretrain(cls, **fields) -> "FineGates":
        """With the published values for training all weights from the beginning."""
        published = {
            "penalty": 100.0,
            "learning_rate": 1e-2,
            "final_rate": 0.1,
            "warmup": 0.01,
            "linears": "all_but_down",
            "trains": "all",
        }
        return cls(**{**published, **fields})

    def prepare(self, model: nn.Module, batches: Iterable[Batch] = ()) -> None:
        """Attaches the gates and sets what trains beside them; their logits wait for start."""
        root = hf_model(model)
        config = GateConfig(
            units=("rows", "columns"),
            noise=self.noise,
            target=self.budget or 0.999,
            width_multiple=16,
            targets=self._targets(root),
            init_logit=1.0,
            seed=self.seed,
        )
        gates = attach(model, config)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            spread = torch.randn(gates.logits.shape, generator=generator)
            gates.logits += self.init_std * spread.to(gates.logits.device)
        self._choose_trained(model)
        gates.logits.requires_grad_(False)

    def start(
        self, model: nn.Module, steps: int, batches: Iterable[Batch] = ()
    ) -> "FineGatesTraining":
        """The training of a model for so many optimizer steps; prepares it if it has no gates."""
        if not hasattr(hf_model(model), GATES_NAME):
            self.prepare(model)
        if not gates_of(model).config.of_linears:
            raise ValueError(
                "FineGates needs gates on rows and columns, the model has "
                f"{gates_of(model).config.units}: take them off with gatepack.detach(model) first"
            )
        training = FineGatesTraining(model, steps, self)
        if self.freeze < 1 and not training.weights():
            raise ValueError(
                f"freeze: expected 1 for a model in which only gates train, got {self.freeze}"
            )
        return training

    def _targets(self, root: nn.Module) -> tuple[str, ...] | None:
        if not isinstance(self.linears, str):
            return tuple(self.linears)
        names = [
            f"{layer.name}.{path}"
            for layer in layers_of(root)
            for path in layer.family.linears
            if self.linears != "all_but_down" or path != layer.family.down
        ]
        output = root.get_output_embeddings() if self.linears == "blocks_and_output" else None
        if output is not None and output.weight is not root.get_input_embeddings().weight:
            names.append(next(name for name, module in root.named_modules() if module is output))
        return None if self.linears == "blocks" else tuple(names)

    def _choose_trained(self, model: nn.Module) -> None:
        """Sets requires_grad; what PEFT left trainable stays so."""
        root = hf_model(model)
        if model is root:
            for parameter in root.parameters():
                parameter.requires_grad_(self.trains == "all")
        if self.trains in ("head_and_biases", "biases"):
            for parent, name, _ in gates_of(root).attachment.sites:
                bias = base_linear(parent._modules[name]).bias
                if bias is not None:
                    bias.requires_grad_(True)
        if self.trains == "head_and_biases":
            inside = {id(p) for p in root.base_model.parameters()}
            output = root.get_output_embeddings()
            inside |= {id(p) for p in output.parameters()} if output is not None else set()
            for module in root.modules():  # what PEFT's modules_to_save trains a copy of
                original = getattr(module, "original_module", None)
                inside |= {id(p) for p in original.parameters()} if original is not None else set()
            for parameter in root.parameters():
                if id(parameter) not in inside:
                    parameter.requires_grad_(True)


class FineGatesTraining(GateTraining):
    """GateTraining with the penalty, the rate and the end of a FineGates method.

    weights(), step(), finish(), state_dict() and load_state_dict() are those of GateTraining.
    """

    def __init__(self, model: nn.Module, steps: int, method: FineGates):
        self.method = method
        # Linear -> sum over tokens of what it was given [K], and how many; of these the mask.
        self._inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._token_mask: torch.Tensor | None = None
        super().__init__(model, steps, GateSchedule(method.learning_rate, 0.0, 0.0, method.freeze))
        device = self.gates.logits.device
        self.sizes = torch.tensor([gate.size for _, gate in self.gates.items()], device=device)
        self.unit_weights = torch.repeat_interleave(1 / self.sizes, self.sizes)

    @property
    def _rounds(self) -> bool:
        return self.method.budget is not None

    def _watch(self) -> None:
        super()._watch()
        self._hooks = []
        if self.method.weighting == "kurtosis":
            root = hf_model(self.model)
            self._hooks = [
                parent._modules[name].register_forward_pre_hook(self._recorder(linear, columns))
                for parent, name, linear, columns in self._linears()
            ]
            self._hooks += [
                module.register_forward_pre_hook(self._read_mask, with_kwargs=True)
                for module in {root, root.base_model}
            ]

    def _unwatch(self) -> None:
        super()._unwatch()
        for hook in self._hooks:
            hook.remove()

    def _linears(self) -> list[tuple[nn.Module, str, str, Gate | None]]:
        """(parent, child, name, gate of its columns) of every gated linear."""
        return [
            (parent, name, (site.out_gate or site.in_gate).name.rpartition(":")[0], site.in_gate)
            for parent, name, site in self.gates.attachment.sites
        ]

    def _read_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        self._token_mask = token_mask({**named, **kwargs})

    def _recorder(self, linear: str, columns: Gate | None):
        def hook(module, args):
            runs_again = torch._C._current_graph_task_id() != -1  # by gradient checkpointing
            if not module.training or self.done % self.method.kurtosis_every or runs_again:
                return
            rows = counted_rows(args[0].detach(), self._token_mask, linear).float()
            total = rows.sum(0)
            if columns is not None and len(total) != columns.size:
                total = spread_lanes(total, columns.open().lanes, columns.size)
            count = total.new_tensor(len(rows))
            if linear in self._inputs:
                before, so_far = self._inputs[linear]
                total, count = total + before, count + so_far
            self._inputs[linear] = total, count

        return hook

    def step(self, loss_scale: float = 1.0) -> None:
        if self._inputs and not self.gates.frozen:
            self._renew_weights()
        method = self.method
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.done / self.steps)))
        rate = method.learning_rate * (method.final_rate + (1 - method.final_rate) * fall)
        self.optimizer.param_groups[0]["lr"] = rate
        super().step(loss_scale)

    def _penalty(self) -> torch.Tensor:
        if self.done <= round(self.method.warmup * self.steps):
            return self.gates.logits.sum() * 0.0
        return self.method.penalty * self.soft_distance()

    def soft_distance(self) -> torch.Tensor:
        """mean over sides of |sum_i w_i p_i - k|, a differentiable scalar."""
        distance = (self.soft_keep() - (1 - self.method.target_sparsity)).abs()
        if self.method.weighting == "units":
            distance = distance * self.sizes / self.sizes.float().mean()
        return distance.mean()

    def soft_keep(self) -> torch.Tensor:
        """sum_i w_i Phi((tanh(l_i) + 0.5) / 0.5) of each side, fp32 [sides]."""
        probability = self.gates.estimator.open_probability(self.gates.logits)
        return torch.segment_reduce(probability * self.unit_weights, "sum", lengths=self.sizes)

    @torch.no_grad()
    def _renew_weights(self) -> None:
        parts = {}
        for parent, child, linear, _ in self._linears():
            total, count = (over_ranks(part) for part in self._inputs[linear])
            mean = total / count.clamp(min=1e-9)
            reached = whole(weight_matrix(base_linear(parent._modules[child]))).float() * mean
            for side, axis in (("rows", 1), ("columns", 0)):
                heavy = kurtosis(reached, axis).sqrt() / self.method.kurtosis_temperature
                parts[f"{linear}:{side}"] = torch.softmax(-heavy, 0)
        self.unit_weights = torch.cat([parts[name] for name in self.gates])
        self._inputs.clear()

    def _worth(self) -> dict[str, torch.Tensor]:
        logits = self.gates.logits.detach()
        return self.gates.split(torch.where(self.gates.closed, logits.min() - 1, logits))

    def metrics(self) -> dict[str, float]:
        with torch.no_grad():
            soft = float(self.soft_keep().mean())
        return {**super().metrics(), "gates/soft_keep": round(soft, 4)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), "unit_weights": self.unit_weights}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.unit_weights = state["unit_weights"].to(self.gates.logits.device, copy=True)


def counted_rows(x: torch.Tensor, mask: torch.Tensor | None, linear: str) -> torch.Tensor:
    """Rows [T, C] of what a linear was given, x [*, C], without padding; mask: as of token_mask.

    x holds all tokens of mask [B, S] or the last ones of each row, or, without padding already, one
    row for each that is kept or for each text. ValueError for another shape.
    """
    if mask is None:
        return token_rows(x, None)
    n_rows = x.shape[:-1].numel()
    if n_rows == mask.numel():
        return token_rows(x, mask)
    if x.dim() == 3 and len(x) == len(mask) and x.shape[1] < mask.shape[1]:
        return token_rows(x, mask[:, -x.shape[1] :])
    if n_rows in (len(mask), int(mask.sum())):
        return token_rows(x, None)
    raise ValueError(
        f"attention_mask: {linear} is given {list(x.shape)}, of which a mask {list(mask.shape)} "
        'does not say which rows are padding; use another weighting than "kurtosis"'
    )


def kurtosis(x: torch.Tensor, axis: int) -> torch.Tensor:
    """E[(x - mean)^4] / E[(x - mean)^2]^2 along an axis; 1, the least there is, for a constant."""
    centred = x - x.mean(axis, keepdim=True)
    square = centred.square().mean(axis)
    fourth = centred.pow(4).mean(axis)
    return torch.where(square > 0, fourth / square.square(), 1.0)
