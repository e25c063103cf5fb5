"""Stage 3, modules: attach gates to a Hugging Face model by swapping children, and detach."""

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import Cache

import gatepack.attention  # noqa: F401  registers attn_implementation="gatepack"
from gatepack.budget import Costs, gate_cost
from gatepack.config import GateConfig
from gatepack.families import Family, family_of
from gatepack.functional import sampled_values
from gatepack.gates import Gate, GateSet, GateSpec
from gatepack.latency import LatencyCosts, LatencyTable
from gatepack.masks import decode_mask
from gatepack.mlp import GatedMLP, ungate_mlp
from gatepack.modules import (
    base_linear,
    gate_linear,
    is_gated,
    linear_shape,
    most_in_place,
    ungate_linear,
)
from gatepack.paths import choose_path, has_kernels
from gatepack.samples import Sample
from gatepack.sharding import refuse_sharded
from gatepack.sites import RowBlock, Site

GATES_NAME = "gatepack_gates"


@dataclass(frozen=True)
class Layer:
    """One decoder or encoder layer: its name in the model, the module, and its sizes."""

    name: str
    module: nn.Module
    family: Family
    head_dim: int

    def linear(self, path: str) -> nn.Module:
        return base_linear(self.module.get_submodule(path))

    @property
    def queries(self) -> int:
        return linear_shape(self.linear(self.family.out))[1] // self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.family.qkv:
            return self.queries
        return linear_shape(self.linear(self.family.kv[0]))[0] // self.head_dim

    @property
    def heads_name(self) -> str:
        return f"{self.name}.{self.family.attention}"

    @property
    def channels_name(self) -> str:
        return f"{self.name}.{self.family.mlp}" if self.family.mlp else self.name


def hf_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself; else ValueError."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(getattr(inner, "config", None), "model_type"):
        raise ValueError(
            "model must be a transformers model or a PEFT model around one, got "
            f"{type(model).__name__}"
        )
    return inner


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a transformers model that have every linear of its family."""
    family = family_of(model.config)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [
        Layer(name, module, family, head_dim)
        for name, module in model.named_modules()
        if name and all(_has_path(module, path) for path in (family.attention, *family.linears))
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with the linears of family {family}")
    return layers


def _has_path(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return True


class Attachment:
    """What attach changed, kept up to date while the model runs.

    Before each forward of the model's trunk it gates linears that were wrapped or replaced since
    (get_peft_model after attach), draws the sample of this forward, chooses its path, and writes
    the running head counts to the attention modules. After it, a cache keeps the paths and the
    noise that its keys and values are of, with which a forward goes on. Gradient checkpointing runs
    layers again as they ran in their own forward, whatever ran since.
    """

    def __init__(self, root: nn.Module, gates: GateSet):
        self.root = root
        self.gates = gates
        self.sites: list[tuple[nn.Module, str, Site]] = []
        self.mlps: list[tuple[nn.Module, str]] = []
        self.attentions: list[tuple[nn.Module, Family, Gate]] = []
        self.gated: dict[str, tuple[nn.Module, str, Site]] = {}  # gate -> a site of it
        self.handles: list = []
        self.runners: list[nn.Module] = []  # of layers, which gradient checkpointing may call

    def watch(self, layers: list[Layer]) -> None:
        """Puts the gates on the model, in front of every forward of its layers."""
        # The module that runs the layers, not the model: some heads call the decoder inside the
        # base model directly.
        trunk = self.root.get_submodule(".".join(layers[0].name.split(".")[:-2]))
        self.handles = [
            trunk.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            trunk.register_forward_hook(self.after_forward, with_kwargs=True),
        ]
        self.runners = [trunk, *(layer.module for layer in layers)]
        self.gated = {place[2].gate.name: place for place in self.sites}
        self.gates.attachment = self
        self.root.add_module(GATES_NAME, self.gates)
        self.root.config.gatepack = {
            **(getattr(self.root.config, "gatepack", None) or {}),
            "gates": self.gates.config.to_dict(),
        }

    def add_site(self, layer: Layer, path: str, site: Site) -> None:
        parent_path, _, name = path.rpartition(".")
        self.sites.append((layer.module.get_submodule(parent_path), name, site))

    def bind(self) -> None:
        """Makes every site's child a gated linear, whatever wraps it by now."""
        for parent, name, site in self.sites:
            child = parent._modules[name]
            if is_gated(child):
                continue
            wrapper = child
            while hasattr(wrapper, "base_layer"):
                if is_gated(wrapper.base_layer):
                    wrapper.base_layer = ungate_linear(wrapper.base_layer)
                wrapper = wrapper.base_layer
            setattr(parent, name, gate_linear(child, site))

    def before_forward(self, module: nn.Module, args, kwargs) -> None:
        self.bind()
        self._wrap_checkpointing()
        self.gates.sampler = sampled_values if has_kernels(self.gates.logits.device) else None
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        if filled and hasattr(cache, "gatepack_draw"):
            self.gates._drawn(cache.gatepack_draw)
        else:
            self.gates.draw()
        self._choose_paths(_tokens(args, kwargs))
        if filled:
            # Closed heads have keys and values at full width only, and so has a cache that no gated
            # forward filled.
            paths = getattr(cache, "gatepack_paths", {})
            names = [gate.name for _, _, gate in self.attentions]
            self.gates.paths |= {name: paths.get(name, "dense") for name in names}
        for attention, family, gate in self.attentions:
            if gate.path != "folded":
                _set_dense_head_counts(attention, family, gate)
                continue
            current = gate.open()
            ragged = current.shared_of_unit is not None
            blocks = current.count if ragged else current.shared_count
            set_head_counts(attention, family, current.count, blocks, gate.lanes)

    def after_forward(self, module: nn.Module, args, kwargs, output) -> None:
        # Attributes, not a table of caches: a copy of a prompt's cache takes them along.
        results = output.values() if isinstance(output, dict) else output
        for value in (*kwargs.values(), *results):
            if isinstance(value, Cache):
                value.gatepack_paths = self.gates.paths
                value.gatepack_draw = self.gates.sample().number

    def _choose_paths(self, tokens: int) -> None:
        """The path of every gate."""
        gates, device = self.gates, self.gates.logits.device
        path_of = functools.cache(functools.partial(choose_path, tokens, gates.width, device))
        gates.paths = {
            name: path_of(site.kept(device), most_in_place(parent._modules[child])).path
            for name, (parent, child, site) in self.gated.items()
        }

    def _wrap_checkpointing(self) -> None:
        """Puts _checkpointed around every checkpoint function that transformers has set since."""
        for module in self.runners:
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and not self._is_wrapped(function):
                inside = set(module.modules())
                places = [
                    (attention, attribute)
                    for attention, family, _ in self.attentions
                    for attribute, _ in family.head_attributes
                    if attention in inside
                ]
                module._gradient_checkpointing_func = functools.partial(
                    self._checkpointed, function, places
                )

    def _is_wrapped(self, function: Callable) -> bool:
        return isinstance(function, functools.partial) and function.func == self._checkpointed

    def _checkpointed(self, checkpoint: Callable, places: list, layer: Callable, *args, **kwargs):
        """checkpoint(layer, *args): the layer runs with the gates of this forward in backward too,
        where those of later forwards are current."""
        gates = self.gates
        sample, paths, counts = gates.sample(), gates.paths, _head_counts(places)
        trains = torch.is_grad_enabled() and sample.flat.requires_grad
        if "folded" in paths.values():
            # Not in the layer that asks first: run again, it would save less than it did.
            sample.open(sample.gates[0])

        def run(*args, **kwargs):
            if trains and not torch.is_grad_enabled():
                raise ValueError(
                    "gradient checkpointing: expected use_reentrant=False, because all layers "
                    "share the gates and their graph; call gradient_checkpointing_enable("
                    'gradient_checkpointing_kwargs={"use_reentrant": False}), or '
                    "gates.freeze() if the gates are meant to stay as they are"
                )
            with self._restored(sample, paths, counts):
                return layer(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    @contextmanager
    def _restored(self, sample: Sample, paths: dict[str, str], counts: list) -> Iterator[None]:
        """Inside, the gates and head counts of an earlier forward."""
        gates = self.gates
        before, counts_before = (gates.pinned, gates.paths), _head_counts(counts)
        gates.pinned, gates.paths = sample, paths
        _write_head_counts(counts)
        try:
            yield
        finally:
            gates.pinned, gates.paths = before
            _write_head_counts(counts_before)

    def renew(self, layers: list[Layer]) -> None:
        """Gates the linears of a model anew, after release and with gates of other sizes."""
        self.attentions = []
        for layer in layers:
            _add_sites(self, layer)
        self.bind()
        self.watch(layers)

    def release(self) -> None:
        """Puts the plain modules back."""
        self.bind()
        for handle in self.handles:
            handle.remove()
        for module in self.runners:
            function = vars(module).get("_gradient_checkpointing_func")
            if self._is_wrapped(function):
                module._gradient_checkpointing_func = function.args[0]
        for parent, name, _ in self.sites:
            child = parent._modules[name]
            if is_gated(child):
                setattr(parent, name, ungate_linear(child))
        for parent, name in self.mlps:
            setattr(parent, name, ungate_mlp(parent._modules[name]))
        # They hold the gated modules, and those the dense weights, for as long as gates are kept.
        self.sites, self.mlps, self.gated, self.runners = [], [], {}, []
        for attention, family, gate in self.attentions:
            _set_dense_head_counts(attention, family, gate)
            del attention.gatepack_heads


def _tokens(args, kwargs) -> int:
    """Tokens of a call of a trunk: its first tensor holds ids [B, T] or hidden states [B, T, d]."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
    first = next((value for value in (*args, *named) if isinstance(value, torch.Tensor)), None)
    if first is None:
        return 0
    return first.numel() // (first.shape[-1] if first.is_floating_point() else 1)


def set_head_counts(
    attention: nn.Module, family: Family, queries: int, kv_heads: int, head_dim: int
) -> None:
    """Writes head counts to the attributes that the family's attention reads."""
    values = {"queries": queries, "groups": queries // kv_heads, "width": queries * head_dim}
    _write_head_counts([(attention, name, values[what]) for name, what in family.head_attributes])


def _head_counts(places: Iterable[tuple]) -> list[tuple[nn.Module, str, int]]:
    """(attention, attribute, its value) at each place (attention, attribute, ...)."""
    return [(attention, name, getattr(attention, name)) for attention, name, *_ in places]


def _write_head_counts(counts: list[tuple[nn.Module, str, int]]) -> None:
    for attention, name, count in counts:
        if getattr(attention, name) != count:
            setattr(attention, name, count)


def _set_dense_head_counts(attention: nn.Module, family: Family, gate: Gate) -> None:
    blocks = gate.size // gate.spec.shared_size
    set_head_counts(attention, family, gate.size, blocks, gate.lanes)


def attach(model: nn.Module, config: GateConfig | None = None) -> GateSet:
    """Gates a transformers model (or a PEFT model around one) in place and returns its GateSet.

    Units "rows" and "columns" give a gatepack.row_column.RowColumnGateSet. Swaps child modules by
    name; the GateSet becomes the submodule `gatepack_gates`, so optimizers, checkpoints and .to()
    see it. Works before or after get_peft_model; after it, call gates.unfreeze() before building
    the optimizer. Gradient checkpointing must be non-reentrant (use_reentrant=False): all layers
    share one sample. Raises ValueError for a model of no known family, gates attached twice, or a
    target at or below what no gate can remove; whether shapes meet the target is checked where a
    training begins (GateTraining), or by gates.plan.
    """
    config = GateConfig() if config is None else config
    if not isinstance(config, GateConfig):
        raise ValueError(f"config must be a GateConfig or None, got {config!r}")
    root = hf_model(model)
    refuse_sharded(root, "its linears cannot be replaced", "attach before fully_shard")
    if hasattr(root, GATES_NAME):
        raise ValueError("model already has gates; take them off with gatepack.detach(model) first")
    if "linears" in (getattr(root.config, "gatepack", None) or {}):
        raise ValueError(
            "model is packed by rows and columns; put it back with gatepack.unpack(model) first"
        )
    if config.of_linears:
        from gatepack.row_column import attach_rows_columns

        return attach_rows_columns(root, config)
    layers = layers_of(root)
    specs: dict[str, GateSpec] = {}
    for layer in layers:
        specs.update(_specs(layer, config))
    check_targets(config, [name for layer in layers for name in _gated_names(layer, config)])
    gates = GateSet(config, specs)
    gates.costs = _costs(root, layers, specs, config)
    record = getattr(root.config, "gatepack", None) or {}
    if "total" in record:
        # Units were removed while these gates trained: budget and noise are those of before.
        gates.costs.total = record["total"]
        gates.recall([decode_mask(record["kept"][name]) for name in specs])
    fixed = gates.costs.fixed / gates.costs.total
    if config.target <= fixed:
        raise ValueError(
            f"target={config.target} cannot be reached: the gated units hold {1 - fixed:.1%} of "
            f"the blocks' {config.target_of}; gate more units or raise the target"
        )
    gates.width = linear_shape(layers[0].linear(layers[0].family.out))[0]
    gates.to(next(root.parameters()).device).train(root.training)
    attachment = Attachment(root, gates)
    for layer in layers:
        _add_sites(attachment, layer)
    attachment.bind()
    attachment.watch(layers)
    return gates


def gates_of(model: nn.Module) -> GateSet:
    """The GateSet that attach put on a model; ValueError if there is none."""
    gates = getattr(hf_model(model), GATES_NAME, None)
    if gates is None:
        raise ValueError(
            "model has no gates; add them with gatepack.attach(model, gatepack.GateConfig(...))"
        )
    return gates


def detach(model: nn.Module) -> None:
    """Takes the gates off a model and leaves its weights as they are: the inverse of attach."""
    root = hf_model(model)
    gates_of(root).attachment.release()
    delattr(root, GATES_NAME)
    record = dict(root.config.gatepack)
    del record["gates"]
    record.pop("total", None)
    if record:
        root.config.gatepack = record
    else:
        del root.config.gatepack


def matches(name: str, config: GateConfig) -> bool:
    """Whether config.targets is None or has a pattern for the name of a module."""
    return config.targets is None or any(
        fnmatch.fnmatchcase(name, pattern) for pattern in config.targets
    )


def check_targets(config: GateConfig, names: list[str]) -> None:
    """ValueError for a pattern of config.targets that is for none of the names."""
    for pattern in config.targets or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"targets={config.targets}: {pattern!r} matches nothing that can be gated; the "
                f"first is {names[0]!r}"
            )


def _gated_names(layer: Layer, config: GateConfig) -> list[str]:
    places = {"heads": layer.heads_name, "channels": layer.channels_name}
    return [places[unit] for unit in config.units]


def _specs(layer: Layer, config: GateConfig) -> Iterator[tuple[str, GateSpec]]:
    family, dim = layer.family, layer.head_dim
    if "heads" in config.units and matches(layer.heads_name, config):
        hidden_out = linear_shape(layer.linear(family.out))[0]
        hidden_in = linear_shape(layer.linear(family.qkv or family.q))[1]
        ratio = layer.queries // layer.kv_heads
        shared = 2 * dim * hidden_in
        unit = dim * (hidden_in + hidden_out)
        if ratio == 1:
            unit, shared = unit + shared, 0
        yield (
            f"{layer.heads_name}:heads",
            GateSpec("heads", layer.queries, dim, unit, ratio, shared),
        )
    if "channels" in config.units and matches(layer.channels_name, config):
        out, width = linear_shape(layer.linear(family.down))
        unit = out + family.branches * linear_shape(layer.linear(family.up[0]))[1]
        yield f"{layer.channels_name}:channels", GateSpec("channels", width, 1, unit)


def _costs(
    root: nn.Module, layers: list[Layer], specs: dict[str, GateSpec], config: GateConfig
) -> Costs:
    """What config.target_of counts, over all blocks."""
    if config.target_of == "latency":
        table = LatencyTable.from_dict(config.latency_table)
        removed = "total" in (getattr(root.config, "gatepack", None) or {})
        return LatencyCosts(table, config.latency_phase, specs, len(layers), removed)
    total = sum(
        layer.linear(path).weight.numel() for layer in layers for path in layer.family.linears
    )
    fixed = total - sum(gate_cost(spec) for spec in specs.values())
    if config.target_of == "params":
        return Costs(specs, fixed)
    # Multiplications and additions per token; a head also meets the keys and values it attends to.
    meets = {}
    for layer in layers:
        attention = layer.module.get_submodule(layer.family.attention)
        seen = 0.5 if getattr(attention, "is_causal", root.can_generate()) else 1.0
        meets[layer.heads_name] = round(seen * 4 * layer.head_dim * config.sequence_length)
    counted = {}
    for name, spec in specs.items():
        own = meets[name.rpartition(":")[0]] if spec.kind == "heads" else 0
        counted[name] = replace(
            spec, unit_cost=2 * spec.unit_cost + own, shared_cost=2 * spec.shared_cost
        )
    gated = {name.rpartition(":")[0] for name in specs}
    rest = sum(
        layer.queries * meets[layer.heads_name] for layer in layers if layer.heads_name not in gated
    )
    return Costs(counted, 2 * fixed + rest)


def _add_sites(attachment: Attachment, layer: Layer) -> None:
    family, gates = layer.family, attachment.gates
    heads = gates.gates.get(f"{layer.heads_name}:heads")
    channels = gates.gates.get(f"{layer.channels_name}:channels")
    if channels is not None and family.mlp:
        parent_path, _, name = family.mlp.rpartition(".")
        parent = layer.module.get_submodule(parent_path)
        up = tuple(path.rpartition(".")[2] for path in family.up)
        gated = GatedMLP.from_mlp(parent._modules[name], up, family.down.rpartition(".")[2])
        setattr(parent, name, gated)
        attachment.mlps.append((parent, name))
    for path, site in gated_sites(family, heads, channels):
        attachment.add_site(layer, path, site)
    if heads is not None:
        attention = layer.module.get_submodule(family.attention)
        attention.gatepack_heads = heads
        attachment.attentions.append((attention, family, heads))


def gated_sites(
    family: Family, heads: Gate | None, channels: Gate | None
) -> Iterator[tuple[str, Site]]:
    """(path in the layer, Site) of every linear that a layer's gates act on."""
    if heads is not None:
        if family.qkv:
            lanes = heads.size * heads.lanes
            blocks = tuple(RowBlock(offset) for offset in (0, lanes, 2 * lanes))
            yield family.qkv, Site(rows_gate=heads, row_blocks=blocks, compact_out=True)
        else:
            yield family.q, Site(rows_gate=heads, compact_out=True)
            for path in family.kv:
                yield (
                    path,
                    Site(rows_gate=heads, row_blocks=(RowBlock(shared=True),), compact_out=True),
                )
        yield family.out, Site(in_gate=heads, compact_in=True)
    if channels is not None:
        blocks = tuple(RowBlock(offset) for offset in family.branch_offsets(channels.size))
        for path in family.up:
            yield path, Site(rows_gate=channels, row_blocks=blocks, compact_out=True)
        yield family.down, Site(in_gate=channels, compact_in=True)
