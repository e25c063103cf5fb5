"""Stage 4, methods: repair what closing units broke, layer by layer, by least squares."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from gatepack.calibration import Batch, inputs_of, require_batches, token_mask, token_rows
from gatepack.distillation import keep_for_teachers
from gatepack.gates import Gate, GateSet
from gatepack.hf import gates_of
from gatepack.importance import (
    DAMPING,
    damped,
    gated_inputs,
    open_lanes,
    require_ones,
    without_autocast,
)
from gatepack.layers import Layer, hf_model, layers_of
from gatepack.modules import base_linear, weight_matrix
from gatepack.quality import evaluating, input_device
from gatepack.samples import lane_indices

# Config fields that give linears of a layer a bias, by model_type, with those linears.
_ATTENTION_BIAS = {"attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj")}
_BIASES = {**_ATTENTION_BIAS, "mlp_bias": ("gate_proj", "up_proj", "down_proj")}
_WITH_BIASES = "llama granite smollm3 arcee nemotron"
_WITH_ATTENTION_BIAS = "qwen3 gemma gemma2 gemma3_text olmo cohere cohere2 hunyuan_v1_dense apertus"
_BIAS_FIELDS = {
    **dict.fromkeys(_WITH_BIASES.split(), _BIASES),
    **dict.fromkeys(_WITH_ATTENTION_BIAS.split(), _ATTENTION_BIAS),
    "seed_oss": {"attention_out_bias": ("o_proj",), "mlp_bias": _BIASES["mlp_bias"]},
    "ernie4_5": {"use_bias": (*_BIASES["attention_bias"], *_BIASES["mlp_bias"])},
    "helium": {"mlp_bias": _BIASES["mlp_bias"]},
}

# Fractions of the mean diagonal among which a repair finds the one that fits fresh text best: from
# 8,192 tokens of SmolLM2-135M 0.3 to 3 for nearly all linears. Against 0.1 for all, the recipe with
# 80 % left has a perplexity of 7.45 instead of 7.52 on MedQuAD and of 11.15 instead of 11.26 on
# BillSum (benchmarks/quality.py).
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class _Stop(Exception):
    """Ends a layer's forward once the tensor that was wanted has been seen."""


@torch.no_grad()
def close_and_compensate(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    batches: Iterable[Batch],
    damping: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Closes the units that masks leave out and repairs the linears that read them.

    Layer by layer, with the pruned layers before it: the kept columns of each out and down
    projection get W' = W + R^T X (X^T X + damping * mean(diag) * I)^-1, where X are their inputs in
    the pruned model and R is what the dense model's residual stream has and the pruned one lacks
    (Fang et al. 2023 and SlimGPT, arXiv 2412.18110, repair one layer at a time; following the dense
    stream also takes back what earlier layers lost). Where a layer does more to its stream than
    add what these linears give (BERT and Gemma 2 normalise it, Granite scales it), R is what the
    linear gave in the dense model and does not give in the pruned one. batches: token ids [B, S],
    or what the model takes by name; labels are ignored, and tokens that attention_mask leaves out
    do not count. damping: None for that of DAMPINGS which, fitted on three quarters of the batches,
    leaves least of a linear's R in the others (0.1 if there is one batch only). Writes base weights
    in place, adapters stay. Units that were closed stay so: the dense model is then the model as
    it is. progress is called with the number of layers done. Raises ValueError without a batch,
    and unless every open unit is exactly 1 and each gate has one; FloatingPointError where
    activations are not finite.
    """
    root = hf_model(model)
    gates = gates_of(model)
    require_ones(gates, "close_and_compensate")
    were = gates.open_masks()
    masks = {name: mask.cpu() & were[name] for name, mask in masks.items()}
    layers = layers_of(root)
    given = [inputs_of(batch, input_device(root)) for batch in batches]
    require_batches(len(given))
    kept = [token_mask(inputs) for inputs in given]
    keep_for_teachers(root, repaired_weights(root).values())
    with evaluating(root):
        dense, calls = _first_inputs(root, layers, given)
        pruned = [x.clone() for x in dense]
        for index, layer in enumerate(layers):
            call = calls[index]
            dense = _compensate_layer(gates, layer, masks, dense, pruned, call, kept, damping)
            if progress is not None:
                progress(index + 1)


def repaired_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base weights that close_and_compensate writes, by the names of their linears."""
    return {
        f"{layer.name}.{path}": layer.linear(path).weight
        for layer in layers_of(model)
        for path in (layer.family.out, layer.family.down)
    }


def _first_inputs(root, layers: list[Layer], batches: list[dict[str, torch.Tensor]]):
    """Hidden states entering layer 0, [B, S, D] per batch, and every layer's other arguments.

    The layers themselves do not run: each hands on what it got, in the form that layer 0 returns.
    """
    first: list[torch.Tensor] = []
    calls: list[list] = [[] for _ in layers]
    replaced = [vars(layer.module).get("forward") for layer in layers]
    output = None

    def recorder(index, forward):
        def hand_on(*args, **kwargs):
            nonlocal output
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                first.append(hidden.clone())
                output = forward(*args, **kwargs) if output is None else output
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls[index].append((args[1:], others))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hand_on

    try:
        for index, layer in enumerate(layers):
            layer.module.forward = recorder(index, layer.module.forward)
        for inputs in batches:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            root.base_model(**inputs, use_cache=False)
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            del layer.module.forward
            if forward is not None:
                layer.module.forward = forward
    return first, calls


def _compensate_layer(
    gates: GateSet, layer: Layer, masks, dense, pruned, calls, kept, damping: float | None
):
    """Advances both streams through a layer: returns the dense one, updates the pruned one."""
    out, down = (layer.module.get_submodule(path) for path in (layer.family.out, layer.family.down))
    after_out, wanted, after_layer = [], [], []
    sums = None
    for x, call in zip(dense, calls, strict=True):
        seen: dict = {}
        with _watching(out, seen, "out"), _watching(down, seen, "down"):
            after_layer.append(_run(layer, x, call))
        added = [seen[key][1].reshape(x.shape) for key in ("out", "down")]
        sums = _is_sum(after_layer[-1], x, *added) if sums is None else sums
        after_out.append(added[0])
        wanted.append(after_layer[-1] if sums else added[1])
    names = (f"{layer.heads_name}:heads", f"{layer.channels_name}:channels")
    gates.set_open({name: masks[name] for name in names if name in masks})
    _refresh(gates, pruned[0])
    inputs, residuals = [], []
    for x, was, target, call in zip(pruned, dense, after_out, calls, strict=True):
        seen = {}
        with _watching(out, seen, "out", stop=True):
            _run(layer, x, call)
        inputs.append(open_lanes(gates.gates.get(names[0]), seen["out"][0]))
        lacks = target - seen["out"][1].reshape(x.shape)
        residuals.append(lacks + (was - x) if sums else lacks)
    if names[0] in masks:
        _repair(out, gates, names[0], inputs, residuals, kept, damping)
    inputs, residuals, after_pruned = [], [], []
    for x, target, call in zip(pruned, wanted, calls, strict=True):
        seen = {}
        with _watching(down, seen, "down"):
            after_pruned.append(_run(layer, x, call))
        inputs.append(open_lanes(gates.gates.get(names[1]), seen["down"][0]))
        residuals.append(target - (after_pruned[-1] if sums else seen["down"][1].reshape(x.shape)))
    if names[1] in masks:
        change = _repair(down, gates, names[1], inputs, residuals, kept, damping)
        for i, call in enumerate(calls):
            if sums:
                with without_autocast(change):
                    added = (inputs[i].float() @ change.t()).reshape(pruned[i].shape)
                after_pruned[i] += added.to(pruned[i].dtype)
            else:
                after_pruned[i] = _run(layer, pruned[i], call)
    pruned[:] = after_pruned
    return after_layer


def _is_sum(after: torch.Tensor, before: torch.Tensor, *added: torch.Tensor) -> bool:
    """Whether a layer's stream is that before it plus what was added, up to rounding."""
    added = sum(each.float() for each in added)
    error = (after.float() - before.float() - added).norm()
    rounding = 4 * torch.finfo(after.dtype).eps * after.float().norm()
    return bool(error <= 0.01 * added.norm() + rounding)


def _refresh(gates: GateSet, hidden: torch.Tensor) -> None:
    """Makes the layer's attention and linears see the open sets just written."""
    gates.attachment.before_forward(None, (hidden,), {})


def _run(layer: Layer, x: torch.Tensor, call) -> torch.Tensor | None:
    args, kwargs = call
    try:
        output = layer.module(x, *args, **kwargs)
    except _Stop:
        return None
    return output[0] if isinstance(output, tuple) else output


class _watching:
    """Records the input and output of a linear in seen[key]; with stop, ends the forward there."""

    def __init__(self, linear: nn.Module, seen: dict, key: str, stop: bool = False):
        def hook(module, args, output):
            seen[key] = (args[0], output)
            if stop:
                raise _Stop

        self.handle = linear.register_forward_hook(hook)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()


def _repair(
    linear: nn.Module, gates: GateSet, name: str, inputs, residuals, kept, damping: float | None
) -> torch.Tensor:
    """Adds the least-squares correction to a linear's open columns; returns it, fp32 [N, |C|].

    kept: which tokens of each batch count, bool [B, S], or None for all.
    """
    inputs, residuals = (
        [token_rows(x, mask) for x, mask in zip(each, kept, strict=True)]
        for each in (inputs, residuals)
    )
    with without_autocast(inputs[0]):
        change = _least_squares(inputs, residuals, damping).t()
    if not bool(change.isfinite().all()):
        raise FloatingPointError(
            f"the repair of what {name} feeds is not finite, because activations are not: lower "
            "the learning rate, or repair in bfloat16 or float32"
        )
    lanes = gates[name].open().lanes
    matrix = weight_matrix(base_linear(linear))
    if lanes is None:
        matrix += change.to(matrix.dtype)
    else:
        matrix.index_add_(1, lanes, change.to(matrix.dtype))
    torch.clear_autocast_cache()  # which has copies of weights that train, as they were
    return change


def _least_squares(inputs, residuals, damping: float | None) -> torch.Tensor:
    """(X^T X + damping * mean(diag) * I)^-1 X^T R over all batches, fp32 [|C|, N]."""
    count = max(1, len(inputs) * 3 // 4)
    fitted = _products(inputs[:count], residuals[:count])
    if count == len(inputs):
        return _solve(*fitted, DAMPING if damping is None else damping)
    fresh = _products(inputs[count:], residuals[count:])
    if damping is None:
        damping = min(DAMPINGS, key=lambda each: _left_over(_solve(*fitted, each), *fresh))
    return _solve(*(a + b for a, b in zip(fitted, fresh, strict=True)), damping)


def _products(inputs, residuals) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T X [C, C] and X^T R [C, N], fp32, summed over batches of rows x [T, C] and r [T, N]."""
    moment = cross = None
    for x, r in zip(inputs, residuals, strict=True):
        x, r = x.float(), r.float()
        moment = x.t() @ x if moment is None else moment.addmm_(x.t(), x)
        cross = x.t() @ r if cross is None else cross.addmm_(x.t(), r)
    return moment, cross


def _solve(moment: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    return torch.linalg.solve(damped(moment, damping), cross)


def _left_over(change: torch.Tensor, moment: torch.Tensor, cross: torch.Tensor) -> float:
    """|R - X change|^2 - |R|^2, of the X and R that the products are of."""
    return float((change * (moment @ change - 2 * cross)).sum())


def check_biases(gates: GateSet) -> None:
    """ValueError if a linear that units feed has no bias and its model's config cannot give one."""
    for _, field in _without_bias(gates):
        if field is None:
            root = gates.attachment.root
            raise ValueError(
                f"{type(root).__name__} has no bias where the mean of removed units would go, and "
                "its config cannot ask for one: prune without compensation (compensate=False)"
            )


@torch.no_grad()
def add_removed_means(
    gates: GateSet, masks: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor]
) -> None:
    """b += W[:, c] E[x_c], c the lanes that masks (name -> bool [units]) leave out, E[x] = means.

    means: name -> [K] of the out or down linear that a gate's units feed. Exact where those lanes
    are constant. A linear without a bias gets one where the config can say so (Llama:
    attention_bias, mlp_bias), and with it, in all layers, the others that the field stands for,
    as zeros; so the model saves and loads like any other. Source: FLAP, arXiv 2312.11983. Raises
    ValueError as check_biases does, before anything has changed.
    """
    check_biases(gates)
    closing = {name for name, mask in masks.items() if not mask.all()}
    for gate, field in _without_bias(gates):
        if gate.name in closing:
            _switch_on(gates, field)
    for gate, linear in gated_inputs(gates):
        if gate.name not in closing:
            continue
        closed = (~masks[gate.name]).nonzero().squeeze(1)
        base = base_linear(linear)
        lanes = lane_indices(closed, gate.lanes).to(base.weight.device)
        weight = weight_matrix(base)
        wide = torch.promote_types(weight.dtype, torch.float32)
        removed = weight[:, lanes].to(wide) @ means[gate.name].to(lanes.device)[lanes].to(wide)
        base.bias.add_(removed.to(base.bias.dtype))


def _without_bias(gates: GateSet) -> list[tuple[Gate, str | None]]:
    """Gates that feed a linear without a bias, each with the config field that gives it one."""
    root = gates.attachment.root
    fields = _BIAS_FIELDS.get(root.config.model_type, {})
    found = []
    for parent, name, site in gates.attachment.sites:
        if site.in_gate is not None and base_linear(parent._modules[name]).bias is None:
            field = next((field for field, linears in fields.items() if name in linears), None)
            found.append((site.in_gate, field))
    return found


def _switch_on(gates: GateSet, field: str) -> None:
    """Sets a config field that means biases, with zeros in every linear that it stands for."""
    root = gates.attachment.root
    linears = _BIAS_FIELDS[root.config.model_type][field]
    for layer in layers_of(root):
        for path in layer.family.linears:
            linear = layer.linear(path)
            if path.rpartition(".")[2] in linears and linear.bias is None:
                zeros = linear.weight.new_zeros(linear.weight.shape[0])
                linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    setattr(root.config, field, True)
