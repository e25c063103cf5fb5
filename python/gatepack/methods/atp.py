"""Stage 4, methods: ATP, a network that decides what to prune while LoRA is being trained."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.calibration import Batch, frozen, inputs_of, with_labels
from gatepack.config import GateConfig
from gatepack.gate_training import check_steps, load_moments, under
from gatepack.gates import mix
from gatepack.hf import attach, refuse_clipping
from gatepack.hooks import at_work
from gatepack.layers import GATES_NAME, hf_model, layers_of
from gatepack.methods.decisions import (
    DecisionGenerator,
    budget_loss,
    gumbel_sigmoid,
    layout_of,
    straight_through,
)
from gatepack.methods.group_lasso import lasso, proximal
from gatepack.methods.masked_lora import (
    Decisions,
    mask_linears,
    merge_adapters,
    refuse_linears,
    unmask_linears,
)
from gatepack.modules import linear_shape
from gatepack.quality import input_device
from gatepack.row_column import QUERY_KEY, attach_rows_columns
from gatepack.sharding import is_sharded, over_ranks, refuse_sharded, reshard, sharding_modules

REGULARISERS = ("lasso", "proximal", "none")

# RoPE turns lanes (j, j + head_dim / 2) in these families. Those named here have a norm beside it,
# by which a lane that closes changes the others: QUERY_KEY leaves them out.
_NORMED = "qwen3 gemma3_text olmo2 olmo3 exaone4 hunyuan_v1_dense apertus".split()
ROTATED_HALVES = {*_NORMED, *(f for f, how in QUERY_KEY.items() if how == "pairs")}


@dataclass(frozen=True)
class ATP:
    """Lanes of q and k, lanes of v, and MLP channels are kept or not, as a generator decides.

    The generator's logits l become s = sigmoid((l + Gumbel + offset) / temperature) and hard
    decisions m = 1[s >= 1/2], straight-through. It steps once per optimizer step until freeze, on
    batches of its own, never on text that is scored later: the model's loss under s in eval mode,
    plus budget_weight * |log(kept / target)| under m. LoRA is trained between these steps under a
    fresh sample m, as m * (x W^T) + LoRA, so that pruned rows of W are not computed while their
    LoRA is pushed to zero: by "lasso", whose gradient is taken lasso_weight times, last_weight
    times after freeze, or "proximal", a projection after each step of strength gamma *
    proximal_rate, gamma rising to 5e4. From freeze on, m is fixed: what has the highest logits and
    costs nearest to target, with channels in multiples of width_multiple where that fits
    (final="budget", ours), or the last sample (final="sample", published).

    target: kept fraction of the weights of the blocks' linears. hard_loss: the generator's loss,
    too, is under m, straight-through, so that it sees what is packed; where a lane is closed, its
    products in q and k are 0 * 0, without a gradient. False is published. per_head: own lanes for
    each key/value head, not the same ones for all. tie_pairs: lanes j and j + head_dim / 2 of q and
    k go together, so that what is pruned is still 0 when RoPE has turned these pairs; None where it
    does (in GLM, GLM-4 and Phi it turns others, or part of the lanes), False is published. In
    either case weights and their products shrink, while attention and its cache see dense widths,
    with zeros. lora_rank, lora_dropout: of the LoRA put on every linear of the blocks, with scale 1
    and dropout between A and B; a PEFT model brings its own. proximal_rate: the learning rate of
    LoRA. Source: ATP, arXiv 2412.14426; formulas and values are those of the first version of its
    code, "proximal" of the second.
    """

    target: float = 0.6
    freeze: float = 0.5
    generator_rate: float = 1e-3
    temperature: float = 0.4
    offset: float = 3.0
    budget_weight: float = 5.0
    clip: float = 3.0
    hard_loss: bool = False
    regulariser: str = "lasso"
    lasso_weight: float = 0.03
    last_weight: float = 100.0
    proximal_rate: float = 1e-4
    final: str = "budget"
    width_multiple: int = 16
    per_head: bool = False
    tie_pairs: bool | None = None
    lora_rank: int = 8
    lora_dropout: float = 0.1
    generator_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.target < 1:
            raise ValueError(f"target: expected a kept fraction in (0, 1), got {self.target}")
        if not 0 < self.freeze <= 1:
            raise ValueError(f"freeze: expected a fraction of all steps > 0, got {self.freeze}")
        for field in ("generator_rate", "temperature", "clip"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}: expected a positive number, got {getattr(self, field)}")
        for field in ("budget_weight", "lasso_weight", "last_weight", "proximal_rate"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}: expected a number >= 0, got {getattr(self, field)}")
        for field, allowed in (("regulariser", REGULARISERS), ("final", ("budget", "sample"))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}: expected one of {allowed}, got {getattr(self, field)!r}"
                )
        for field in ("lora_rank", "width_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("lora_dropout", "generator_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"{field}: expected a number in [0, 1), got {getattr(self, field)}"
                )

    def prepare(self, model: nn.Module, batches: Iterable[Batch] = ()) -> None:
        """Puts LoRA on every linear of the blocks, in place, unless model is a PEFT model.

        Raises ValueError for linears that cannot be masked, of quantized weights or with DoRA, say,
        before anything has changed.
        """
        root = hf_model(model)
        refuse_clipping(root)
        adapted = model is not root or _has_adapters(root)
        if not adapted:
            remedy = "call prepare or start before fully_shard"
            refuse_sharded(root, "LoRA cannot be put on it", remedy)
        refuse_linears(root, adapted)
        if adapted:
            return
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("ATP needs peft: pip install peft") from error
        layers = layers_of(root)
        targets = [f"{layer.name}.{path}" for layer in layers for path in layer.family.linears]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            lora = LoraConfig(
                r=self.lora_rank, lora_alpha=self.lora_rank, lora_dropout=self.lora_dropout,
                target_modules=targets,
            )  # fmt: skip
            inject_adapter_in_model(lora, root)

    def start(self, model: nn.Module, steps: int, batches: Iterable[Batch] = ()) -> "ATPTraining":
        """The training of a model for so many optimizer steps; batches are the generator's."""
        self.prepare(model)
        return ATPTraining(model, steps, self, list(batches))


class ATPTraining:
    """Alternates with an optimizer of LoRA: step() once for each of its steps.

        training = gp.methods.ATP(target=0.6).start(model, len(loader), generator_batches)
        optimizer = torch.optim.AdamW(training.weights(), lr=1e-4)
        for batch in loader:
            model(**batch).loss.backward()
            training.step()
            optimizer.step()
            optimizer.zero_grad()
        training.finish()
        gp.pack(model)

    Noise comes from the method's seed and the step alone, so ranks decide alike, with
    DistributedDataParallel and fully_shard (start before that). The generator is not part of the
    model; state_dict holds it, its optimizer and the decisions. An earlier training
    of the same model, of a run that was interrupted, gives it up; LoRA goes on from where it is.
    """

    def __init__(self, model: nn.Module, steps: int, method: ATP, batches: list[Batch]):
        check_steps(steps)
        if not batches:
            raise ValueError("batches: expected at least one for the generator, got none")
        self.model, self.steps, self.method, self.batches = model, steps, method, batches
        self.root = hf_model(model)
        if hasattr(self.root, GATES_NAME):
            raise ValueError("model has gates: take them off with gatepack.detach(model) first")
        self.owns_adapters = model is self.root
        tied = method.tie_pairs
        if tied is None:
            tied = self.root.config.model_type in ROTATED_HALVES
        layers = layers_of(self.root)
        layout = layout_of(layers, method.per_head, tied)
        width = linear_shape(layers[0].linear(layers[0].family.out))[0]
        device = input_device(self.root)
        self.decisions = Decisions(layout, width, device)
        for earlier in at_work(self.root._forward_pre_hooks, ATPTraining):
            earlier._release()
        mask_linears(self.root, self.decisions)
        self.generator = DecisionGenerator(
            layout.layers, layout.lengths, method.generator_dropout, method.seed
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=method.generator_rate)
        self.done = 0
        self.frozen = False
        self.owes_projection = False
        self._begun = False
        self.budget_loss = torch.tensor(math.nan)
        self._handles: list = []
        self._watch()
        self._draw()

    def weights(self) -> list[nn.Parameter]:
        """The trainable parameters: LoRA, and what else the model trains."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def begin_step(self, loss_scale: float = 1.0) -> None:
        """step's first half, for loops that cannot call step before they unscale and clip.

        Called before the backward passes of an optimizer step, whose loss loss_scale multiplies.
        """
        self._check_at_work()
        if self.method.regulariser == "lasso":
            self._add_lasso(loss_scale)
        self._begun = True

    def step(self, loss_scale: float = 1.0) -> None:
        """After the backward passes of an optimizer step of LoRA, before that step.

        Adds the lasso's gradient to LoRA's, times loss_scale as theirs is, unless begin_step has;
        then the generator steps, and the next decisions are drawn.
        """
        if not self._begun:
            self.begin_step(loss_scale)
        self._begun = False
        self.done += 1
        if not self.frozen:
            self._generator_step()
            self._draw()
            if self.done >= math.ceil(self.method.freeze * self.steps):
                self._freeze()
        self.owes_projection = self.method.regulariser == "proximal"
        if sharding_modules(self.model):
            self._watch()

    def _watch(self) -> None:
        """Before every forward, also of a PEFT model; and before fully_shard gathers parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = [
            module.register_forward_pre_hook(self._project, prepend=True)
            for module in {self.root, self.model}
        ]

    def _add_lasso(self, loss_scale: float) -> None:
        reshard(self.model)
        weight = self.method.last_weight if self.frozen else self.method.lasso_weight
        factors = [p for name, p in self.root.named_parameters() if "lora_" in name]
        factors = [p for p in factors if p.requires_grad]
        with torch.enable_grad():
            value = weight * loss_scale * lasso(self.root, self.decisions)
            found = torch.autograd.grad(value, factors, allow_unused=True)
        for factor, grad in zip(factors, found, strict=True):
            if grad is not None:
                factor.grad = grad if factor.grad is None else factor.grad + grad

    def _generator_step(self) -> None:
        """One step on the loss + budget_weight * budget; no other parameter gets a gradient."""
        method = self.method
        inputs = with_labels(
            self.root, inputs_of(self.batches[self.done % len(self.batches)], self._device)
        )
        soft = self._soft(train=True)
        hard = straight_through(soft)
        budget = budget_loss(self.decisions.layout.kept_fraction(hard), method.target)
        lowered = self.decisions.autocast
        with (
            frozen(self.root),
            self.decisions.softened(hard if method.hard_loss else soft, not method.hard_loss),
            torch.autocast(self._device.type, lowered, enabled=lowered is not None),
        ):
            loss = self.model(**inputs).loss
        parameters = list(self.generator.parameters())
        found = torch.autograd.grad(loss + method.budget_weight * budget, parameters)
        for parameter, grad in zip(parameters, found, strict=True):
            parameter.grad = over_ranks(grad)
        nn.utils.clip_grad_norm_(parameters, method.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.budget_loss = budget.detach()

    @property
    def _device(self) -> torch.device:
        return self.decisions.hard.device

    def _soft(self, train: bool) -> torch.Tensor:
        """A fresh sample of soft decisions, fp32 [N]; dropout in the generator only to train it."""
        seed = mix(self.method.seed, 2 * self.done + train)
        devices = [self._device] if self._device.type == "cuda" else []
        self.generator.train(train)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            logits = self.generator()
            uniform = torch.rand(logits.shape, device=logits.device)
        return gumbel_sigmoid(logits, uniform, self.method.temperature, self.method.offset)

    @torch.no_grad()
    def _draw(self) -> None:
        self.decisions.set(self._soft(train=False) >= 0.5)

    @torch.no_grad()
    def _freeze(self) -> None:
        if self.method.final == "budget":
            self.generator.eval()
            method = self.method
            chosen = self.decisions.layout.closest(
                self.generator(), method.target, method.width_multiple
            )
            self.decisions.set(chosen.to(self._device))
        self.frozen = True

    def _project(self, *_) -> None:
        """The proximal step that the last optimizer step left to do, before anything runs."""
        if not self.owes_projection:
            return
        reshard(self.model)
        self._refuse_gathered()
        self.owes_projection = False
        rise = math.expm1(min(1.0, self.done / self.steps)) / math.expm1(1.0)
        proximal(self.root, self.decisions, 5e4 * rise * self.method.proximal_rate)

    def _refuse_gathered(self) -> None:
        """RuntimeError if fully_shard has gathered LoRA: what is written to it would be lost."""
        gathered = [n for n, p in self.root.named_parameters() if not is_sharded(p)]
        factor = next((name for name in gathered if "lora_" in name), None)
        if factor is not None and sharding_modules(self.model):
            raise RuntimeError(
                f"{factor} is whole where the model is sharded, so that the proximal step that is "
                "owed would be lost: call load_state_dict of this training after fully_shard, and "
                "leave no LoRA out of that"
            )

    def _release(self) -> None:
        """Decisions no longer act on the model; LoRA stays as it is."""
        for handle in self._handles:
            handle.remove()
        unmask_linears(self.root, self.decisions)

    def _check_at_work(self) -> None:
        if self not in at_work(self.root._forward_pre_hooks, ATPTraining):
            raise RuntimeError(
                "this training's decisions no longer act on the model: it has finished, or a newer "
                "training of ATP has begun, step and finish that"
            )

    def finish(self) -> float:
        """Fixes the decisions and turns them into closed gates on rows and columns.

        The gates act on W + BA alike, so LoRA that is left on pruned units goes with them. Adapters
        that ATP put on are merged; those of a PEFT model stay, inside the gates, and so do those of
        a model that fully_shard has changed, which cannot be packed: load its state and this
        training's into one process, and finish there. Gives the kept fraction; gatepack.pack(model)
        then removes what is closed.
        """
        if hasattr(self.root, GATES_NAME):
            return getattr(self.root, GATES_NAME).kept_fraction()
        self._check_at_work()
        if not self.frozen:
            self._freeze()
        reshard(self.model)
        self._project()
        self._release()
        config = GateConfig(units=("rows", "columns"), noise=0.0, target=self.method.target)
        sharded = bool(sharding_modules(self.model))
        if self.owns_adapters and not sharded:
            merge_adapters(self.root, self.decisions)
        # fully_shard holds on to the linears, but not to the LoRA layers around them.
        gates = attach_rows_columns(self.root, config) if sharded else attach(self.root, config)
        for place in self.decisions.layout.places:
            side = "columns" if place.rows is None else "rows"
            mask = self.decisions.hard[self.decisions.index[place.name]]
            gates.set_open({f"{place.name}:{side}": mask})
        gates.freeze()
        return gates.kept_fraction()

    def metrics(self) -> dict[str, float]:
        """What a log should say: kept fraction of the present decisions, and both losses.

        With LoRA sharded over ranks, every rank must ask.
        """
        pushed = 0.0
        if self in at_work(self.root._forward_pre_hooks, ATPTraining):
            with torch.no_grad():
                pushed = float(lasso(self.root, self.decisions))
        kept = self.decisions.layout.kept_fraction(self.decisions.hard.double())
        return {
            "gates/kept_fraction": round(float(kept), 4),
            "gates/budget_loss": round(float(self.budget_loss), 6),
            "gates/pruned_lora": round(pushed, 6),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors only: the generator, its optimizer, the decisions, and how far they are."""
        state = {f"generator.{name}": t for name, t in self.generator.state_dict().items()}
        for place, parameter in enumerate(self.generator.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                state[f"adam.{place}.{name}"] = value
        state["decisions"] = self.decisions.hard
        state["budget_loss"] = self.budget_loss.double()
        for name in ("done", "frozen", "owes_projection"):
            state[name] = torch.tensor(getattr(self, name))
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of state_dict, on a model of the same shape."""
        self.generator.load_state_dict(under("generator.", state))
        for place, parameter in enumerate(self.generator.parameters()):
            load_moments(self.optimizer, parameter, under(f"adam.{place}.", state))
        self.decisions.set(state["decisions"].to(self._device, copy=True))
        self.budget_loss = state["budget_loss"]
        self.done = int(state["done"])
        self.frozen, self.owes_projection = bool(state["frozen"]), bool(state["owes_projection"])
        self._watch()


def _has_adapters(root: nn.Module) -> bool:
    return any(hasattr(module, "lora_A") for module in root.modules())
