"""Stage 7, command line: measures the table of layer times that a latency budget is made of."""

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.bench import BenchConfig
from gatepack.files import plain, refuse_folder, write_json
from gatepack.inspection import identify
from gatepack.latency import PHASES, LatencyTable, device_label
from gatepack.layers import hf_model, layers_of
from gatepack.masks import encode_mask, is_packed
from gatepack.models import load_model, torch_device, torch_dtype
from gatepack.modules import linear_shape
from gatepack.packing import shrink
from gatepack.progress import Log
from gatepack.quality import forward_arguments
from gatepack.resume import State, state_of
from gatepack.timing import environment, now

WIDTHS = 24
COUNTS = 8
LAYERS = 4


@dataclass(frozen=True)
class _Point:
    """What a layer keeps: so many key/value heads, query heads for each, and channels."""

    kv_heads: int
    per_kv: int
    channels: int


def run(config: BenchConfig, path: Path, log: Log) -> dict:
    """Measures config.model's layers on config.device; writes a LatencyTable, returns it as a dict.

    Layers with random weights stand for its own. Each shape is timed beside the dense layer, in
    turn, and the median of the ratios counts, so that a device that slows down meanwhile slows both
    down. A run that was cut off goes on from its last shape. Raises ValueError for a packed model.
    """
    refuse_folder(path)
    device = torch_device(config.device)
    root = _load(config, log)
    settings = {**plain(asdict(config)), "device": device_label(device)}
    state = State.open(state_of(path), settings)
    table = collect(root, device, config, log, state.once).to_dict()
    write_json(path, table)
    state.clear()
    return table


def plan(config: BenchConfig, log: Log) -> dict:
    """How many shapes run would time, and how long, from one dense probe; writes nothing."""
    device = torch_device(config.device)
    root = _load(config, log)
    probe = _Probe(root, device, config)
    probe.times()
    start = now(device)
    probe.times()
    shapes = 1 + len(_grid(root).points)
    return {
        "model": identify(root, config.model),
        "shapes": shapes,
        "seconds": 2 * (config.repeats + 1) * shapes * (now(device) - start),
        "environment": environment(device),
    }


def _load(config: BenchConfig, log: Log) -> nn.Module:
    """The dense transformers model; ValueError for a packed one."""
    log.say(f"loading {config.model}")
    model, _ = load_model(config.model, torch_dtype(config.dtype))
    root = hf_model(model)
    if is_packed(root.config):
        raise ValueError(f"model: expected a dense one, whose layers are cut, got {config.model}")
    return root


def collect(
    root: nn.Module,
    device: torch.device,
    config: BenchConfig,
    log: Log,
    once: Callable[[str, Callable], object] = lambda name, compute: compute(),
) -> LatencyTable:
    """The table of a dense transformers model's layers; once(name, compute) may know a result."""
    layer, grid = layers_of(root)[0], _grid(root)
    points = grid.points
    dense = _Probe(root, device, config)
    with log.bar("timing layers", "shape", 1 + len(points)) as tell:
        base = once("dense", lambda: _dense_layer(root, dense, device, config))
        tell(1)
        ratios = []
        for i, point in enumerate(points):
            ratios.append(once(str(i), lambda p=point: _ratio(root, dense, p, device, config)))
            tell(2 + i)
    seconds = {}
    for phase in PHASES:
        if phase not in base:
            seconds[phase] = None
            continue
        whole, layer_seconds = base[phase]
        rest = whole - dense.layers * layer_seconds
        found = [max((r[phase] * whole - rest) / dense.layers, 1e-9) for r in ratios]
        each, counts = len(grid.per_kv), len(grid.kv_counts)
        heads = [found[i * each : (i + 1) * each] for i in range(counts)]
        seconds[phase] = {"heads": heads, "channels": found[counts * each :]}
    return LatencyTable(
        device=device_label(device),
        dtype=str(root.dtype).removeprefix("torch."),
        hidden_size=root.config.hidden_size,
        head_dim=layer.head_dim,
        query_heads=layer.queries,
        kv_heads=layer.kv_heads,
        channels=grid.widths[-1],
        batch_size=config.batch_size,
        prompt_tokens=config.prompt_tokens,
        kv_counts=tuple(grid.kv_counts),
        per_kv=tuple(grid.per_kv),
        widths=tuple(grid.widths),
        seconds=seconds,
        environment=environment(device),
    )


@dataclass(frozen=True)
class _Grid:
    """Counts of heads and channels, ascending up to the dense ones, and the shapes to time."""

    kv_counts: list[int]
    per_kv: list[int]
    widths: list[int]

    @property
    def points(self) -> list[_Point]:
        points = [_Point(k, q, self.widths[-1]) for k in self.kv_counts for q in self.per_kv]
        return points + [_Point(self.kv_counts[-1], self.per_kv[-1], w) for w in self.widths]


def _grid(root: nn.Module) -> _Grid:
    layer = layers_of(root)[0]
    channels = linear_shape(layer.linear(layer.family.down))[1]
    return _Grid(
        _counts(layer.kv_heads, COUNTS),
        _counts(layer.queries // layer.kv_heads, COUNTS),
        _counts(channels, WIDTHS, 64 if channels >= 512 else 1),
    )


def _counts(most: int, points: int, multiple: int = 1) -> list[int]:
    """About `points` counts up to most, evenly, the smaller ones in multiples."""
    step = multiple * max(1, math.ceil(most / points / multiple))
    return [*range(step, most, step), most]


class _Probe:
    """A few layers of a model's trunk with random weights, all of one shape."""

    def __init__(self, root, device, config: BenchConfig, point: _Point | None = None, layers=None):
        own = copy.deepcopy(root.config)
        self.layers = min(LAYERS, own.num_hidden_layers) if layers is None else layers
        own.num_hidden_layers = self.layers
        own.vocab_size = min(own.vocab_size, max(1024, (own.pad_token_id or 0) + 1))
        if getattr(own, "layer_types", None):
            own.layer_types = own.layer_types[: self.layers]
        if hasattr(own, "gatepack"):
            del own.gatepack
        self.model = type(root.base_model)(own)
        if point is not None:
            shrink(self.model, self._kept(point))
        self.model.to(device=device, dtype=root.dtype).eval()
        self.config, self.device = config, device
        accepted = forward_arguments(self.model)
        self.caches = "past_key_values" in accepted and root.can_generate()
        self.arguments = {"use_cache": True} if "use_cache" in accepted and self.caches else {}
        self.prompts = torch.zeros(
            config.batch_size, config.prompt_tokens, dtype=torch.int64, device=device
        )

    def _kept(self, point: _Point) -> dict:
        kept = {}
        for layer in layers_of(self.model):
            heads = torch.zeros(layer.kv_heads, layer.queries // layer.kv_heads, dtype=torch.bool)
            heads[: point.kv_heads, : point.per_kv] = True
            width = linear_shape(layer.linear(layer.family.down))[1]
            kept[f"{layer.heads_name}:heads"] = encode_mask(heads.reshape(-1))
            kept[f"{layer.channels_name}:channels"] = encode_mask(
                torch.arange(width) < point.channels
            )
        return kept

    @torch.no_grad()
    def times(self) -> dict[str, float]:
        """Seconds of a prefill, and of a step of decode where there is a cache."""
        start = now(self.device)
        output = self.model(input_ids=self.prompts, **self.arguments)
        middle = now(self.device)
        found = {"prefill": middle - start}
        if self.caches:
            token, cache = self.prompts[:, :1], output.past_key_values
            for _ in range(self.config.new_tokens):
                output = self.model(input_ids=token, past_key_values=cache, **self.arguments)
                cache = output.past_key_values
            found["decode"] = (now(self.device) - middle) / self.config.new_tokens
        return found


def _pairs(a: _Probe, b: _Probe, repeats: int) -> Iterator[tuple[dict, dict]]:
    """Times of both, in turn, after one untimed run of each."""
    a.times(), b.times()
    for repeat in range(repeats):
        if repeat % 2:
            first = a.times()
            yield first, b.times()
        else:
            second = b.times()
            yield a.times(), second


def _ratio(root, dense: _Probe, point: _Point, device, config: BenchConfig) -> dict[str, float]:
    """Time of a shape / time of the dense one, the median over pairs, by phase."""
    pairs = list(_pairs(_Probe(root, device, config, point), dense, config.repeats))
    return {p: statistics.median(a[p] / b[p] for a, b in pairs) for p in pairs[0][0]}


def _dense_layer(root, dense: _Probe, device, config: BenchConfig) -> dict[str, tuple]:
    """(seconds of the dense probe, of one of its layers) by phase; the rest are embeddings."""
    single = _Probe(root, device, config, layers=1)
    pairs = list(_pairs(dense, single, 2 * config.repeats))
    found = {}
    for phase in pairs[0][0]:
        whole = statistics.median(a[phase] for a, _ in pairs)
        alone = statistics.median(b[phase] / a[phase] for a, b in pairs) * whole
        layer = (whole - alone) / max(dense.layers - 1, 1) if dense.layers > 1 else whole
        found[phase] = (whole, min(max(layer, 1e-9), whole / dense.layers))
    return found
