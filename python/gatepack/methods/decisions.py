"""Stage 4, methods: ATP's pruning decisions, what they act on and the network that makes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.budget import in_multiples
from gatepack.layers import Layer
from gatepack.modules import linear_shape

TINY = 1e-10


def gumbel_sigmoid(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, offset: float
) -> torch.Tensor:
    """sigmoid((l + g + offset) / temperature), g = -log(-log(u + 1e-10) + 1e-10); all fp32 [N].

    One Gumbel variable, not a difference of two: P(s >= 1/2) = 1 - exp(-exp(l + offset)). Source:
    ATP, arXiv 2412.14426, as coded; DISP-LLM before it.
    """
    gumbel = -torch.log(-torch.log(uniform + TINY) + TINY)
    return torch.sigmoid((logits + gumbel + offset) / temperature)


def straight_through(soft: torch.Tensor) -> torch.Tensor:
    """1[s >= 1/2] with the gradient of s."""
    return ((soft >= 0.5).to(soft.dtype) - soft).detach() + soft


def budget_loss(kept: torch.Tensor, target: float) -> torch.Tensor:
    """log(max(kept, target) / min(kept, target)), a scalar."""
    return (kept.log() - math.log(target)).abs()


@dataclass(frozen=True)
class Place:
    """Where decisions act on one linear: places in the flat vector of all decisions.

    rows int64 [N] or columns int64 [K], of which a linear has one. masks_output: the evaluation
    formula multiplies the output by its rows' decisions; an MLP's input side has that done at the
    linear that reads the channels, to the power of how many linears make them.
    """

    name: str
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    masks_output: bool = False
    power: int = 1


@dataclass(frozen=True)
class Layout:
    """All decisions of a model as one flat vector [N], layer by layer: keys, values, channels.

    lengths: of these three, alike in all layers. costs: weights that go with each decision, fp64
    [N]. total: weights of the blocks' linears, all of which depend on one decision each.
    """

    places: tuple[Place, ...]
    lengths: tuple[int, int, int]
    layers: int
    costs: torch.Tensor
    total: int

    def kept_fraction(self, decisions: torch.Tensor) -> torch.Tensor:
        """sum of costs of decisions [N] in [0, 1] / total, a differentiable scalar."""
        return (decisions * self.costs.to(decisions)).sum() / self.total

    def closest(self, scores: torch.Tensor, target: float, multiple: int = 1) -> torch.Tensor:
        """The decisions with the highest scores whose cost is nearest to target of the total, bool.

        Channels of a layer are kept in multiples, or in their largest half, quarter, ... with which
        the cost is within 0.5 % of the total; in ones, decisions that still fit follow where the
        next is too dear.
        """
        scores = scores.cpu()

        def find(multiple: int) -> tuple[torch.Tensor, float]:
            if multiple == 1:
                chosen = self._fill(scores, target)
            else:
                chosen = self._threshold(scores, target, multiple)
            return chosen, float(self.kept_fraction(chosen.double()))

        return in_multiples(find, target, multiple)[0]

    def _fill(self, scores: torch.Tensor, target: float) -> torch.Tensor:
        """The highest scores that fit the target together, and the next one if that is nearer."""
        order, costs = torch.argsort(scores, descending=True, stable=True), self.costs.cpu()
        left = target * self.total
        chosen = torch.zeros(len(order), dtype=torch.bool)
        rest = order
        while len(rest):
            fitting = int((torch.cumsum(costs[rest], 0) <= left).sum())
            chosen[rest[:fitting]] = True
            left -= float(costs[rest[:fitting]].sum())
            rest = rest[fitting:]
            rest = rest[costs[rest] <= left]
        nearer = order[~chosen[order] & (costs[order] < 2 * left)]
        chosen[nearer[:1]] = True
        return chosen

    def _threshold(self, scores: torch.Tensor, target: float, multiple: int) -> torch.Tensor:
        """The threshold on scores that, with channels in multiples, costs nearest to target."""
        order = torch.argsort(scores, descending=True, stable=True)
        low, high, best, distance = 0, len(order) + 1, None, math.inf
        while high - low > 1:
            middle = (low + high) // 2
            chosen = torch.zeros(len(order), dtype=torch.bool)
            chosen[order[:middle]] = True
            self._in_multiples(chosen, scores, multiple)
            kept = float(self.kept_fraction(chosen.double()))
            if abs(kept - target) < distance:
                best, distance = chosen, abs(kept - target)
            low, high = (middle, high) if kept < target else (low, middle)
        return best

    def _in_multiples(self, chosen: torch.Tensor, scores: torch.Tensor, multiple: int) -> None:
        """Drops the worst channels of each layer until their number is a multiple, in place."""
        width = self.lengths[2]
        channels = chosen.view(self.layers, -1)[:, -width:]
        worth = scores.view(self.layers, -1)[:, -width:].masked_fill(~channels, math.inf)
        for mask, values in zip(channels, worth, strict=True):
            count = int(mask.sum())
            if multiple < count < width and count % multiple:
                mask[torch.topk(values, count % multiple, largest=False).indices] = False


def layout_of(layers: Sequence[Layer], per_head: bool, tie_pairs: bool) -> Layout:
    """The decisions for a model's layers.

    Keys: lanes of q and k; values: lanes of v and columns of the out linear; one vector for all
    heads of a layer, or with per_head one per key/value head. tie_pairs: lanes j and j +
    head_dim / 2 of q and k, which RoPE mixes, share a decision. Channels: rows of gate and up,
    columns of down. Raises ValueError for layers of different sizes.
    """
    shapes = {(layer.queries, layer.kv_heads, _width(layer)) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(
            f"layers: expected the same heads and channels in each, got {sorted(shapes)}: unpack "
            "the model first"
        )
    ((queries, kv_heads, width),) = shapes
    dim = layers[0].head_dim
    own = kv_heads if per_head else 1
    key_lanes = dim // 2 if tie_pairs else dim
    lengths = (own * key_lanes, own * dim, width)
    head = torch.arange(kv_heads).repeat_interleave(dim) * per_head
    lane = torch.arange(dim).repeat(kv_heads)
    keys, values = head * key_lanes + lane % key_lanes, head * dim + lane

    def to_queries(index: torch.Tensor) -> torch.Tensor:
        grouped = index.reshape(kv_heads, 1, dim)
        return grouped.expand(kv_heads, queries // kv_heads, dim).reshape(-1)

    places = []
    for number, layer in enumerate(layers):
        family, start = layer.family, number * sum(lengths)
        k, v = start + keys, start + lengths[0] + values
        channels = start + lengths[0] + lengths[1] + torch.arange(width)
        if family.qkv:
            rows = {family.qkv: layer.fused(to_queries(k), k, v)}
        else:
            rows = dict(zip((family.q, *family.kv), (to_queries(k), k, v), strict=True))
        for path, index in rows.items():
            places.append(Place(f"{layer.name}.{path}", index, masks_output=True))
        places.append(Place(f"{layer.name}.{family.out}", columns=to_queries(v), power=0))
        made = channels.repeat(len(family.branch_offsets(width)))
        places += [Place(f"{layer.name}.{path}", made) for path in family.up]
        places.append(Place(f"{layer.name}.{family.down}", columns=channels, power=family.branches))
    costs = torch.zeros(len(layers) * sum(lengths), dtype=torch.float64)
    total = 0
    shape_of = {
        f"{layer.name}.{path}": linear_shape(layer.linear(path))
        for layer in layers
        for path in layer.family.linears
    }
    for place in places:
        n, k = shape_of[place.name]
        index, each = (place.columns, n) if place.rows is None else (place.rows, k)
        costs.index_add_(0, index, torch.full((len(index),), float(each), dtype=torch.float64))
        total += n * k
    return Layout(tuple(places), lengths, len(layers), costs, total)


def _width(layer: Layer) -> int:
    return linear_shape(layer.linear(layer.family.down))[1]


class DecisionGenerator(nn.Module):
    """Logits of all decisions from a fixed random slot per layer: fp32 [layers * sum(lengths)].

    Slots [layers, 64], orthogonal and frozen, are a sequence through two post-norm transformer
    encoder layers (4 heads, 256 wide, ReLU) and a LayerNorm; each layer then has its own matrix to
    each of its vectors, without bias. Source: ATP, arXiv 2412.14426, first version of its code.
    """

    def __init__(self, layers: int, lengths: Sequence[int], dropout: float = 0.1, seed: int = 0):
        super().__init__()
        width = 64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("slots", nn.init.orthogonal_(torch.empty(layers, width)))
            block = nn.TransformerEncoderLayer(width, 4, 256, dropout, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(width)
            self.outputs = nn.ParameterList(
                nn.Parameter(torch.empty(layers, length, width).uniform_(-1, 1) / math.sqrt(width))
                for length in lengths
            )

    def forward(self) -> torch.Tensor:
        states = self.norm(self.encoder(self.slots[None])[0])
        parts = [torch.einsum("ld,lnd->ln", states, matrix) for matrix in self.outputs]
        return torch.cat(parts, 1).reshape(-1)
