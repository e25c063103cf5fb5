"""Stage 4, methods: gatepack's recipe beside any loss: price, close, repair, and train on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from gatepack.budget import meets
from gatepack.calibration import Batch, check_batches
from gatepack.compensation import repaired_weights
from gatepack.config import GateConfig, is_number
from gatepack.distillation import keep_for_teachers
from gatepack.gate_training import check_shapes, check_steps
from gatepack.gates import GateSet
from gatepack.hf import attach, detach, gates_of
from gatepack.hooks import at_work
from gatepack.importance import NEW_GATES, check_units
from gatepack.layers import GATES_NAME, hf_model
from gatepack.methods.one_shot import UNEVEN
from gatepack.progress import Log
from gatepack.sharding import from_first_rank, has_ranks, refuse_sharded
from gatepack.training import TrainConfig, close_to_budget, gated_base

_SHARDED = (
    "linears cannot be repaired",
    "close before fully_shard, with gatepack.training.close_to_budget",
)


@dataclass(frozen=True)
class CloseAndRepair:
    """The recipe of `gatepack train`, beside a training by any loss and any optimizer.

    Gates are fixed but for the fractions of all steps that `close` names. There, before a forward,
    the loss of the first calibration_batches of `batches` prices the open heads and channels, those
    that are worth least close, repair_batches of them repair the linears that read what closes
    (gatepack.training.close_to_budget), and the training goes on with what is open. Several
    fractions go to the target in equal parts of what is removed.

    gates: used where the model has none yet: target, shapes and targets. close: one or several; a
    new head has to learn before its loss can price: (0.4,) for one. repair_batches: None for all.
    batches, of start or GateCallback: what the model takes, labels too, or token ids [B, S] of a
    causal language model; the same on all ranks, of which the first decides. autocast: that of
    TrainConfig. bars: whether pricing and repair show how far they are.
    """

    gates: GateConfig = UNEVEN
    close: tuple[float, ...] = (0.2, 0.5)
    calibration_batches: int = 8
    repair_batches: int | None = None
    autocast: str | None = None
    bars: bool = True

    def __post_init__(self):
        if not isinstance(self.gates, GateConfig):
            raise ValueError(f"gates: expected a GateConfig, got {self.gates!r}")
        close = tuple(self.close) if isinstance(self.close, list | tuple) else (self.close,)
        if not close or not all(is_number(each) and 0 <= each <= 1 for each in close):
            raise ValueError(
                f"close: expected fractions of all steps in [0, 1], got {self.close!r}"
            )
        object.__setattr__(self, "close", tuple(sorted(map(float, close))))
        self.settings(1)

    def settings(self, batches: int) -> TrainConfig:
        """How close_to_budget prices and repairs on so many batches."""
        return TrainConfig(
            calibration_batches=self.calibration_batches,
            repair_batches=batches if self.repair_batches is None else self.repair_batches,
            autocast=self.autocast,
        )

    def prepare(self, model: nn.Module, batches: Iterable[Batch] = ()) -> None:
        """Attaches the gates, open and frozen, unless the model has some.

        Raises ValueError without batches of what the model takes, for gates on rows and columns,
        for a sharded model, and for a target that no shape of the model meets; then the model is as
        it was.
        """
        root = hf_model(model)
        check_batches(list(batches))
        refuse_sharded(root, *_SHARDED)
        given = hasattr(root, GATES_NAME)
        gates = gates_of(model) if given else attach(model, self.gates)
        try:
            check_units(gates, "CloseAndRepair")
            gates.check_target()
        except ValueError:
            if not given:
                detach(model)
            raise
        gates.freeze()

    def start(
        self,
        model: nn.Module,
        steps: int,
        batches: Iterable[Batch] = (),
        log: Log | None = None,
    ) -> "Closing":
        """What closes the gates of a model in a training of so many optimizer steps.

        log: for the bars; None for text on the first rank, if there are to be any.
        """
        batches = list(batches)
        self.prepare(model, batches)
        if log is None:
            first = not has_ranks() or dist.get_rank() == 0
            log = Log("text" if self.bars and first else "quiet")
        return Closing(model, steps, self, batches, log)


class Closing:
    """A CloseAndRepair at work beside an optimizer of weights(), in the loop of GateTraining.

    A closing itself is done by the first training forward after its step, or by begin_step. An
    earlier one at work on the model, of a run that was interrupted, stops. What the gates keep says
    how many closings the model has behind it.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        method: CloseAndRepair,
        batches: list[Batch],
        log: Log,
    ):
        check_steps(steps)
        self.model, self.method, self.batches, self.log = model, method, batches, log
        self.root = hf_model(model)
        self.gates: GateSet = gates_of(model)
        self.due = [round(fraction * steps) for fraction in method.close]
        self.done, self.closings, self._hooks = 0, self._behind(), []
        for earlier in at_work(self.root._forward_pre_hooks, Closing):
            earlier._unwatch()
        self._watch()

    def _target(self, closings: int) -> float:
        """The kept fraction to which so many closings lead."""
        return 1 - (1 - self.gates.config.target) * closings / len(self.due)

    def _behind(self) -> int:
        """How many closings the model has behind it, by what its gates keep."""
        if bool((self.gates.deterministic_values() == 1).all()):
            return 0
        kept = self.gates.kept_fraction()
        for closings in range(1, len(self.due) + 1):
            if meets(kept, self._target(closings)):
                return closings
        raise ValueError(
            "CloseAndRepair needs every gate open and exactly 1, or as one of its closings leaves "
            f"it, and these keep {kept:.1%}: resume with the settings of before, load the model "
            f"anew if a closing was interrupted, or {NEW_GATES}"
        )

    def _watch(self) -> None:
        """Looks at every forward, also of a PEFT model, for as long as a closing is to come."""
        self._unwatch()
        if not self.closed:
            self._hooks = [
                module.register_forward_pre_hook(self._before, prepend=True)
                for module in {self.root, self.model}
            ]

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args) -> None:
        if module.training:
            self.begin_step()

    def weights(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def closed(self) -> bool:
        """Whether the last closing is done."""
        return self.closings == len(self.due)

    def begin_step(self, loss_scale: float = 1.0) -> bool:
        """Closes and repairs if that is due, before the forwards of an optimizer step; whether."""
        due = self._due()
        closes = due > self.closings
        if closes:
            self._close(due)
        return closes

    def step(self, loss_scale: float = 1.0) -> None:
        """Counts one optimizer step. RuntimeError if a closing that was due has not been done."""
        if self._due() > self.closings:
            raise RuntimeError(
                "gates are due to close, but no forward in training mode has run: call "
                "model.train() before training, or begin_step() before each forward"
            )
        self.done += 1

    def _due(self) -> int:
        """How many closings should be done by now."""
        return sum(step <= self.done for step in self.due)

    def _close(self, closings: int) -> None:
        """To where so many closings lead."""
        refuse_sharded(self.root, *_SHARDED)
        self._unwatch()
        target = None if closings == len(self.due) else self._target(closings)
        try:
            with self.log.phases() as progress:
                settings = self.method.settings(len(self.batches))
                close_to_budget(self.model, self.batches, settings, progress, target)
            from_first_rank(gated_base(self.gates).values())
            self.gates.sync_from_buffers()
            self.closings = closings
        finally:
            self._watch()

    def finish(self) -> float:
        """Closes and repairs if training ended before that; gives the kept fraction.

        Also where weights of before it have been loaded since (load_best_model_at_end).
        """
        if not meets(self.gates.kept_fraction(), self.gates.config.target):
            self._close(len(self.due))
        self._unwatch()
        return self.gates.kept_fraction()

    def check_left(self, masks: Mapping[str, torch.Tensor]) -> None:
        """ValueError if a closing that is to come could not meet the target with the units of
        masks (name -> bool [size]) only (gatepack.remove_closed)."""
        if not self.closed:
            self.gates.check_target(masks)

    def metrics(self) -> dict[str, float]:
        """What a log should say of the gates now."""
        return {"gates/kept_fraction": round(self.gates.kept_fraction(), 4)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only: how many steps and closings are done, the gates and the repaired weights.

        Those that train are left to whoever saves the model.
        """
        state = {"done": torch.tensor(self.done), "closings": torch.tensor(self.closings)}
        if self.closings:
            state |= {f"closed.{name}": t for name, t in self._fixed().items()}
        return state

    def _fixed(self) -> dict[str, torch.Tensor]:
        """Of what the closing changes, that which does not train."""
        trained = {name for name, w in repaired_weights(self.root).items() if w.requires_grad}
        base = gated_base(self.gates)
        return {name: tensor for name, tensor in base.items() if name not in trained}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of state_dict, on a model with the same gates and trainable parameters.

        Raises ValueError for tensors that are missing or of another shape, and for a state of
        before the first closing on a model that has it behind it; then nothing has changed.
        """
        check_shapes(state, {"done": (), "closings": ()}, "state: ")
        closings = int(state["closings"])
        if not 0 <= closings <= len(self.due):
            raise ValueError(f"state: closings must be 0 to {len(self.due)}, got {closings}")
        closed = {f"closed.{name}": t for name, t in self._fixed().items()} if closings else {}
        check_shapes(state, {name: tensor.shape for name, tensor in closed.items()}, "state: ")
        if self.closings and not closings:
            raise ValueError(
                "state: is of before the gates closed, but this model's gates are closed and its "
                "weights repaired: load the model anew"
            )
        if closed:
            keep_for_teachers(self.root, repaired_weights(self.root).values())
        for name, tensor in closed.items():
            tensor.copy_(state[name])
        self.gates.sync_from_buffers()
        self.done, self.closings = int(state["done"]), closings
        self._watch()
