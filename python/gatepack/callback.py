"""Stage 4, methods: any method in any transformers or TRL Trainer, without a subclass."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from gatepack.config import GateConfig
from gatepack.distillation import Distillation, trained
from gatepack.files import read_safetensors, write_safetensors
from gatepack.gate_training import GateRecipe, GateSchedule, check_shapes, under
from gatepack.layers import GATES_NAME, hf_model
from gatepack.sharding import replicated, whole

FILE = "gatepack_callback.safetensors"
BESIDE = "beside_adapters."


class GateCallback(TrainerCallback):
    """Trainer(..., callbacks=[GateCallback(GateConfig(target=0.6))]) trains gates to the budget.

    method: a GateConfig (None: the gates that the model has, or the default ones), or a method of
    gatepack.methods. It prepares the model before the Trainer's optimizer takes its parameters
    (gates, frozen weights; a one-shot method prunes), stays out of that optimizer, its weight decay
    and its clipping, and steps once per optimizer step, whatever the gradient accumulation. What it
    measures goes to the Trainer's log. Every checkpoint of the Trainer gets a file
    gatepack_callback.safetensors; a resumed run goes on bit for bit, and so does the best model of
    load_best_model_at_end: the best of all since CloseAndRepair last closed. Of a PEFT model, whose
    checkpoints hold the adapters alone, the file has what trains beside these. gatepack.pack(model)
    after training makes the model small; a one-shot method has done that already.

    schedule: of a GateConfig's gates; methods bring their own. batches: token ids [B, S] or dicts
    of what the model takes, for methods that look at text of their own. resume_from: the checkpoint
    folder to read on resume, where it is not the Trainer's own output_dir/checkpoint-<step>.
    distillation: from the dense model, in the loss that the Trainer minimises and in its log.
    """

    def __init__(
        self,
        method=None,
        schedule: GateSchedule | None = None,
        batches: Iterable = (),
        resume_from: str | Path | None = None,
        distillation: Distillation | None = None,
    ):
        if method is None or isinstance(method, GateConfig):
            method = GateRecipe(method, schedule)
        elif schedule is not None:
            raise ValueError(f"schedule: expected None with a {type(method).__name__}, got one")
        is_method = hasattr(method, "prepare") and hasattr(method, "start")
        if not is_method or isinstance(method, type):
            raise ValueError(
                f"method: expected a GateConfig or a method of gatepack.methods, got {method!r}"
            )
        if not isinstance(distillation, Distillation | None):
            raise ValueError(
                f"distillation: expected a Distillation or None, got {distillation!r}; pass "
                "gatepack.Distillation(...)"
            )
        self.method, self.batches, self.resume_from = method, list(batches), resume_from
        self.distillation, self.distilling = distillation, None
        self.training = self._prepared = self._stand_in = None
        self._beside: dict[str, nn.Parameter] = {}

    def on_init_end(self, args, state, control, model: nn.Module, **_):
        self.method.prepare(model, self.batches)
        self._prepared = hf_model(model)
        if self.distillation is not None:
            self.distilling = self.distillation.start(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._stand_in = _smallest(self._prepared)
            self._prepared.get_parameter(self._stand_in).requires_grad_(True)

    def on_train_begin(self, args, state, control, model: nn.Module, optimizer=None, **_):
        if self._prepared is not None and not any(m is self._prepared for m in model.modules()):
            raise ValueError(
                "the Trainer has another model than the one that GateCallback prepared, because "
                "model_init makes it anew: pass Trainer(model=...) in place of model_init"
            )
        logits = getattr(getattr(hf_model(model), GATES_NAME, None), "logits", None)
        groups = optimizer.param_groups if optimizer is not None else ()
        if any(parameter is logits for group in groups for parameter in group["params"]):
            raise ValueError(
                "the Trainer's optimizer already holds the gates' logits; pass GateCallback in "
                "Trainer(callbacks=[...]), or leave the logits out of your own optimizer"
            )
        if self._stand_in is not None:
            # Where only gates train: DistributedDataParallel, which has wrapped the model by now,
            # takes none without a trainable parameter. The Trainer's optimizer holds this one too,
            # but leaves alone what never gets a gradient.
            self._prepared.get_parameter(self._stand_in).requires_grad_(False)
            self._stand_in = None
        if self.distilling is not None:
            self.distilling.resume()
        folder = Path(self.resume_from or _folder(args, state))
        kept = self._state_in(folder) if state.global_step else None
        self._beside = beside_adapters(model)
        if kept is not None:
            self._load_beside(kept, folder)
        self.training = self.method.start(model, max(1, state.max_steps), self.batches)
        if state.global_step and (self.training is not None or self._beside):
            if kept is None:
                raise ValueError(
                    f"{folder / FILE} is missing: name the checkpoint that training resumes from "
                    "as GateCallback(resume_from=...)"
                )
            if self.training is not None:
                self.training.load_state_dict(kept)

    def _state_in(self, folder: Path) -> dict[str, torch.Tensor] | None:
        """What on_save kept in a checkpoint, or None; ValueError if it is another method's."""
        if not (folder / FILE).is_file():
            return None
        kept, metadata = read_safetensors(folder / FILE)
        method = type(self.method).__name__
        if metadata.get("method", method) != method:
            raise ValueError(
                f"{folder / FILE} is of a training by {metadata['method']}, not by {method}: go on "
                "with that, or pass another output_dir"
            )
        return kept

    @torch.no_grad()
    def _load_beside(self, kept: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes what on_save kept of the model into it."""
        beside = under(BESIDE, kept)
        shapes = {name: parameter.shape for name, parameter in self._beside.items()}
        check_shapes(beside, shapes, f"{folder / FILE}: {BESIDE}")
        for name, parameter in self._beside.items():
            parameter.copy_(replicated(beside[name].to(parameter.device), parameter))

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        if hasattr(self.training, "begin_step"):
            smaller = self.training.begin_step(_loss_scale(optimizer))
            if smaller:  # what was best before is no candidate for the best at this size
                state.best_metric = state.best_model_checkpoint = None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        if self.training is not None:
            self.training.step(_loss_scale(optimizer))

    def on_log(self, args, state, control, logs=None, **_):
        if logs is not None:
            ours = {}
            for source in (self.training, self.distilling):
                ours |= {} if source is None else source.metrics()
            logs.update(ours)
            state.log_history[-1].update(ours)  # the Trainer has stored its copy by now

    def on_save(self, args, state, control, **_):
        kept = {f"{BESIDE}{name}": whole(p.detach()) for name, p in self._beside.items()}
        if args.should_save and (self.training is not None or kept):
            kept |= {} if self.training is None else self.training.state_dict()
            method = {"method": type(self.method).__name__}
            write_safetensors(_folder(args, state) / FILE, kept, method)

    def on_train_end(self, args, state, control, **_):
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        kept = None if best is None else self._state_in(Path(best))
        if kept is not None:  # the Trainer has loaded the weights; of PEFT, the adapters only
            self._load_beside(kept, Path(best))
        if self.training is not None:
            if kept is not None:
                self.training.load_state_dict(kept)
            self.training.finish()
        if self.distilling is not None:
            self.distilling.stop()


def beside_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a PEFT model and is in no checkpoint of its adapters, by name."""
    root = hf_model(model)
    ours = {id(parameter) for parameter in trained(root)}
    if model is root or not ours or not hasattr(model, "peft_config"):
        return {}
    from peft import get_peft_model_state_dict

    stored = set()
    for adapter in model.peft_config:  # biases of LoraConfig(bias="all"), for one
        stored |= get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        ).keys()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in ours and name not in stored
    }


def _smallest(root: nn.Module) -> str:
    """The name of the smallest parameter that is not the gates'; of equals, the last."""
    sizes = {
        name: parameter.numel()
        for name, parameter in reversed(list(root.named_parameters()))
        if parameter.is_floating_point() and GATES_NAME not in name.split(".")
    }
    return min(sizes, key=sizes.get)


def _loss_scale(optimizer) -> float:
    """What the loss of the present step is multiplied by."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
