"""Stage 4, methods: trains gates beside any optimizer of the weights, down to a budget."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatepack.budget import meets
from gatepack.config import GateConfig, is_number
from gatepack.gates import GateSet
from gatepack.hf import attach, gates_of
from gatepack.hooks import at_work
from gatepack.layers import GATES_NAME, hf_model
from gatepack.sharding import is_sharded, over_ranks


@dataclass(frozen=True)
class GateSchedule:
    """When gates train, in fractions of all optimizer steps, and how fast.

    learning_rate: of Adam on the logits; None: 7 / steps of the way from where logits start to
    where a gate closes, and at most a fifth of it, so that gates can close in any number of steps
    (with "stg", 0.05 for 217 steps). warmup: the budget asks for nothing before it. ramp: the
    budget has reached its target by then. freeze: the gates are rounded to the target
    (GateSet.snap) and stay as they are, so that the weights heal in the steps that are left; 1
    rounds after the last step.
    """

    learning_rate: float | None = None
    warmup: float = 0.05
    ramp: float = 0.5
    freeze: float = 0.75

    def __post_init__(self):
        rate = self.learning_rate
        if rate is not None and not (is_number(rate) and rate > 0):
            raise ValueError(f"learning_rate: expected a positive number or None, got {rate!r}")
        for field in ("warmup", "ramp", "freeze"):
            value = getattr(self, field)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{field}: expected a fraction of all steps, got {value!r}")
        if not self.warmup <= self.ramp <= self.freeze:
            raise ValueError(
                f"warmup, ramp, freeze: expected ascending fractions, got {self.warmup}, "
                f"{self.ramp}, {self.freeze}"
            )

    def rate(self, gates: GateSet, steps: int) -> float:
        """The learning rate of a training of so many steps."""
        if self.learning_rate is not None:
            return self.learning_rate
        return gates.way_to_close() * min(7 / steps, 0.2)


class GateTraining:
    """Steps the gates of a model once for each optimizer step of its weights.

        gates = gp.attach(model, gp.GateConfig(target=0.6))
        training = gp.GateTraining(model, steps=len(loader))
        optimizer = torch.optim.AdamW(training.weights(), lr=1e-4)
        for batch in loader:
            model(**batch).loss.backward()
            training.step()
            optimizer.step()
            optimizer.zero_grad()
        training.finish()
        gp.pack(model)

    The gradient of the logits is taken out of `.grad` as soon as it is complete, so that clipping,
    scaling and zeroing of the weights' gradients never see it; it adds up over the backward passes
    of a step. Ranks average it, and draw the same noise; start before DistributedDataParallel wraps
    the model, which then leaves the gates alone. state_dict and load_state_dict hold everything
    about the gates: a run that is cut off and resumed goes on bit for bit. Without load_state_dict
    the schedule begins anew, on the gates as they are; an earlier training of the same gates, of a
    run that was interrupted, gives them up.

    Raises ValueError if the target cannot be met (GateSet.plan), which the rounding would find.
    """

    _rounds = True

    def __init__(self, model: nn.Module, steps: int, schedule: GateSchedule | None = None):
        check_steps(steps)
        _check_schedule(schedule)
        self.model, self.steps = model, steps
        self.schedule = GateSchedule() if schedule is None else schedule
        self.gates: GateSet = gates_of(model)
        self.gates.check_device()
        self._logits = self.gates.logits
        self._check_logits()
        if self._rounds:
            self.gates.check_target()
        self.gates.unfreeze()
        controller = self.gates.controller
        controller.state.zero_()
        controller.warmup_steps = round(self.schedule.warmup * steps)
        controller.ramp_steps = round(self.schedule.ramp * steps) - controller.warmup_steps
        _leave_out_of_ddp(model)
        rate = self.schedule.rate(self.gates, steps)
        self.optimizer = torch.optim.Adam([self.gates.logits], lr=rate)
        self.done = 0
        self.gradient: torch.Tensor | None = None
        self._watch()

    def _check_logits(self) -> None:
        """Each rank needs all logits, and those that the optimizer steps."""
        logits = self.gates.logits
        ignored = (
            "pass ignored_params={gatepack.gates_of(model).logits} to fully_shard, or to "
            f"accelerate fsdp_config={{'fsdp_version': 2, 'ignored_modules': '.*{GATES_NAME}.*'}}"
        )
        if logits.numel() != len(self.gates.closed) or is_sharded(logits):
            raise ValueError(
                f"the gates' logits are sharded over ranks, but each of them needs all: {ignored}"
            )
        if logits is not self._logits:
            raise ValueError(
                "the gates have other logits than those that this training steps: name it in "
                "gatepack.remove_closed(model, optimizer, training=...), which then goes on with "
                f"the units that are left; if FSDP put them there, {ignored}"
            )

    def _check_at_work(self) -> None:
        if self not in at_work(self._logits._post_accumulate_grad_hooks, GateTraining):
            raise RuntimeError(
                "this training no longer gets the gradient of the gates' logits: a newer "
                "GateTraining has taken them over, or they were frozen and unfrozen since; step "
                "and finish the newer one, or start one"
            )

    def weights(self) -> list[nn.Parameter]:
        """The trainable parameters other than the gates' logits."""
        logits = self.gates.logits
        return [p for p in self.model.parameters() if p.requires_grad and p is not logits]

    def _watch(self) -> None:
        self._logits = self.gates.logits
        for earlier in at_work(self._logits._post_accumulate_grad_hooks, GateTraining):
            earlier._unwatch()
        self._hook = self._logits.register_post_accumulate_grad_hook(self._take)

    def _unwatch(self) -> None:
        self._hook.remove()

    def _take(self, logits: torch.Tensor) -> None:
        self.gradient = logits.grad if self.gradient is None else self.gradient + logits.grad
        logits.grad = None

    def step(self, loss_scale: float = 1.0) -> None:
        """One step of the gates, after the backward passes of an optimizer step.

        loss_scale: what the loss was multiplied by (fp16's GradScaler.get_scale()). A gradient that
        is not finite counts as 0, as the scaler leaves out such steps of the weights.
        """
        self._check_logits()
        if not self.gates.frozen:
            self._check_at_work()
        self.done += 1
        if self.gates.frozen:
            return
        gradient, self.gradient = self.gradient, None
        (total,) = torch.autograd.grad(self._penalty(), self.gates.logits)
        if gradient is not None:
            gradient = over_ranks(gradient / loss_scale)
            total = total + torch.where(gradient.isfinite().all(), gradient, 0.0)
        self.gates.logits.grad = total
        self.optimizer.step()
        self.gates.logits.grad = None
        self.gates.step()
        if self.done >= math.ceil(self.schedule.freeze * self.steps):
            self.finish()

    def _penalty(self) -> torch.Tensor:
        """What is added to the loss of a step, a scalar."""
        return self.gates.penalty()

    def finish(self) -> float:
        """Rounds the gates to the target and freezes them; gives the kept fraction.

        Gates that were frozen and have since been loaded from before (the Trainer's
        load_best_model_at_end) are rounded again.
        """
        if not self.gates.frozen:
            self._check_at_work()
            self._round()
            self._freeze()
        elif not meets(self.gates.kept_fraction(), self.gates.config.target):
            self._round()
        return self.gates.kept_fraction()

    def check_left(self, masks: Mapping[str, torch.Tensor]) -> None:
        """ValueError if the units of masks (name -> bool [size]) cannot be rounded to the target
        any more, where that is still to come (remove_closed)."""
        if self._rounds and not self.gates.frozen:
            self.gates.check_target(masks)

    def follow(self, kept: torch.Tensor) -> None:
        """Goes on with the gates' new logits, those of before at kept, int64 (remove_closed)."""
        moments = self.optimizer.state.pop(self._logits, {})
        frozen = self.gates.frozen
        self._unwatch()
        self._logits = self.gates.logits
        self.optimizer.param_groups[0]["params"] = [self._logits]
        self.optimizer.state[self._logits] = {
            name: value[kept] if value.dim() else value for name, value in moments.items()
        }
        if self.gradient is not None:
            self.gradient = self.gradient[kept]
        if not frozen:
            self._watch()

    def _worth(self) -> dict[str, torch.Tensor]:
        """What each unit is worth to the rounding, as GateSet.snap takes it."""
        # Not the values: many are exactly 1, and say nothing about which of them to keep.
        worth = self.gates.estimator.open_probability(self.gates.logits.detach())
        return self.gates.split(worth.masked_fill(self.gates.closed, 0.0))

    def _round(self) -> None:
        if self._rounds:
            self.gates.snap(self._worth())

    def metrics(self) -> dict[str, float]:
        """What a log should say of the gates now."""
        return {
            "gates/open_fraction": round(self.gates.open_fraction(), 4),
            "gates/kept_fraction": round(self.gates.kept_fraction(), 4),
        }

    def _freeze(self) -> None:
        self.gates.freeze()
        self._unwatch()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only: the gates, Adam's moments, and how many steps are done."""
        state = {f"gates.{name}": t for name, t in self.gates.state_dict().items()}
        moments = self.optimizer.state.get(self.gates.logits, {})
        state |= {f"adam.{name}": value for name, value in moments.items()}
        state["done"] = torch.tensor(self.done)
        state["frozen"] = torch.tensor(self.gates.frozen)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of state_dict, on a model with the same gates."""
        self.gates.load_state_dict(under("gates.", state))
        load_moments(self.optimizer, self.gates.logits, under("adam.", state))
        self.gradient = None
        self.done = int(state["done"])
        if bool(state["frozen"]):
            self._freeze()
        elif self.gates.frozen:
            self.gates.unfreeze()
            self._watch()


def _leave_out_of_ddp(model: nn.Module) -> None:
    """DDP would wait for the gradient of the logits, which is taken away and ends when they freeze:
    what shares their bucket would then stay unreduced, in silence."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, _ in tensors if GATES_NAME in name.split(".")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@dataclass(frozen=True)
class GateRecipe:
    """gatepack's own method: gates of config, or those that a model has, trained by GateTraining.

    Like every method it has prepare, which changes a model before an optimizer takes its
    parameters, and start, which returns what steps beside that optimizer.
    """

    config: GateConfig | None = None
    schedule: GateSchedule | None = None

    def __post_init__(self):
        _check_schedule(self.schedule)

    def prepare(self, model: nn.Module, batches: Iterable = ()) -> None:
        """Attaches the gates unless the model has these already; their logits wait for start."""
        if not hasattr(hf_model(model), GATES_NAME):
            attach(model, self.config)
        elif self.config is not None and gates_of(model).config != self.config:
            raise ValueError(
                f"config: the model already has gates with {gates_of(model).config}, got "
                f"{self.config}; pass None to train those, or gatepack.detach(model) first"
            )
        gates_of(model).logits.requires_grad_(False)

    def start(self, model: nn.Module, steps: int, batches: Iterable = ()) -> GateTraining:
        """The training of a prepared model for so many optimizer steps."""
        return GateTraining(model, steps, self.schedule)


def check_steps(steps: int) -> None:
    """ValueError unless a training has a whole number of steps, at least one."""
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")


def _check_schedule(schedule: GateSchedule | None) -> None:
    if not isinstance(schedule, GateSchedule | None):
        raise ValueError(
            f"schedule: expected a GateSchedule or None, got {schedule!r}; pass "
            "gatepack.GateSchedule(...)"
        )


def check_shapes(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], where: str = ""
) -> None:
    """ValueError for the first tensor that is missing or of another shape than expected."""
    for name, shape in expected.items():
        if name not in found or found[name].shape != tuple(shape):
            got = list(found[name].shape) if name in found else None
            raise ValueError(f"{where}{name} must be {list(shape)}, got {got}")


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def load_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, torch.Tensor]
) -> None:
    """Gives Adam a copy of a parameter's state, beside it but for `step`; none if it is empty."""
    optimizer.state.pop(parameter, None)
    if state:
        optimizer.state[parameter] = {
            name: t.clone() if name == "step" else t.to(parameter.device, copy=True)
            for name, t in state.items()
        }
