"""Stage 4, methods: distillation from the dense model, which the gated student is part of."""

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gatepack.config import is_number
from gatepack.hooks import at_work
from gatepack.layers import GATES_NAME, hf_model, layers_of
from gatepack.quality import evaluating, forward_arguments

MATCHES = ("layers", "mlps")
LOGITS_AT_ONCE = 4 * 1024**2


@dataclass(frozen=True)
class Distillation:
    """loss = task_weight * loss + weight * KL + hidden_weight * mean of |h - g|^2 / |g|^2.

    KL = temperature^2 * mean over tokens of sum_v p_v log(p_v / q_v), p and q the softmax of the
    teacher's and the student's logits over temperature. h and g: the student's and the teacher's
    vectors [d] of each token after each layer (match="layers") or what each MLP adds ("mlps").
    Tokens that attention_mask leaves out do not count.

    teacher: a model with the same vocabulary; None: the student's own weights, with every gate at
    1 and adapters off, so that no second copy of the model is in memory. It runs in eval mode and
    without gradients, before each training forward. Sources: Hinton et al. 2015, arXiv 1503.02531;
    TinyBERT, arXiv 1909.10351.
    """

    temperature: float = 2.0
    weight: float = 1.0
    hidden_weight: float = 0.0
    match: str = "layers"
    task_weight: float = 1.0
    teacher: nn.Module | None = None

    def __post_init__(self):
        if not is_number(self.temperature) or self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature!r}")
        for field in ("weight", "hidden_weight", "task_weight"):
            value = getattr(self, field)
            if not is_number(value) or value < 0:
                raise ValueError(f"{field}: expected a number >= 0, got {value!r}")
        if self.weight == 0 and self.hidden_weight == 0:
            raise ValueError("weight and hidden_weight: expected one of them above 0, got 0 and 0")
        if self.match not in MATCHES:
            raise ValueError(f"match: expected one of {MATCHES}, got {self.match!r}")
        if not isinstance(self.teacher, nn.Module | None):
            raise ValueError(
                "teacher: expected a loaded model, or None for the student's own dense weights, "
                f"got {self.teacher!r}"
            )

    def start(self, model: nn.Module, keep: Iterable[nn.Parameter] | None = None) -> "Distilling":
        """From here on, model(...).loss of a training forward is the loss above, until stop().

            distilling = gp.Distillation(hidden_weight=1.0).start(model)
            for batch in loader:
                model(**batch).loss.backward()
                ...
            distilling.stop()

        Without labels the loss has no task part. keep: parameters whose present values are the
        teacher's, of which a copy is kept; None: those that train now and are no adapter's. Start
        before anything changes them; what close_and_compensate is about to repair is kept by
        itself. A distillation that is at work on the model stops. Raises ValueError for a model
        that lacks units of its own teacher, because they are packed.
        """
        return Distilling(model, self, keep)


class Distilling:
    """A Distillation at work on a model; see Distillation.start."""

    def __init__(
        self,
        model: nn.Module,
        method: Distillation,
        keep: Iterable[nn.Parameter] | None = None,
    ):
        self.root, self.method = hf_model(model), method
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._into: list[torch.Tensor] | None = None
        self._known: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._teaching = False
        self._losses: dict[str, torch.Tensor] = {}
        self._handles: list = []
        _check_peft(model, self.root)
        self.keep(trained(self.root) if keep is None else keep)
        if method.teacher is not None and method.hidden_weight:
            self._check_layers(hf_model(method.teacher))
        self.resume()

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps a copy of the present values of parameters as the teacher's, unless it has one."""
        if self.method.teacher is None:
            kept = {id(parameter) for parameter, _ in self._kept}
            self._kept += [(p, _copy_of(p)) for p in parameters if id(p) not in kept]

    def metrics(self) -> dict[str, float]:
        """The terms of the last loss, without their weights; waits for the device."""
        return {f"distillation/{name}": float(value) for name, value in self._losses.items()}

    def stop(self) -> None:
        """Leaves the model's loss alone again, until resume(); copies of weights stay with this."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._losses = [], {}
        self._known = self._into = None

    def resume(self) -> None:
        """Undoes stop(), with the teacher of before; another that is at work on the model stops."""
        if self._handles:
            return
        teacher = self.method.teacher
        if teacher is None:
            _check_whole(self.root)
        for other in at_work(self.root._forward_hooks, Distilling):
            other.stop()
        if self.method.hidden_weight:
            roots = [self.root] if teacher is None else [self.root, hf_model(teacher)]
            self._handles = [handle for root in roots for handle in self._listen(root)]
        self._handles += [
            self.root.register_forward_pre_hook(self._before, with_kwargs=True),
            self.root.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _listen(self, root: nn.Module) -> list:
        """Hooks that collect what the two models are compared by, in order of the layers."""

        def take(module, args, output):
            if self._into is not None:
                self._into.append(output[0] if isinstance(output, tuple) else output)

        found = []
        for layer in layers_of(root):
            # On the MLP as a whole where there is one: hooks on its parts keep it from being fused.
            family = layer.family
            path = family.mlp or family.down if self.method.match == "mlps" else ""
            found.append(layer.module.get_submodule(path).register_forward_hook(take))
        return found

    def _check_layers(self, teacher: nn.Module) -> None:
        shapes = [(len(layers_of(r)), r.config.hidden_size) for r in (teacher, self.root)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "teacher: expected as many layers of the same width as the student's "
                f"{shapes[1]} to match what is hidden, got {shapes[0]}; use hidden_weight=0"
            )

    def _before(self, module: nn.Module, args, kwargs) -> None:
        if self._teaching or not (module.training and torch.is_grad_enabled()):
            return
        self._teaching = True
        try:
            self._known = self._teach(args, kwargs)
        finally:
            self._teaching = False
        self._into = []

    @torch.no_grad()
    def _teach(self, args, kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's logits, and what is hidden in it."""
        teacher = self.method.teacher
        model = self.root if teacher is None else teacher
        left_out = ("labels", "num_items_in_batch")
        kwargs = {name: value for name, value in kwargs.items() if name not in left_out}
        if "use_cache" in forward_arguments(model):
            kwargs["use_cache"] = False
        self._into = []
        with evaluating(model), self._as_teacher() if teacher is None else nullcontext():
            logits = _logits_of(model(*args, **kwargs))
        return logits, self._into

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The root's weights as they were, with every gate at 1 and adapters off."""
        gates = getattr(self.root, GATES_NAME, None)
        present = [parameter.data for parameter, _ in self._kept]
        with ExitStack() as stack:
            if gates is not None:
                gates.attachment.bind()  # or the teacher's forward does, and adapters stay off
                stack.enter_context(gates.all_open())
            stack.enter_context(_without_adapters(self.root))
            for decisions in _decisions_of(self.root):
                ones = torch.ones(len(decisions.hard), device=decisions.hard.device)
                stack.enter_context(decisions.softened(ones))
            try:
                for parameter, dense in self._kept:
                    parameter.data = dense
                yield
            finally:
                for (parameter, _), tensor in zip(self._kept, present, strict=True):
                    parameter.data = tensor

    def _after(self, module: nn.Module, args, kwargs, output):
        if self._teaching or not (module.training and torch.is_grad_enabled()):
            return
        (teacher, dense), student, gated = self._known, _logits_of(output), self._into
        self._known = self._into = None
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher: expected logits {list(student.shape)} as the student's, got "
                f"{list(teacher.shape)}"
            )
        method = self.method
        tokens = _tokens(student, kwargs.get("attention_mask"))
        terms = {}
        if method.weight:
            terms["kl"] = divergence(student, teacher, method.temperature, tokens)
        if method.hidden_weight:
            pairs = zip(gated, dense, strict=True)
            terms["hidden"] = sum(distance(h, g, tokens) for h, g in pairs) / len(dense)
        self._losses = {name: value.detach() for name, value in terms.items()}
        weights = {"kl": method.weight, "hidden": method.hidden_weight}
        extra = sum(weights[name] * value for name, value in terms.items())
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is not None and labels is not None:
            # The Trainer adds up losses that are already divided by the tokens of all of a step.
            extra = extra * (labels != -100).sum() / items
        own = getattr(output, "loss", None)
        output["loss"] = extra if own is None else method.task_weight * own + extra
        return output


def keep_for_teachers(root: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Lets each distillation at work on a model keep parameters before they are rewritten."""
    parameters = list(parameters)
    for distilling in at_work(root._forward_hooks, Distilling):
        distilling.keep(parameters)


class _Divergence(torch.autograd.Function):
    """temperature^2 * mean of KL(softmax(teacher / T) || softmax(student / T)) over rows [n, V].

    The gradient, temperature / n * (q - p), is found on the way, so that no fp32 copy of all logits
    exists at any time; q - p is kept in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        rows = len(student)
        apart = torch.empty_like(student)
        at_once = max(1, LOGITS_AT_ONCE // max(student.shape[-1], 1))
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            q = F.log_softmax(student[part].to(wide) / temperature, -1)
            p = F.log_softmax(teacher[part].to(wide) / temperature, -1)
            total = total + (p.exp() * (p - q)).sum()
            apart[part] = q.exp() - p.exp()
        ctx.save_for_backward(apart)
        ctx.scale = temperature / max(rows, 1)
        return total * (temperature**2 / max(rows, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        (apart,) = ctx.saved_tensors
        return apart * (d_loss * ctx.scale), None, None


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """temperature^2 * mean_t sum_v p_v log(p_v / q_v), a scalar, at least fp32.

    student, teacher: logits [*, V], p and q the softmax of the teacher's and the student's over
    temperature. tokens, bool [*]: which count; None: all.
    """
    width = student.shape[-1]
    student, teacher = student.reshape(-1, width), teacher.reshape(-1, width)
    if tokens is not None:
        kept = tokens.reshape(-1)
        student, teacher = student[kept], teacher[kept]
    return _Divergence.apply(student, teacher, temperature)


def distance(
    student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """mean over tokens of |h - g|^2 / |g|^2, a scalar, at least fp32; h student's, g teacher's
    [*, d]."""
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if tokens is not None:
        student, teacher = student[tokens], teacher[tokens]
    scale = teacher.square().sum(-1).clamp(min=torch.finfo(wide).tiny)
    return ((student - teacher).square().sum(-1) / scale).mean()


def _logits_of(output) -> torch.Tensor:
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"model: expected an output with logits to distil, got a {type(output).__name__}; "
            "leave return_dict at True"
        )
    return output.logits


def _tokens(logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens count, bool [B, S], or None for all, or where logits are of whole sequences."""
    if attention_mask is None or attention_mask.shape != logits.shape[:-1]:
        return None
    return attention_mask.bool()


def _tuner_parts(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(PEFT module, what it wraps) of everything in a model that can be switched off."""
    for module in root.modules():
        if isinstance(getattr(type(module), "disable_adapters", None), property):
            yield module, getattr(module, "base_layer", None) or module.original_module


@contextmanager
def _without_adapters(root: nn.Module) -> Iterator[None]:
    """PEFT's adapters do nothing inside; afterwards they and requires_grad are as before."""
    tuners = [tuner for tuner, _ in _tuner_parts(root) if not tuner.disable_adapters]
    if any(getattr(tuner, "merged", False) for tuner in tuners):
        raise ValueError("model has merged adapters, which cannot be switched off: unmerge them")
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        for tuner in tuners:
            tuner.enable_adapters(False)
        yield
    finally:
        for tuner in tuners:
            tuner.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _decisions_of(root: nn.Module) -> list:
    """What ATP's masked linears obey, once each."""
    found = (getattr(module, "atp_decisions", None) for module in root.modules())
    return list({id(decisions): decisions for decisions in found if decisions is not None}.values())


def trained(root: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are neither an adapter's nor the gates' logits."""
    left_out = {id(p) for p in getattr(root, GATES_NAME, nn.Module()).parameters()}
    for tuner, wrapped in _tuner_parts(root):
        inside = {id(p) for p in wrapped.parameters()}
        left_out |= {id(p) for p in tuner.parameters()} - inside
    return [p for p in root.parameters() if p.requires_grad and id(p) not in left_out]


def _copy_of(parameter: nn.Parameter) -> torch.Tensor:
    if type(parameter.data) is not torch.Tensor:
        raise ValueError(
            f"keep: expected plain parameters, got a {type(parameter.data).__name__}, which is "
            "sharded: start before fully_shard, freeze it, or pass a teacher"
        )
    return parameter.detach().clone()


def _check_peft(model: nn.Module, root: nn.Module) -> None:
    """ValueError for a PEFT that calls the model's forward without its hooks (before 0.21)."""
    if model is not root and hasattr(model, "peft_config"):
        found = importlib.metadata.version("peft")
        if tuple(map(int, found.split(".")[:2])) < (0, 21):
            raise ValueError(
                f"PEFT {found} calls the model without its hooks, so nothing would be distilled: "
                'pip install "peft>=0.21"'
            )


def _check_whole(root: nn.Module) -> None:
    packed = next((n for n, m in root.named_modules() if hasattr(m, "dense_shape")), None)
    if packed is not None:
        raise ValueError(
            f"teacher: expected one, because {packed} is packed and the student no longer has all "
            "of the dense model's units"
        )
