"""Stage 4, methods: the parts of the default recipe: price, close and repair; LoRA; its run."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from gatepack.calibration import Batch
from gatepack.compensation import close_and_compensate, repaired_weights
from gatepack.data import batches
from gatepack.files import parse_json, read_safetensors, write_safetensors
from gatepack.gate_training import check_shapes, load_moments, under
from gatepack.gates import GateSet
from gatepack.hf import gates_of
from gatepack.importance import calibrate, check_units, unit_scores
from gatepack.layers import GATES_NAME, hf_model, layers_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Lengths in steps and tokens, peak learning rate of AdamW, LoRA rank (alpha = rank), seed.

    The rate rises linearly over warmup_steps and falls along a cosine to 0; weight_decay is taken
    of the weights at that rate. Units are priced on calibration_batches, what stays is repaired on
    repair_batches, of which those are the first; None for as many as steps, at most 40. autocast:
    "bfloat16" runs the matmuls of training and of both in it (torch.autocast), with weights,
    gradients and AdamW in the model's dtype; None runs all in that.
    """

    steps: int = 40
    warmup_steps: int = 2
    batch_size: int = 4
    window: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    lora_rank: int = 16
    calibration_batches: int = 8
    repair_batches: int | None = None
    seed: int = 0
    autocast: str | None = None

    def __post_init__(self):
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', got {self.autocast!r}")
        for field in (
            "steps", "batch_size", "lora_rank", "calibration_batches", "repair_batches",
        ):  # fmt: skip
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be >= 1, got {value}")
        if self.window < 2:
            raise ValueError(f"window must be >= 2 tokens, got {self.window}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for field in ("seed", "warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be >= 0, got {getattr(self, field)}")

    @property
    def repaired(self) -> int:
        """Batches that the repair reads."""
        return min(self.steps, 40) if self.repair_batches is None else self.repair_batches

    def precision(self, device: torch.device) -> torch.autocast:
        """The context in which the model runs."""
        enabled = self.autocast is not None
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ..., steps - 1."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * progress))


class Interrupted(KeyboardInterrupt):
    """Training stopped on request after a whole step; everything up to it is on disk."""


def close_to_budget(
    model: nn.Module,
    windows: torch.Tensor | Sequence[Batch],
    config: TrainConfig,
    progress: Callable[[str, int, int], None] | None = None,
    target: float | None = None,
) -> float:
    """Closes a gated model down to its target and repairs it; returns the kept fraction.

    windows: training token ids [n, length], of which config's batches are drawn; or, where the loss
    is another than that of the next token, batches of what the model takes by name, labels too: the
    first calibration_batches of them price, and as many as are repaired on. progress is called with
    (phase, done, total). Units that are closed stay closed. target: a kept fraction on the way,
    where another call is to follow; if no shape meets it, or none that it leaves meets the gates'
    own, nothing closes. Raises ValueError for gates on rows and columns, without a batch, and for a
    target of the gates that is out of reach.
    """

    def reporter(phase: str, total: int):
        return None if progress is None else lambda done: progress(phase, done, total)

    gates = gates_of(model)
    check_units(gates, "close_to_budget")
    device = gates.logits.device
    chosen = windows
    if isinstance(windows, torch.Tensor):
        chosen = [{"input_ids": ids, "labels": ids} for ids in closing_batches(windows, config)]
    priced = chosen[: config.calibration_batches]
    with config.precision(device):
        moments = calibrate(model, priced, reporter("calibrating", len(priced)))
    scores = unit_scores(gates, moments, progress=reporter("pricing units", len(gates)))
    masks = _planned(gates, scores, target)
    if masks is None:
        return gates.kept_fraction()
    told = reporter("closing and repairing", len(layers_of(gates.attachment.root)))
    with config.precision(device):
        close_and_compensate(model, masks, chosen[: config.repaired], progress=told)
    return gates.kept_fraction()


def closing_batches(windows: torch.Tensor, config: TrainConfig) -> list[torch.Tensor]:
    """Those [B, length] of windows [n, length] by which close_to_budget prices and repairs."""
    count = max(config.calibration_batches, config.repaired)
    order = batches(windows, config.batch_size, count, config.seed + 1)
    return [windows[rows] for rows in order]


def _planned(
    gates: GateSet, scores: Mapping[str, torch.Tensor], target: float | None
) -> dict[str, torch.Tensor] | None:
    """The open units that stay, by name; None if a target on the way cannot be met or left."""
    masks = gates.open_masks()
    if target is None:
        return gates.plan(scores, within=masks).masks
    try:
        masks = gates.plan(scores, target, masks).masks
        gates.plan(scores, within=masks)
    except ValueError as error:
        logger.warning("closing nothing at a kept fraction of %.4f: %s", target, error)
        return None
    return masks


def add_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    """A PEFT model with LoRA on every linear of the blocks; ImportError if peft is missing."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    family = layers_of(model)[0].family
    targets = sorted({path.rpartition(".")[2] for path in family.linears})
    torch.manual_seed(config.seed)
    wrapped = get_peft_model(
        model, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
    )
    if hasattr(model, GATES_NAME):
        gates_of(model).freeze()
    return wrapped


def tune_last_layers(model: nn.Module, count: int) -> list[nn.Parameter]:
    """Lets only the last layers train, and what follows them: a norm, a pooler, the head.

    count: of layers, 0 for the head alone. A head that is tied to the embedding stays as it is.
    Gates keep their own state. Returns the parameters that train; raises ValueError for more layers
    than there are, or if nothing is left to train.
    """
    root = hf_model(model)
    layers = layers_of(root)
    if not 0 <= count <= len(layers):
        raise ValueError(f"count: expected 0 to {len(layers)} layers, got {count}")
    inside = {id(p) for layer in layers for p in layer.module.parameters()}
    last = {id(p) for layer in layers[len(layers) - count :] for p in layer.module.parameters()}
    names = [name for name, _ in root.named_modules()]
    start = names.index(layers[0].name)
    before = {id(p) for name in names[1:start] if not layers[0].name.startswith(name + ".")
              for p in root.get_submodule(name).parameters()}  # fmt: skip
    gates = getattr(root, GATES_NAME, nn.Module())
    own = {id(p) for p in gates.parameters()}
    trained = []
    for parameter in root.parameters():
        if id(parameter) not in own:
            trains = id(parameter) in last or id(parameter) not in inside | before
            parameter.requires_grad_(trains)
            trained += [parameter] if trains else []
    if not trained:
        raise ValueError("count: expected at least 1 where the head is tied to the embedding")
    return trained


class Beside(Protocol):
    """What steps beside an optimizer of the weights: a GateTraining, an ATPTraining."""

    def weights(self) -> list[nn.Parameter]: ...
    def step(self) -> None: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class FineTuning:
    """A resumable run: AdamW over a model's trainable parameters, next-token loss.

    Step i's batch depends on seed and i only, so a run that is cut off and resumed goes on as if it
    had not been. folder: where a checkpoint is kept, or None; a killed run loses what it did in the
    last save_every seconds, or longer where saving so often would take more than save_share of the
    time. Trainable parameters are saved by name, as safetensors. beside: steps once per step,
    before AdamW does, and is saved along. objective(model, ids [B, S]) -> scalar replaces the
    next-token loss in what is minimised.
    """

    save_every = 60.0
    save_share = 0.05

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        config: TrainConfig,
        folder: Path | None = None,
        *,
        beside: Beside | None = None,
        objective: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.model, self.windows, self.config, self.folder = model, windows, config, folder
        self.beside, self.objective = beside, objective or next_token_loss
        trained = model.parameters() if beside is None else beside.weights()
        trained = {id(p) for p in trained if p.requires_grad}
        self.parameters = {name: p for name, p in model.named_parameters() if id(p) in trained}
        if not self.parameters:
            raise ValueError(
                "model has no trainable parameter: add LoRA or unfreeze something first"
            )
        self.order = batches(windows, config.batch_size, config.steps, config.seed)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.losses: list[float] = []
        if folder is not None and (folder / "run.safetensors").is_file():
            self._load()

    @property
    def step(self) -> int:
        return len(self.losses)

    def run(self, on_step: Callable[["FineTuning"], None] | None = None) -> list[float]:
        """Trains to the last step, returns the losses; a first Ctrl-C saves, raises Interrupted."""
        self.model.train()
        saved, wait = time.monotonic(), self.save_every
        with _interrupt_flag() as interrupted:
            while self.step < self.config.steps:
                self._train_step()
                if on_step is not None:
                    on_step(self)
                if interrupted():
                    self.save()
                    raise Interrupted
                now = time.monotonic()
                if now - saved >= wait:
                    self.save()
                    saved = time.monotonic()
                    wait = max(self.save_every, (saved - now) / self.save_share)
        self.save()
        return self.losses

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        ids = self.windows[self.order[self.step]]
        with self.config.precision(ids.device):
            loss = self.objective(self.model, ids)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}: "
                f"lower the learning rate ({self.config.learning_rate})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.beside is not None:
            self.beside.step()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def save(self) -> None:
        """Writes the run so far, whole or not at all; does nothing without a folder."""
        if self.folder is None:
            return
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        if self.beside is not None:
            tensors |= {f"beside.{name}": t for name, t in self.beside.state_dict().items()}
        metadata = {"config": json.dumps(asdict(self.config)), "losses": json.dumps(self.losses)}
        write_safetensors(self.folder / "run.safetensors", tensors, metadata)

    def _load(self) -> None:
        path = self.folder / "run.safetensors"
        tensors, metadata = read_safetensors(path)
        again = f"remove {self.folder} to start over"
        try:
            settings, losses = (parse_json(metadata[name]) for name in ("config", "losses"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not the state of a run ({error!r}); {again}") from error
        if settings != asdict(self.config):
            raise ValueError(f"{path} belongs to a run with other settings; {again}")
        if not isinstance(losses, list) or not 0 < len(losses) <= self.config.steps:
            raise ValueError(f"{path} does not have a loss for each step done; {again}")
        shapes = {
            f"{key}.{name}": () if key == "step" else parameter.shape
            for name, parameter in self.parameters.items()
            for key in ("parameter", "step", "exp_avg", "exp_avg_sq")
        }
        try:
            check_shapes(tensors, shapes)
            if self.beside is not None:
                self.beside.load_state_dict(under("beside.", tensors))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; {again}") from error
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"parameter.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            load_moments(self.optimizer, parameter, {key: tensors[f"{key}.{name}"] for key in keys})
        self.losses = losses


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """mean of -log p(next token) over token ids [B, S], a differentiable scalar."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gated_base(gates: GateSet) -> dict[str, torch.Tensor]:
    """What close_to_budget changes, by name; the tensors themselves."""
    weights = repaired_weights(gates.attachment.root)
    return {
        "gates.logits": gates.logits.data,
        "gates.closed": gates.closed,
        **{name: weight.data for name, weight in weights.items()},
    }


@contextmanager
def _interrupt_flag():
    """Makes the first Ctrl-C a flag, so that a step is finished; a second interrupts at once."""
    seen = []

    def handle(signum, frame):
        seen.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("stopping after this step; Ctrl-C again stops at once and loses more")

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # only the main thread may set handlers
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
