"""Stage 4, methods: gatepack's recipe beside any loss: price, close and repair once, then heal."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from gatepack.budget import meets
from gatepack.calibration import Batch, require_batches
from gatepack.compensation import require_open
from gatepack.config import GateConfig, is_number
from gatepack.gate_training import check_steps, under
from gatepack.gates import GateSet
from gatepack.hf import attach, detach, gates_of
from gatepack.hooks import at_work
from gatepack.layers import GATES_NAME, hf_model
from gatepack.methods.one_shot import UNEVEN, check_units
from gatepack.progress import Log
from gatepack.sharding import from_first_rank, has_ranks, refuse_sharded
from gatepack.training import TrainConfig, close_to_budget, gated_base, repaired_weights

_SHARDED = (
    "linears cannot be repaired",
    "close before fully_shard, with gatepack.training.close_to_budget",
)


@dataclass(frozen=True)
class CloseAndRepair:
    """The recipe of `gatepack train`, at one step of a training by any loss and any optimizer.

    Gates stay open and fixed for the first `close` of the steps. Then, before a forward, the loss
    of the first calibration_batches of `batches` prices heads and channels, those that are worth
    least close down to the target, all of the batches repair the linears that read them
    (gatepack.training.close_to_budget), and the training goes on with what is open.

    gates: used where the model has none yet: target, shapes and targets. close: 0 for a model that
    knows its task; a new head has to learn before its loss can price, 0.4 of the steps for one.
    batches, of start or GateCallback: what the model takes, labels too, or token ids [B, S] of a
    causal language model; the same on all ranks, of which the first decides. autocast: that of
    TrainConfig. bars: whether pricing and repair show how far they are.
    """

    gates: GateConfig = UNEVEN
    close: float = 0.0
    calibration_batches: int = 8
    autocast: str | None = None
    bars: bool = True

    def __post_init__(self):
        if not is_number(self.close) or not 0 <= self.close <= 1:
            raise ValueError(f"close: expected a fraction of all steps, got {self.close!r}")
        self.settings(1)

    def settings(self, batches: int) -> TrainConfig:
        """How close_to_budget prices and repairs on so many batches."""
        return TrainConfig(
            calibration_batches=self.calibration_batches,
            repair_batches=batches,
            autocast=self.autocast,
        )

    def prepare(self, model: nn.Module, batches: Iterable[Batch] = ()) -> None:
        """Attaches the gates, open and frozen, unless the model has some.

        Raises ValueError without a batch, for gates on rows and columns, for a sharded model, and
        for a target that no shape of the model meets; then the model is as it was.
        """
        root = hf_model(model)
        require_batches(len(list(batches)))
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

    def start(self, model: nn.Module, steps: int, batches: Iterable[Batch] = ()) -> "Closing":
        """What closes the gates of a model in a training of so many optimizer steps."""
        batches = list(batches)
        self.prepare(model, batches)
        return Closing(model, steps, self, batches)

    def rewrites(self, model: nn.Module) -> list[nn.Parameter]:
        """The weights that the repair changes, whether they train or not."""
        return list(repaired_weights(hf_model(model)).values())


class Closing:
    """A CloseAndRepair at work beside an optimizer of weights(), in the loop of GateTraining.

    The closing itself is done by the first training forward after its step, or by begin_step. An
    earlier one at work on the model, of a run that was interrupted, stops. A model whose gates meet
    the target has it behind it.
    """

    def __init__(self, model: nn.Module, steps: int, method: CloseAndRepair, batches: list[Batch]):
        check_steps(steps)
        self.model, self.method, self.batches = model, method, batches
        self.root = hf_model(model)
        self.gates: GateSet = gates_of(model)
        self.due = round(method.close * steps)
        self.done = 0
        self.closed = meets(self.gates.kept_fraction(), self.gates.config.target)
        if not self.closed:
            require_open(self.gates, "CloseAndRepair")
        for earlier in at_work(self.root._forward_pre_hooks, Closing):
            earlier._hook.remove()
        self._hook = self.root.register_forward_pre_hook(self._before, prepend=True)

    def _before(self, module: nn.Module, args) -> None:
        if module.training:
            self.begin_step()

    def weights(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def begin_step(self, loss_scale: float = 1.0) -> None:
        """Closes and repairs if that is due, before the forwards of an optimizer step."""
        if not self.closed and self.done >= self.due:
            self._close()

    def step(self, loss_scale: float = 1.0) -> None:
        """Counts one optimizer step."""
        self.done += 1

    def _close(self) -> None:
        refuse_sharded(self.root, *_SHARDED)
        self._hook.remove()
        first = not has_ranks() or dist.get_rank() == 0
        log = Log("text" if self.method.bars and first else "quiet")
        with log.phases() as progress:
            settings = self.method.settings(len(self.batches))
            close_to_budget(self.model, self.batches, settings, progress)
        from_first_rank(gated_base(self.gates).values())
        self.gates.sync_from_buffers()
        self.closed = True

    def finish(self) -> float:
        """Closes and repairs if training ended before that; gives the kept fraction.

        Also where weights of before it have been loaded since (load_best_model_at_end).
        """
        if not meets(self.gates.kept_fraction(), self.gates.config.target):
            self._close()
        self._hook.remove()
        return self.gates.kept_fraction()

    def metrics(self) -> dict[str, float]:
        """What a log should say of the gates now."""
        return {"gates/kept_fraction": round(self.gates.kept_fraction(), 4)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only: how many steps are done and, once closed, the gates and repaired weights.

        Those that train are left to whoever saves the model.
        """
        state = {"done": torch.tensor(self.done)}
        if self.closed:
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

        Raises ValueError for a state of before the closing on a model that has it behind it.
        """
        closed = under("closed.", state)
        if closed:
            for name, tensor in self._fixed().items():
                tensor.copy_(closed[name])
            self.gates.sync_from_buffers()
            self._hook.remove()
        elif self.closed:
            raise ValueError(
                "state: is of before the gates closed, but this model's gates are closed and its "
                "weights repaired: load the model anew"
            )
        self.done, self.closed = int(state["done"]), bool(closed)
