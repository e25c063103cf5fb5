"""Stage 1, gates: one flat vector of logits for all gates of a model, sampled once per forward.

No module knows about estimators or budgets: it reads the current sample (gate values and open set)
of its Gate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from gatepack.budget import BudgetController, Costs, Plan, moved_only, plan
from gatepack.config import GateConfig
from gatepack.estimators import ESTIMATORS, mix
from gatepack.gate_specs import GateSpec, GateSummary
from gatepack.samples import Open, Sample, ValueGradients

Units = Mapping[str, torch.Tensor]  # gate name -> one value per unit


class Gate:
    """One gate vector of a GateSet: a handle that modules hold and read.

    name: module path and unit, "model.layers.0.mlp:channels". size: units. lanes: lanes a unit
    covers.
    """

    def __init__(self, gates: "GateSet", name: str, spec: GateSpec, start: int):
        self._set = gates
        self.name = name
        self.spec = spec
        self.start = start

    kind = property(lambda self: self.spec.kind)
    size = property(lambda self: self.spec.size)
    lanes = property(lambda self: self.spec.lanes)

    def values(self) -> torch.Tensor:
        """Gate values of the current sample, fp32 [size], differentiable in training."""
        return self._set.sample().values[self.name]

    def open(self) -> Open:
        """The open set of the current sample; the first one of a sample waits for the host."""
        return self._set.sample().open(self)

    def open_fraction(self, noise: bool = True) -> float:
        """Fraction of units open in the current sample, which waits for a GPU, or without noise."""
        if not noise:
            return self._set.open_fraction(self.name)
        return self._set.sample().open_fraction(self)

    def running(self) -> torch.Tensor:
        """1 for open units and 0 for closed ones, fp32 [size], without gradient."""
        return self._set.sample().running(self)

    def shared_running(self) -> torch.Tensor:
        """1 for blocks with an open unit, else 0, fp32 [size / shared_size], without gradient."""
        return self._set.sample().shared_running(self)

    @property
    def width(self) -> int | None:
        """Residual width of the model that the gate is attached to; None outside a model."""
        return self._set.width

    @property
    def path(self) -> str | None:
        """The path of this forward, if the model has decided on one (gatepack.paths)."""
        return self._set.paths.get(self.name)

    def __repr__(self):
        return f"Gate({self.name!r}, {self.kind}, size={self.size}, lanes={self.lanes})"


class GateSet(nn.Module):
    """All gates of a model.

    config: GateConfig. specs: name -> GateSpec, in model order. fixed_cost: parameters that the
    budget counts and no gate can remove. Logits are one fp32 parameter [N]; a forward of the model
    draws one sample (values, open sets) that all its modules read. An attached model sets `paths`,
    gate name -> path of the present forward, `pinned`, the sample of an earlier forward while
    gradient checkpointing runs it again, `width`, its residual width, `sampler`, which draws the
    values where kernels run (None: plain torch), and `attachment`, which keeps the model's modules
    in step with the gates (None: no model).

    Noiseless values are kept from forward to forward; writes through `logits.data` (an average of
    weights put in for evaluation) are seen after train() or eval(), or sync_from_buffers().
    """

    def __init__(self, config: GateConfig, specs: Mapping[str, GateSpec], fixed_cost: int = 0):
        super().__init__()
        if not specs:
            raise ValueError("specs must hold at least one gate, got none")
        self.config = config
        self.estimator = ESTIMATORS[config.estimator](sigma=config.noise)
        self.gates: dict[str, Gate] = {}
        start = 0
        for name, spec in specs.items():
            self.gates[name] = Gate(self, name, spec, start)
            start += spec.size
        self.logits = nn.Parameter(torch.full((start,), self.initial_logit))
        self.register_buffer("closed", torch.zeros(start, dtype=torch.bool))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.costs = Costs({name: gate.spec for name, gate in self.gates.items()}, fixed_cost)
        self.controller = BudgetController(config.target)
        self.frozen = False
        self.width: int | None = None
        self.paths: dict[str, str] = {}
        self.pinned: Sample | None = None
        self.sampler: Callable[[GateSet, int | torch.Tensor | None], torch.Tensor] | None = None
        self.attachment = None
        self._draws = 0
        self._all_open = False
        self._offsets: torch.Tensor | None = None
        self._places: torch.Tensor | None = None  # of the units among those of before removals
        self._whole_size = start
        self._sample: Sample | None = None
        self._value_grads = ValueGradients()

    def train(self, mode: bool = True) -> "GateSet":
        if self._sample is not None and self._sample.number is None:
            self._sample = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        # Logits stay fp32, bit for bit, when a model is cast: bf16 loses updates just above 1.0.
        super()._apply(moved_only(fn), recurse)
        if not self.draws.is_meta:
            self.sync_from_buffers()
        return self

    def __getstate__(self):
        # A sample may carry an autograd graph, which neither deepcopy nor pickle can copy.
        return {**self.__dict__, "_sample": None, "_value_grads": ValueGradients()}

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.sync_from_buffers()

    def sync_from_buffers(self) -> None:
        """Re-reads host-side copies of loaded buffers; call it after writing to them directly."""
        self._draws = int(self.draws)
        self._sample = None

    def items(self) -> Iterable[tuple[str, Gate]]:
        return self.gates.items()

    def __getitem__(self, name: str) -> Gate:
        if name not in self.gates:
            raise ValueError(
                f"no gate named {name!r}; the first of {len(self.gates)} is "
                f"{next(iter(self.gates))!r}"
            )
        return self.gates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.gates)

    def __len__(self) -> int:
        return len(self.gates)

    @property
    def initial_logit(self) -> float:
        """Where logits start."""
        init = self.config.init_logit
        return float(self.estimator.default_logit if init is None else init)

    def way_to_close(self) -> float:
        """How far a logit moves from its start to where its gate is exactly 0, at least 0.5."""
        closed = float(self.estimator.logits_of(torch.zeros(())))
        return max(0.5, abs(self.initial_logit - closed))

    @property
    def noisy(self) -> bool:
        return self.training and not self.frozen and self.config.noise > 0

    def deterministic_values(self) -> torch.Tensor:
        """Noiseless gate values, fp32 [N], closed ones exactly 0."""
        return self.estimator.values(self.logits).masked_fill(self.closed, 0.0)

    def draw(self) -> Sample:
        """Draws the sample of this forward: new noise while training, else the noiseless values."""
        if (
            self.training
            and not self.frozen
            and torch.is_grad_enabled()
            and not self.logits.requires_grad
        ):
            raise RuntimeError(
                "the gate logits have requires_grad=False in training mode. get_peft_model freezes "
                "every parameter that is not an adapter's: call gates.unfreeze() after it and "
                "before building the optimizer, or gates.freeze() if the gates are meant to stay "
                "as they are"
            )
        return self._drawn(self._next_number())

    def _next_number(self) -> int | torch.Tensor | None:
        """The number of a new draw; None without noise."""
        if not self.noisy or self._all_open:
            return None
        if self.sampler is not None:
            number = self.draws.clone()
            self.draws.add_(1)
            return number
        number = self._draws
        self._draws += 1
        self.draws.fill_(self._draws)
        return number

    def _drawn(self, number: int | torch.Tensor | None) -> Sample:
        """The sample with the noise of a draw, a new one or one of before; None: without noise."""
        key, last = self._key(), self._sample
        if last is not None and last.key == key and last.number is number:
            # A graph is walked once: with gradients, only values that have none are used again.
            if not torch.is_grad_enabled() or not (
                self.logits.requires_grad or last.flat.requires_grad
            ):
                return last
        if self._all_open:
            flat = torch.ones_like(self.logits)
        elif self.sampler is not None:
            flat = self.sampler(self, number)
        elif number is not None:
            generator = torch.Generator(self.logits.device)
            generator.manual_seed(mix(self.config.seed, int(number)))
            # As much noise as before units were removed, so that those that stay get the same.
            noise = self.estimator.noise_like(self.logits.new_empty(self._whole_size), generator)
            noise = noise if self._places is None else noise[self._places.to(noise.device)]
            flat = self.estimator.values(self.logits, noise).masked_fill(self.closed, 0.0)
        else:
            flat = self.deterministic_values()
        if flat.requires_grad:
            self._value_grads.watch(flat)
        self._sample = Sample(self, key, flat, number)
        return self._sample

    @contextmanager
    def all_open(self) -> Iterator[None]:
        """Inside, every gate is 1, closed ones too: the dense model. Draws no noise."""
        self._all_open = True
        try:
            yield
        finally:
            self._all_open = False

    def _key(self) -> tuple:
        """What a sample depends on, besides noise."""
        # Not by way of __getattr__: every read of a gate asks for this.
        logits = self._parameters["logits"]
        return (
            id(logits),  # torch.func.functional_call puts others there
            logits._version,
            self._buffers["closed"]._version,
            self.training,
            self.frozen,
            self._all_open,
            torch.is_inference_mode_enabled(),
        )

    def sample(self) -> Sample:
        """The current sample; draws one if there is none or what it depends on has changed."""
        if self.pinned is not None:
            return self.pinned
        current = self._sample
        if current is None or current.key != self._key():
            return self.draw()
        if current.flat.requires_grad or not torch.is_grad_enabled():
            return current
        return self.draw() if self.logits.requires_grad else current

    def value_grads(self) -> torch.Tensor:
        """dL/dz, fp32 [N], of the backward passes since the last training forward, summed over all
        forwards that they reach; 0 for closed units, for which nothing ran."""
        if self._value_grads.total is None:
            raise RuntimeError("no gate gradient yet: run a training forward and backward first")
        return self._value_grads.total

    def offsets(self) -> torch.Tensor:
        """Where each gate begins in the flat vectors, and their end: int32, on their device."""
        if self._offsets is None or self._offsets.device != self.logits.device:
            starts = [gate.start for gate in self.gates.values()]
            ends = [*starts, self.logits.numel()]
            self._offsets = torch.tensor(ends, dtype=torch.int32, device=self.logits.device)
        return self._offsets

    def slices(self) -> Iterator[tuple[Gate, slice]]:
        """Each gate with its range in the flat vectors."""
        for gate in self.gates.values():
            yield gate, slice(gate.start, gate.start + gate.size)

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector [N] as name -> [size]."""
        return {gate.name: flat[where] for gate, where in self.slices()}

    def open_masks(self) -> dict[str, torch.Tensor]:
        """Per gate which units are open without noise, bool [size] on the CPU."""
        with torch.no_grad():
            return self.split((self.deterministic_values() > 0).cpu())

    def open_fraction(self, name: str | None = None) -> float:
        """Fraction of units that are open without noise, of one gate or of all."""
        masks = self.open_masks()
        chosen = masks.values() if name is None else [masks[self[name].name]]
        return sum(int(mask.sum()) for mask in chosen) / sum(mask.numel() for mask in chosen)

    def kept_fraction(self) -> float:
        """Fraction of the budget's cost kept without noise, counted on exact zeros."""
        return self.costs.kept_fraction(self.open_masks())

    def penalty(self) -> torch.Tensor:
        """Budget term, a scalar to add to the loss: augmented Lagrangian of the kept fraction.

        (multiplier + rho * violation) * expected kept fraction, where violation is measured on
        exact zeros and the expectation, through the estimator's open probability, carries the
        gradient. Never waits for a GPU.
        """
        probability = self.estimator.open_probability(self.logits).masked_fill(self.closed, 0.0)
        return self.controller.penalty(self.costs.expected(probability), self._kept())

    def step(self) -> None:
        """Advances the budget: call it after each optimizer step. Never waits for a GPU."""
        self.controller.step(self._kept())

    @torch.no_grad()
    def _kept(self) -> torch.Tensor:
        """kept_fraction as a scalar on the device of the gates."""
        return self.costs.expected((self.deterministic_values() > 0).to(self.logits.dtype))

    def close(self, name: str, indices) -> None:
        """Closes units of a gate: exactly 0 until reopened."""
        self._set_closed(name, indices, True)

    def reopen(self, name: str, indices) -> None:
        """Undoes close; where the logit itself is shut, it is set back to its initial value."""
        index = self._set_closed(name, indices, False)
        with torch.no_grad():
            shut = self.estimator.values(self.logits[index]) <= 0
            self.logits[index[shut]] = self.initial_logit

    def _set_closed(self, name: str, indices, value: bool) -> torch.Tensor:
        gate = self[name]
        try:
            index = torch.as_tensor(indices).reshape(-1).to(self.closed.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"indices of {name!r} must be a tensor or sequence of integers, got {indices!r}"
            ) from error
        if index.numel() and (index.dtype == torch.bool or index.is_floating_point()):
            raise ValueError(f"indices of {name!r} must be integers, got {index.dtype}")
        index = index.long()
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= gate.size):
            raise ValueError(
                f"indices of {name!r} must be in [0, {gate.size}), got "
                f"{int(index.min())}..{int(index.max())}"
            )
        index = index + gate.start
        self.closed[index] = value
        return index

    @torch.no_grad()
    def set_open(self, masks: Units) -> None:
        """Closes the units that masks (name -> bool [size]) leave out and reopens the others;
        logits stay."""
        for name, mask in masks.items():
            gate = self[name]
            mask = torch.as_tensor(mask)
            if mask.dtype != torch.bool or mask.shape != (gate.size,):
                raise ValueError(
                    f"masks[{name!r}] must be bool [{gate.size}], got {mask.dtype} "
                    f"{list(mask.shape)}"
                )
            self.closed[gate.start : gate.start + gate.size] = ~mask.to(self.closed.device)

    def check_device(self) -> None:
        """ValueError where the budget is the latency of another device than config asks for."""
        if self.config.target_of == "latency":
            self.costs.check_device(self.logits.device, self.config.latency_device)

    @torch.no_grad()
    def forget(self, masks: Units) -> torch.Tensor:
        """Leaves the units of masks (name -> bool [size]) only; the others count as removed.

        Returns their indices among the units of before, int64. gatepack.remove_closed does this
        together with the model's weights.
        """
        device = self.logits.device
        kept = torch.cat([masks[name] for name in self]).nonzero().squeeze(1).to(device)
        places = kept if self._places is None else self._places.to(device)[kept]
        self.logits = nn.Parameter(self.logits[kept].clone(), self.logits.requires_grad)
        self.closed = self.closed[kept].clone()
        start = 0
        for name, gate in self.gates.items():
            gate.spec, gate.start = gate.spec.cut(masks[name]), start
            start += gate.size
        self.costs = self.costs.cut(masks)
        self._remember(places, self._whole_size)
        return kept

    def attached(self) -> dict[str, tuple[torch.Tensor, int]]:
        """name -> (which units are left of those when attached, bool; shared_size then)."""
        places = torch.arange(self._whole_size) if self._places is None else self._places.cpu()
        left = torch.zeros(self._whole_size, dtype=torch.bool).index_fill_(0, places, True)
        wholes = {name: gate.spec.whole for name, gate in self.gates.items()}
        parts = left.split([size for size, _ in wholes.values()])
        return {
            name: (part, shared)
            for (name, (_, shared)), part in zip(wholes.items(), parts, strict=True)
        }

    def recall(self, attached: Mapping[str, tuple[torch.Tensor, int]]) -> None:
        """That these gates are what forget left of others: their attached()."""
        for name, gate in self.gates.items():
            mask, shared = attached[name]
            if int(mask.sum()) != gate.size or shared < 1 or len(mask) % shared:
                raise ValueError(
                    f"attached[{name!r}]: expected {gate.size} units left, and blocks of "
                    f"{shared}, of {len(mask)}, got {int(mask.sum())}"
                )
            whole = (len(mask), shared)
            gate.spec = replace(gate.spec, attached=whole)
            self.costs.specs[name] = replace(self.costs.specs[name], attached=whole)
        left = torch.cat([attached[name][0] for name in self])
        self._remember(left.nonzero().squeeze(1), len(left))

    def _remember(self, places: torch.Tensor, whole_size: int) -> None:
        self._places, self._whole_size = places, whole_size
        self._offsets = self._sample = None
        self._value_grads = ValueGradients()
        self.costs.refresh()

    def plan(self, scores: Units, target: float | None = None, within: Units | None = None) -> Plan:
        """The units to keep; scores as in snap, the rest as in budget.plan. Closes nothing."""
        self.check_device()
        return plan(self.costs, scores, self.config, target, within=within)

    def check_target(self, masks: Units | None = None) -> float:
        """A kept fraction that meets config.target, whatever units turn out to be worth.

        masks: name -> bool [size], where only those units are left. Raises ValueError where no plan
        meets it, whichever scores it is given.
        """
        self.check_device()
        costs = self.costs if masks is None else self.costs.cut(masks)
        # Scores decide which units stay, not how many can.
        ones = {name: torch.ones(spec.size, device="cpu") for name, spec in costs.specs.items()}
        return plan(costs, ones, self.config).kept_fraction

    @torch.no_grad()
    def snap(self, scores: Units | None = None) -> float:
        """Closes the least valuable units, to meet config.target within 0.5 % of its cost.

        scores: name -> fp [size], how much each unit is worth, additive over units of all gates;
        None takes the noiseless gate values. Shapes follow width_multiple, equal_layers,
        q_per_kv_uniform and tp_divisor. Units that stay are reopened, those with a shut logit or
        closed by hand too. Returns the kept fraction; raises ValueError if no shape fits.
        """
        if scores is None:
            scores = self.split(self.deterministic_values())
        chosen = self.plan(scores)
        self.set_open(chosen.masks)
        kept = ~self.closed
        shut = kept & (self.estimator.values(self.logits) <= 0)
        if shut.any():
            # A unit that the rounding keeps must run: its gate becomes what it was just above 0.
            self.logits[shut] = self.estimator.logits_of(torch.full_like(self.logits[shut], 0.05))
        return chosen.kept_fraction

    def freeze(self) -> None:
        """Makes the gates deterministic and stops training them."""
        self.frozen = True
        self.logits.requires_grad_(False)
        self._record()

    def unfreeze(self) -> None:
        """Undoes freeze, and undoes what get_peft_model does to parameters that are not its own."""
        self.frozen = False
        self.logits.requires_grad_(True)
        self._record()

    def _record(self) -> None:
        if self.attachment is not None:
            self.attachment.record()

    def summary(self) -> GateSummary:
        """Per gate: kind, size, open and fractional units without noise; prints as a table."""
        with torch.no_grad():
            values = self.split(self.deterministic_values().cpu())
        rows = [
            (
                name,
                gate.kind,
                gate.size,
                int((values[name] > 0).sum()),
                int(((values[name] > 0) & (values[name] < 1)).sum()),
            )
            for name, gate in self.gates.items()
        ]
        fractions = self.open_fraction(), self.kept_fraction()
        return GateSummary(tuple(rows), *fractions, self.config.target_of)
