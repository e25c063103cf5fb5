"""Stage 3, modules: gates on rows and columns of any linear, closed together where they meet."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from gatepack.attachment import Attachment
from gatepack.budget import Plan, plan_in_multiples
from gatepack.config import GateConfig
from gatepack.gates import Gate, GateSet, GateSpec
from gatepack.hf import check_targets, head_flops, matches
from gatepack.layers import Layer, layers_of
from gatepack.modules import base_linear, is_conv1d, linear_shape
from gatepack.samples import Sample
from gatepack.sites import Site

# How q and k lanes meet, by model_type: lane by lane, or rotated in pairs (j, j + head_dim / 2).
_LANES = "bert roberta xlm-roberta camembert electra distilbert gpt2 opt"
_PAIRS = (
    "llama mistral ministral ministral3 qwen2 gemma gemma2 granite smollm3 starcoder2 modernbert "
    "olmo seed_oss arcee"
)
QUERY_KEY = {
    **dict.fromkeys(_LANES.split(), "lanes"),
    **dict.fromkeys(_PAIRS.split(), "pairs"),
}


# What configs call the activation of their MLPs.
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass(frozen=True)
class Coupling:
    """Units of several gates that are dead together; index int64 [n, parties, lanes].

    A party is alive while one of its lanes is open. shared=False: a party lives if all parties do
    (gate, up and down of a channel). shared=True: party 0 serves the others (a value lane and the
    columns of every query head that reads it): they need it, it needs one of them.
    """

    index: torch.Tensor
    shared: bool

    def alive(self, is_open: torch.Tensor) -> torch.Tensor:
        """Which parties live, bool [n, parties], for open units bool [N]."""
        alive = is_open[self.index].any(-1)
        if not self.shared:
            return alive.all(1, keepdim=True).expand_as(alive)
        first, others = alive[:, :1], alive[:, 1:]
        return torch.cat([first & others.any(1, keepdim=True), others & first], 1)


class RowColumnCosts:
    """Cost of linears whose rows and columns have gates: rows kept x columns kept each.

    shapes: linear name -> (N, K). gates: "<linear>:rows" and "<linear>:columns" -> Gate; a side
    without gates keeps everything. fixed: what the budget counts and no gate removes. weight_cost:
    of one weight; 1 counts weights, 2 FLOPs per token.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        gates: Mapping[str, Gate],
        fixed: int,
        weight_cost: int = 1,
    ):
        self.shapes, self.fixed, self.weight_cost = dict(shapes), fixed, weight_cost
        self.sides = [
            tuple(gates.get(f"{name}:{side}") for side in ("rows", "columns")) for name in shapes
        ]
        self.total = fixed + weight_cost * sum(n * k for n, k in self.shapes.values())
        self._sizes = torch.tensor([gate.size for gate in gates.values()], device="cpu")
        # Where to read what a side keeps: sums by gate, or its size where it has no gate.
        place = {name: i for i, name in enumerate(gates)}
        whole, read = [], []
        for shape, sides in zip(self.shapes.values(), self.sides, strict=True):
            for size, gate in zip(shape, sides, strict=True):
                read.append(len(place) + len(whole) if gate is None else place[gate.name])
                whole += [float(size)] if gate is None else []
        self._whole = torch.tensor(whole, device="cpu")
        self._read = torch.tensor(read, dtype=torch.int64, device="cpu").reshape(-1, 2)

    def kept_fraction(self, masks: Mapping[str, torch.Tensor]) -> float:
        """Kept fraction of all that is counted for open masks (name -> bool [size])."""
        kept = 0
        for shape, sides in zip(self.shapes.values(), self.sides, strict=True):
            n, k = (
                size if gate is None else int(masks[gate.name].sum())
                for size, gate in zip(shape, sides, strict=True)
            )
            kept += n * k
        return (self.fixed + self.weight_cost * kept) / self.total

    def expected(self, probability: torch.Tensor) -> torch.Tensor:
        """Expected kept fraction, a differentiable scalar, without a host sync; fp32 [N]."""
        if self._sizes.device != probability.device:
            for name in ("_sizes", "_whole", "_read"):
                setattr(self, name, getattr(self, name).to(probability.device))
        sums = torch.segment_reduce(probability, "sum", lengths=self._sizes)
        sides = torch.cat([sums, self._whole.to(sums.dtype)])[self._read]
        return (self.weight_cost * (sides[:, 0] * sides[:, 1]).sum() + self.fixed) / self.total


class RowColumnGateSet(GateSet):
    """The GateSet of units "rows" and "columns": y = z_rows * (W (z_columns * x) + b) per linear.

    A unit that nothing reads, or that gets nothing but zeros, is 0 too (Coupling): that changes
    neither outputs nor gradients, and is what packing removes. Budgets count weights, or their
    FLOPs per token, on exact zeros: rows kept x columns kept of each linear. fixed_cost: as
    config.target_of counts.
    """

    def __init__(self, config: GateConfig, shapes: Mapping[str, tuple[int, int]], fixed_cost: int):
        specs = {}
        for name, (n, k) in shapes.items():
            if "rows" in config.units:
                specs[f"{name}:rows"] = GateSpec("rows", n)
            if "columns" in config.units:
                specs[f"{name}:columns"] = GateSpec("columns", k)
        super().__init__(config, specs)
        weight_cost = 2 if config.target_of == "flops" else 1
        self.costs = RowColumnCosts(shapes, self.gates, fixed_cost, weight_cost)
        self._couplings: list[Coupling] = []
        self._coupled: Sample | None = None

    def __getstate__(self):
        return {**super().__getstate__(), "_coupled": None}

    def couple(self, is_open: torch.Tensor) -> torch.Tensor:
        """The units that are open and matter, bool [N]."""
        result = is_open.clone()
        for coupling in self._couplings_on(is_open.device):
            index = coupling.index
            alive = coupling.alive(is_open)[..., None].expand(index.shape)
            result[index] = is_open[index] & alive
        return result

    def couple_all(self, couplings: Iterable[Coupling]) -> None:
        """Sets the couplings; no unit may be in two of them. Those of one form become one."""
        forms: dict[tuple, list[torch.Tensor]] = {}
        for c in couplings:
            forms.setdefault((c.shared, *c.index.shape[1:]), []).append(c.index)
        self._couplings = [Coupling(torch.cat(same), form[0]) for form, same in forms.items()]

    def _couplings_on(self, device: torch.device) -> list[Coupling]:
        if self._couplings and self._couplings[0].index.device != device:
            self._couplings = [replace(c, index=c.index.to(device)) for c in self._couplings]
        return self._couplings

    def deterministic_values(self) -> torch.Tensor:
        values = super().deterministic_values()
        return torch.where(self.couple(values.detach() > 0), values, 0.0)

    def _drawn(self, number: int | torch.Tensor | None) -> Sample:
        drawn = super()._drawn(number)
        if drawn is not self._coupled:
            flat = torch.where(self.couple(drawn.flat.detach() > 0), drawn.flat, 0.0)
            self._coupled = self._sample = Sample(self, drawn.key, flat, number)
        return self._coupled

    def plan(self, scores: Mapping[str, torch.Tensor]) -> Plan:
        """The units above one threshold on scores that keep config.target of the cost.

        Rows that stay in part of a linear are then fewer by the worst ones, down to a multiple of
        width_multiple or of its largest half, quarter, ... with which the target can be met;
        equal_layers and tp_divisor speak of heads and channels. Raises ValueError for scores that
        are not finite [size], or if no threshold is within 0.5 % of the target.
        """
        for name, gate in self.items():
            if name not in scores or scores[name].shape != (gate.size,):
                raise ValueError(
                    f"scores[{name!r}]: expected [{gate.size}], got "
                    f"{list(scores[name].shape) if name in scores else None}"
                )
        flat = torch.cat([scores[name].float().cpu() for name in self])
        if not bool(flat.isfinite().all()):
            raise ValueError("scores: expected finite values, got infinite or NaN ones")
        config = self.config
        find = functools.partial(self._threshold, flat, config.target)
        return plan_in_multiples(
            find,
            config.target,
            config.width_multiple,
            config.target_of,
            "Choose that or gate more linears",
        )

    def check_target(self, masks: Mapping[str, torch.Tensor] | None = None) -> float:
        """The kept fraction where all linears close at the same pace.

        attach has refused targets below what no gate removes. Above that a single unit is too small
        to miss one, but in models of a few units, of which only a plan with scores can tell.
        """
        if masks is not None:
            raise ValueError("masks: expected None, because rows and columns are not removed")
        sizes = [gate.size for gate in self.gates.values()]
        pace = torch.cat([1.0 - torch.arange(size, device="cpu") / size for size in sizes])
        return self._threshold(pace, self.config.target, 1)[1]

    def _threshold(
        self, flat: torch.Tensor, target: float, multiple: int
    ) -> tuple[dict[str, torch.Tensor], float]:
        """(masks, kept fraction) of the threshold on scores [N] that comes nearest to the target,
        found by bisection."""
        order = torch.argsort(flat, descending=True, stable=True)
        low, high, best = 0, len(flat) + 1, None
        while high - low > 1:
            middle = (low + high) // 2
            is_open = torch.zeros(len(flat), dtype=torch.bool)
            is_open[order[:middle]] = True
            masks = self.split(self._in_multiples(self.couple(is_open), flat, multiple))
            kept = self.costs.kept_fraction(masks)
            if best is None or abs(kept - target) < abs(best[1] - target):
                best = masks, kept
            low, high = (middle, high) if kept < target else (low, middle)
        return best

    def _in_multiples(
        self, is_open: torch.Tensor, flat: torch.Tensor, multiple: int
    ) -> torch.Tensor:
        """Closes the worst open rows of each linear until their number is a multiple.

        One kind of linear at a time, because closing rows of one may close those of another.
        """
        kinds: dict[str, list[Gate]] = {}
        for name, gate in self.items():
            if gate.kind == "rows" and multiple > 1:
                kinds.setdefault(re.sub(r"\d+", "", name), []).append(gate)
        for same in (*kinds.values(), *kinds.values()):
            for gate in same:
                rows = is_open[gate.start : gate.start + gate.size]
                count = int(rows.sum())
                if multiple < count < gate.size and count % multiple:
                    worth = torch.where(rows, flat[gate.start : gate.start + gate.size], math.inf)
                    rows[torch.topk(worth, count % multiple, largest=False).indices] = False
            is_open = self.couple(is_open)
        return is_open


def attach_rows_columns(root: nn.Module, config: GateConfig) -> RowColumnGateSet:
    """What gatepack.attach does for units "rows" and "columns"; see there."""
    layers = layers_of(root)
    counted = [f"{layer.name}.{path}" for layer in layers for path in layer.family.linears]
    names = _targeted(root, counted, config)
    shapes = {name: linear_shape(base_linear(root.get_submodule(name))) for name in names}
    fixed = sum(
        base_linear(root.get_submodule(name)).weight.numel()
        for name in counted
        if name not in shapes
    )
    if config.target_of == "flops":
        # Rows and columns are gathered and scattered around attention, which keeps its width.
        fixed = 2 * fixed + sum(x.queries * head_flops(root, x, config) for x in layers)
    gates = RowColumnGateSet(config, shapes, fixed)
    if config.target <= gates.costs.fixed / gates.costs.total:
        raise ValueError(
            f"target={config.target} cannot be reached: the gated linears hold "
            f"{1 - gates.costs.fixed / gates.costs.total:.1%} of the blocks' {config.target_of}; "
            "gate more of them or raise the target"
        )
    gates.couple_all(c for layer in layers for c in _couplings(root, layer, gates))
    gates.width = linear_shape(layers[0].linear(layers[0].family.out))[0]
    gates.to(next(root.parameters()).device).train(root.training)
    attachment = Attachment(root, gates)
    inside = {name for layer in layers for name in _channel_gates(root, layer, gates)}
    for name in names:
        parent, _, child = name.rpartition(".")
        rows, columns = f"{name}:rows", f"{name}:columns"
        site = Site(
            in_gate=gates.gates.get(columns), out_gate=gates.gates.get(rows),
            compact_in=columns in inside, compact_out=rows in inside,
        )  # fmt: skip
        attachment.sites.append((root.get_submodule(parent), child, site))
    attachment.bind()
    attachment.watch(layers)
    return gates


def _targeted(root: nn.Module, counted: list[str], config: GateConfig) -> list[str]:
    """Names of the linears to gate: those of the blocks, or every one that matches targets."""
    if config.targets is None:
        return counted
    owners: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    linears = {name: base_linear(module) for name, module in root.named_modules()}
    linears = {
        name: base
        for name, base in linears.items()
        if not name.endswith("base_layer") and (isinstance(base, nn.Linear) or is_conv1d(base))
    }
    check_targets(config, list(linears))
    names = [name for name in linears if matches(name, config)]
    for name in names:
        shared = owners[id(linears[name].weight)]
        if len(shared) > 1:
            raise ValueError(
                f"targets={config.targets} match {name!r}, whose weight is also "
                f"{next(o for o in shared if o != f'{name}.weight')!r}: leave it out"
            )
    return names


def _couplings(root: nn.Module, layer: Layer, gates: GateSet) -> Iterator[Coupling]:
    """The couplings inside one layer, as far as both sides have gates."""
    family, dim = layer.family, layer.head_dim
    queries, kv_heads = layer.queries, layer.kv_heads
    ratio = queries // kv_heads

    def side(path: str, kind: str, offset: int = 0, size: int | None = None):
        gate = gates.gates.get(f"{layer.name}.{path}:{kind}")
        if gate is None:
            return None
        size = gate.size - offset if size is None else size
        start = gate.start + offset
        return torch.arange(
            start, start + size, device="cpu"
        )  # also where models are built on meta

    width = linear_shape(layer.linear(family.down))[1]
    channels = [
        side(path, "rows", offset, width)
        for path in family.up
        for offset in family.branch_offsets(width)
    ]
    channels = [p for p in (*channels, side(family.down, "columns")) if p is not None]
    if len(channels) > 1 and _zero_stays_zero(root.config):
        yield Coupling(torch.stack(channels, 1)[..., None], shared=False)
    if family.qkv:
        rows = side(family.qkv, "rows")
        q, k, v = (None if rows is None else rows[part] for part in layer.fused_rows)
    else:
        q, k, v = (side(path, "rows") for path in (family.q, *family.kv))
    out = side(family.out, "columns")

    def by_head(first: torch.Tensor, others: torch.Tensor, width: int) -> torch.Tensor:
        """[kv_heads * dim / width, 1 + ratio, width], lanes j, j + dim / width, ... together."""
        heads = torch.cat(
            [first.reshape(kv_heads, 1, dim), others.reshape(kv_heads, ratio, dim)], 1
        )
        return heads.unflatten(2, (width, dim // width)).permute(0, 3, 1, 2).flatten(0, 1)

    if v is not None and out is not None:
        yield Coupling(by_head(v, out, 1), shared=True)
    meeting = QUERY_KEY.get(root.config.model_type)
    if q is not None and k is not None and meeting is not None:
        yield Coupling(by_head(k, q, 2 if meeting == "pairs" else 1), shared=True)


def _channel_gates(root: nn.Module, layer: Layer, gates: GateSet) -> list[str]:
    """The gates of an MLP's channels where all of its linears have them, else none: these are open
    together, so the linears hand each other open channels only."""
    family = layer.family
    names = [f"{layer.name}.{path}:rows" for path in family.up]
    names.append(f"{layer.name}.{family.down}:columns")
    gated = all(name in gates.gates for name in names)
    whole = gated and not family.fused_up and _zero_stays_zero(root.config)
    return names if whole else []


def _zero_stays_zero(config) -> bool:
    """Whether the MLP's activation of 0 is 0, so that a closed row leaves a dead channel."""
    from transformers.activations import ACT2FN

    named = (getattr(config, key, None) for key in _ACTIVATION_KEYS)
    name = next((name for name in named if name), None)
    return name in ACT2FN and bool(ACT2FN[name](torch.zeros(1, device="cpu")) == 0)
