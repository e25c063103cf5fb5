"""Stage 3, modules: what attach changed in a model, kept up to date while it runs."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache

from gatepack.families import Family
from gatepack.functional import sampled_values
from gatepack.gates import Gate, GateSet
from gatepack.head_counts import head_counts, set_head_counts, write_head_counts
from gatepack.layers import GATES_NAME, Layer
from gatepack.masks import record_of
from gatepack.mlp import GatedMLP, ungate_mlp
from gatepack.modules import gate_linear, is_gated, most_in_place, ungate_linear
from gatepack.paths import choose_path, has_kernels
from gatepack.samples import Sample
from gatepack.sites import Site, gated_sites


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
        self.record()

    def record(self) -> None:
        """Says in the model's config, of which save_pretrained makes config.json, what gates it has
        and whether they are frozen, which no tensor of theirs says."""
        record = record_of(self.root.config)
        record.pop("frozen", None)
        record["gates"] = self.gates.config.to_dict()
        if self.gates.frozen:
            record["frozen"] = True
        self.root.config.gatepack = record

    def add_site(self, layer: Layer, path: str, site: Site) -> None:
        parent_path, _, name = path.rpartition(".")
        self.sites.append((layer.module.get_submodule(parent_path), name, site))

    def bind(self) -> None:
        """Makes every site's child a gated linear, whatever wraps it by now."""
        for parent, name, site in self.sites:
            child = parent._modules[name]
            if is_gated(child):
                continue
            for path, inner in list(child.named_modules()):
                if path and is_gated(inner):  # what PEFT wrapped, and its copy (modules_to_save)
                    child.set_submodule(path, ungate_linear(inner))
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
        sample, paths, counts = gates.sample(), gates.paths, head_counts(places)
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
        before, counts_before = (gates.pinned, gates.paths), head_counts(counts)
        gates.pinned, gates.paths = sample, paths
        write_head_counts(counts)
        try:
            yield
        finally:
            gates.pinned, gates.paths = before
            write_head_counts(counts_before)

    def renew(self, layers: list[Layer]) -> None:
        """Gates the linears of the layers: at first, or after release with gates of other sizes."""
        self.attentions = []
        for layer in layers:
            self._gate(layer)
        self.bind()
        self.watch(layers)

    def _gate(self, layer: Layer) -> None:
        family, gates = layer.family, self.gates.gates
        heads = gates.get(f"{layer.heads_name}:heads")
        channels = gates.get(f"{layer.channels_name}:channels")
        if channels is not None and family.mlp:
            parent_path, _, name = family.mlp.rpartition(".")
            parent = layer.module.get_submodule(parent_path)
            up = tuple(path.rpartition(".")[2] for path in family.up)
            gated = GatedMLP.from_mlp(parent._modules[name], up, family.down.rpartition(".")[2])
            setattr(parent, name, gated)
            self.mlps.append((parent, name))
        for path, site in gated_sites(family, heads, channels):
            self.add_site(layer, path, site)
        if heads is not None:
            attention = layer.module.get_submodule(family.attention)
            attention.gatepack_heads = heads
            self.attentions.append((attention, family, heads))

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


def _set_dense_head_counts(attention: nn.Module, family: Family, gate: Gate) -> None:
    blocks = gate.size // gate.spec.shared_size
    set_head_counts(attention, family, gate.size, blocks, gate.lanes)
