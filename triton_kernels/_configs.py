"""Stage 2, kernels: tile choices, as data.

`choose_config(op, shape, dtype, arch)` is a pure function of its arguments: it asks no device, so
the ahead-of-time tests use it for chips that are not there. The choices below come from what the
compiler reports (in 16 bit no spills, shared memory within the chip), not from timings.
"""

import dataclasses

import torch

WIDEST = 256  # of a Tile's blocks: tensors over slots are filled to a multiple of it


class _Config:
    """What the frozen dataclasses below share: a flat form for operator schemas, and checks."""

    @classmethod
    def _length(cls) -> int:
        fields = dataclasses.fields(cls)
        return sum(1 if field.type is int else field.type._length() for field in fields)

    def to_ints(self) -> list[int]:
        """Flat form that fits an operator schema; `from_ints` reads it back."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        lists = [part.to_ints() if isinstance(part, _Config) else [part] for part in parts]
        return [i for ints in lists for i in ints]

    @classmethod
    def from_ints(cls, values: list[int]):
        """The inverse of to_ints. Refuses a wrong number of integers."""
        if len(values) != cls._length():
            raise ValueError(
                f"config: expected {cls._length()} integers ({cls.__name__}), got {len(values)}"
            )
        parts, start = [], 0
        for kind in (field.type for field in dataclasses.fields(cls)):
            stop = start + (1 if kind is int else kind._length())
            parts.append(values[start] if kind is int else kind.from_ints(values[start:stop]))
            start = stop
        return cls(*parts)

    def _expect_power_of_two(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if value < least or value & (value - 1):
            raise ValueError(f"{name}: expected a power of two >= {least}, got {value}")

    def _expect_at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def _expect_warps(self) -> None:
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps: expected 1, 2, 4, 8 or 16, got {self.num_warps}")


@dataclasses.dataclass(frozen=True)
class Tile(_Config):
    """One matmul tile. block_m, block_n: output rows and columns; block_k: reduction step. Each is
    at most WIDEST.

    persistent: programs per multiprocessor that loop over the tiles and fetch operands by
    descriptor where they can (_tma.py); 0: one program for each tile, and pointers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    persistent: int = 0

    def __post_init__(self):
        for name in ("block_m", "block_n", "block_k"):
            self._expect_power_of_two(name, 16)
            if getattr(self, name) > WIDEST:
                raise ValueError(f"{name}: expected at most {WIDEST}, got {getattr(self, name)}")
        self._expect_warps()
        for name, least in (("num_stages", 1), ("group_m", 1), ("persistent", 0)):
            self._expect_at_least(name, least)


@dataclasses.dataclass(frozen=True)
class GatedLinearConfig(_Config):
    """Tiles of gated_linear: fwd is [T, N] tiles, dx [T, K], dw [N, K]."""

    fwd: Tile
    dx: Tile
    dw: Tile


@dataclasses.dataclass(frozen=True)
class Panel(_Config):
    """One tile of a kernel without matmuls, which moves memory and little else.

    rows, columns: elements of a tile. span: rows that one program goes through, tile by tile.
    """

    rows: int
    columns: int
    span: int
    num_warps: int

    def __post_init__(self):
        for name in ("rows", "columns"):
            self._expect_power_of_two(name)
        if self.span < self.rows or self.span % self.rows:
            raise ValueError(f"span: expected a multiple of rows ({self.rows}), got {self.span}")
        self._expect_warps()


@dataclasses.dataclass(frozen=True)
class PackedLinearConfig(_Config):
    """One tile of packed_linear: block_t tokens, block_r rows of W, block_c columns at a time.

    block_t 1 multiplies on the plain cores, more on the matrix units. splits: programs that share
    the columns of one row. num_stages: tiles of W in flight.
    """

    block_t: int
    block_r: int
    block_c: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        for name in ("block_t", "block_r", "block_c"):
            self._expect_power_of_two(name, 16 if self.block_t > 1 else 1)
        self._expect_warps()
        for name in ("splits", "num_stages"):
            self._expect_at_least(name, 1)


@dataclasses.dataclass(frozen=True)
class AttentionTile(_Config):
    """One tile of attention scores. block_q: queries; block_k: keys; head_dim is not cut."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            self._expect_power_of_two(name, 16)
        self._expect_warps()
        self._expect_at_least("num_stages", 1)


@dataclasses.dataclass(frozen=True)
class GatedAttentionConfig(_Config):
    """Tiles of gated_attention: forward, dq (loops over keys), dk and dv (loops over queries)."""

    fwd: AttentionTile
    dq: AttentionTile
    dkv: AttentionTile


@dataclasses.dataclass(frozen=True)
class GatedMLPConfig(_Config):
    """Tiles of gated_mlp and gated_swiglu, over compact channels F.

    fwd: both products of the forward [T, F]; down: y [T, K]; dh: the activation's gradient [T, F]
    with dy Wd in front of it (gated_mlp) or alone (gated_swiglu); dx [T, K]; dw [F, K]; low: the
    low-rank projections [T, r].
    """

    fwd: Tile
    down: Tile
    dh: Tile
    dx: Tile
    dw: Tile
    low: Tile


_CPU = Tile(32, 64, 64, num_warps=1, num_stages=1)

# (family, 16-bit operands) -> tile of a large matmul. sm_80 also serves sm_86 and sm_89, which have
# 99 kB of shared memory per block, as sm_120 has.
_LARGE = {
    ("sm_80", True): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("sm_80", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_90", True): Tile(128, 256, 64, num_warps=8, num_stages=4, persistent=1),
    ("sm_90", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_100", True): Tile(128, 256, 64, num_warps=8, num_stages=4, persistent=1),
    ("sm_100", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_120", True): Tile(128, 128, 64, num_warps=8, num_stages=3, persistent=1),
    ("sm_120", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("gfx942", True): Tile(128, 128, 64, num_warps=8, num_stages=2),
    ("gfx942", False): Tile(64, 64, 32, num_warps=4, num_stages=2),
}


# family -> {head_dim up to: (block_q, block_k, num_warps, num_stages) of gated_attention's fwd, dq
# and dkv for 16-bit operands}: the widest that spill nothing. Hopper's dkv wants 64 keys or more.
_ATTENTION = {
    "sm_80": {
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 8, 1)),
    },
    "sm_90": {
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
        128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
        256: ((128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    },
    "sm_100": {
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
        128: ((128, 128, 8, 2), (128, 64, 8, 1), (64, 128, 8, 2)),
        256: ((64, 32, 4, 2), (128, 64, 8, 1), (64, 64, 8, 1)),
    },
    "gfx942": {
        64: ((128, 64, 4, 2), (128, 32, 8, 2), (32, 128, 8, 1)),
        128: ((128, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
        256: ((128, 32, 4, 2), (64, 32, 4, 1), (16, 64, 4, 1)),
    },
}
# The same for fp32 operands, on every chip: registers are what is short, and beyond head_dim 128
# they do not suffice (tests/test_aot.py).
_ATTENTION_FP32 = {
    64: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    128: ((32, 32, 8, 1), (32, 32, 4, 2), (32, 32, 8, 1)),
    256: ((32, 32, 8, 1), (16, 32, 4, 1), (32, 32, 8, 1)),
}
# Where a block has 99 KiB of shared memory, dkv of 32 queries (132 KiB) cannot be launched.
_ATTENTION_FP32_IN_99_KIB = _ATTENTION_FP32 | {
    256: (*_ATTENTION_FP32[256][:2], (16, 32, 8, 1)),
}


def _family(arch: str) -> str:
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if 100 <= number < 120:
        return "sm_100"
    return "sm_90" if number == 90 else "sm_80"


def _has_99_kib(arch: str) -> bool:
    """Whether a block has 99 KiB of shared memory only, unlike on the large chips of its family."""
    return arch in ("sm_86", "sm_89") or arch.startswith("sm_12")


def _pow2_between(low: int, value: int, high: int) -> int:
    """Smallest power of two >= value, clipped to [low, high]."""
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


def _fit(tile: Tile, rows: int, columns: int) -> Tile:
    """Shrink a tile to a short output, e.g. few tokens or the columns of a low-rank projection."""
    block_m = _pow2_between(16, rows, tile.block_m)
    block_n = _pow2_between(16, columns, tile.block_n)
    warps = tile.num_warps if block_m * block_n > 64 * 64 else min(4, tile.num_warps)
    return dataclasses.replace(tile, block_m=block_m, block_n=block_n, num_warps=warps)


def _matmul_family(arch: str) -> str:
    """As _family, with sm_120 apart: it has the copy engine of sm_90, but less shared memory."""
    return "sm_120" if arch.startswith("sm_12") else _family(arch)


def _gated_linear(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> GatedLinearConfig:
    t, n, k = shape
    if arch == "cpu":
        large = _CPU
    else:
        large = _LARGE[_matmul_family(arch), dtype.itemsize == 2]
    return GatedLinearConfig(fwd=_fit(large, t, n), dx=_fit(large, t, k), dw=_fit(large, n, k))


def _linear_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """shape (T, V', d). One program per token: each thread holds 32 logits, as 16-byte loads."""
    _, vocabulary, _ = shape
    if arch == "cpu":
        return Panel(1, _pow2_between(16, vocabulary, 1024), span=1, num_warps=1)
    return Panel(1, _pow2_between(1024, vocabulary, 8192), span=1, num_warps=8)


# multiprocessors (compute units on gfx942), by family
_UNITS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


def _packed_linear(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> PackedLinearConfig:
    """shape (T, R, C). Rows per program so that every multiprocessor has some; columns are split
    only where that leaves units idle and each split still reads 128 KiB, about 1 us on one unit.

    Several tokens: from 32 MiB on, rows by 64 (the loads of x then stay small beside those of W,
    and Hopper's wgmma takes 64) with split columns; below, the second launch that splits need would
    cost more than rows by 16 do.
    """
    t, r, c = shape
    if arch == "cpu":
        block_t = 1 if t == 1 else _pow2_between(16, t, 64)
        return PackedLinearConfig(block_t, 32, 128, splits=1, num_warps=1, num_stages=1)
    family = _family(arch)
    units = _UNITS[family]
    if t == 1:
        block_t, block_r = 1, _pow2_between(4, r // (5 * units), 16)
        block_c, num_stages = _pow2_between(128, c, 4096 // block_r), 3
    else:
        block_t = _pow2_between(16, t, 64)
        block_r = 64 if t > 16 or r * c * dtype.itemsize >= 32 * 1024**2 else 16
        wide = 64 if family == "sm_80" else 128
        block_c = (wide if block_r == 64 else 256) // (dtype.itemsize // 2)
        num_stages = 2 if family == "gfx942" else 4
    tiles = max(1, -(-r // block_r) * -(-t // block_t))
    most = block_r * c * dtype.itemsize // (128 * 1024)
    splits = 1 if 4 * tiles >= 3 * units else max(1, min(most, -(-2 * units // tiles), 16))
    return PackedLinearConfig(block_t, block_r, block_c, splits, 4, num_stages)


def _gate_vector(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """A stretch of a gate vector: shape (longest segment,)."""
    (size,) = shape
    return Panel(1, _pow2_between(128, size, 4096), span=1, num_warps=1 if arch == "cpu" else 8)


def _gate_penalty(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """As _gate_vector, but shorter: the backward needs no order, only many programs."""
    return dataclasses.replace(
        _gate_vector(shape, dtype, arch), columns=_pow2_between(128, shape[0], 1024)
    )


def _gated_attention(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> GatedAttentionConfig:
    """shape (S, Skv, D, Dv); sequences shorter than a block get a smaller one."""
    queries, keys, *lanes = shape
    if arch == "cpu":
        return GatedAttentionConfig(*[AttentionTile(16, 32, num_warps=1, num_stages=1)] * 3)
    width = _pow2_between(64, max(lanes), 256)

    def fit(tile):
        block_q = _pow2_between(16, queries, tile.block_q)
        block_k = _pow2_between(16, keys, tile.block_k)
        return dataclasses.replace(tile, block_q=block_q, block_k=block_k)

    if dtype.itemsize == 2:
        choices = _ATTENTION[_family(arch)]
    else:
        choices = _ATTENTION_FP32_IN_99_KIB if _has_99_kib(arch) else _ATTENTION_FP32
    return GatedAttentionConfig(*(fit(AttentionTile(*sizes)) for sizes in choices[width]))


def _split_rows(
    rows: int, columns: int, shape: tuple[int, ...], arch: str, least: int = 1
) -> Panel:
    """Rows split over about eight programs per multiprocessor, so that many loads are in flight;
    least: tiles that one program goes through, so that its result is small beside them."""
    t, n = shape
    splits = min(8 * _UNITS[_family(arch)] // -(-n // columns), -(-t // (rows * least)))
    tiles = -(-t // (rows * max(1, splits)))
    return Panel(rows, columns, span=rows * max(1, tiles), num_warps=8)


def _column_dot(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """shape (T, N). Tiles of 16 KiB per operand."""
    if arch == "cpu":
        return Panel(16, _pow2_between(16, shape[1], 256), span=512, num_warps=1)
    return _split_rows(16, _pow2_between(32, shape[1], 1024 // dtype.itemsize), shape, arch)


def _channel_stats(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """shape (T, C). One 16-byte load per thread and tile: five numbers per element of a tile stay
    in registers."""
    if arch == "cpu":
        return Panel(16, _pow2_between(16, shape[1], 256), span=512, num_warps=1)
    rows = 8 if arch.startswith("gfx") else 4
    columns = _pow2_between(32, shape[1], 1024 // dtype.itemsize)
    return _split_rows(rows, columns, shape, arch, least=64 // rows)


# (family, 16-bit operands) -> tile of the forward of gated_mlp, which has two accumulators
_DUAL = {
    ("sm_80", True): Tile(128, 64, 64, num_warps=8, num_stages=3),
    ("sm_80", False): Tile(64, 32, 32, num_warps=4, num_stages=3),
    ("sm_90", True): Tile(128, 128, 64, num_warps=8, num_stages=4, persistent=1),
    ("sm_90", False): Tile(64, 32, 32, num_warps=4, num_stages=3),
    ("sm_100", True): Tile(128, 128, 64, num_warps=8, num_stages=4, persistent=1),
    ("sm_100", False): Tile(64, 32, 32, num_warps=4, num_stages=3),
    ("sm_120", True): Tile(128, 64, 64, num_warps=8, num_stages=3, persistent=1),
    ("sm_120", False): Tile(64, 32, 32, num_warps=4, num_stages=3),
    ("gfx942", True): Tile(128, 64, 64, num_warps=8, num_stages=2),
    ("gfx942", False): Tile(64, 32, 32, num_warps=4, num_stages=2),
}


def _gated_mlp(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> GatedMLPConfig:
    """shape (T, F, K, branches): 2 branches with gate_proj, 1 without."""
    t, f, k, branches = shape
    if arch == "cpu":
        large = dual = _CPU
    else:
        large = _LARGE[_matmul_family(arch), dtype.itemsize == 2]
        dual = _DUAL[_matmul_family(arch), dtype.itemsize == 2]
    # dx sums two products and the low-rank step apart: three sums share the tensor memory.
    narrow = arch.startswith("sm_10") and branches == 2
    wide_dx = dataclasses.replace(large, block_n=128, num_stages=3) if narrow else large
    return GatedMLPConfig(
        fwd=_fit(dual if branches == 2 else large, t, f),
        down=_gated_linear((t, k, f), dtype, arch).fwd,
        dh=_fit(large, t, f),
        dx=_fit(wide_dx, t, k),
        dw=_gated_linear((t, f, k), dtype, arch).dw,
        low=_fit(large, min(t, 64), 64),
    )


def _gated_swiglu(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> GatedMLPConfig:
    """As gated_mlp, but its dh has no matmul: a tile that fits the registers, and no pipeline."""
    config = _gated_mlp(shape, dtype, arch)
    if arch == "cpu":
        return config
    dh = _fit(Tile(64, 128, 16, num_warps=8, num_stages=1), shape[0], shape[1])
    return dataclasses.replace(config, dh=dh)


def _scatter_add(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """shape (T, D). Tiles of 8 KiB, so that the slots of a tile's columns serve 16 rows."""
    if arch == "cpu":
        return Panel(16, _pow2_between(16, shape[1], 256), span=512, num_warps=1)
    return _split_rows(16, _pow2_between(32, shape[1], 512 // dtype.itemsize), shape, arch)


def _gather_norm(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> Panel:
    """shape (T, D). The forward holds whole rows in registers; columns tile what it gathers, and
    the backward: 8 elements per thread."""
    block_d = _pow2_between(16, shape[1], 1 << 20)
    if arch == "cpu":
        return Panel(4, _pow2_between(16, shape[1], 256), span=512, num_warps=1)
    rows, num_warps = _pow2_between(1, 16384 // block_d, 4), 8 if block_d <= 8192 else 16
    panel = _split_rows(rows, min(256 * num_warps // rows, block_d), shape, arch, 64 // rows)
    return dataclasses.replace(panel, num_warps=num_warps)


_CHOICES = {
    "gated_attention": _gated_attention,
    "channel_stats": _channel_stats,
    "column_dot": _column_dot,
    "gate_penalty": _gate_penalty,
    "gated_linear": _gated_linear,
    "gated_mlp": _gated_mlp,
    "gated_swiglu": _gated_swiglu,
    "gather_norm": _gather_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "packed_linear": _packed_linear,
    "sample_gates": _gate_vector,
    "scatter_add": _scatter_add,
}


def choose_config(op: str, shape: tuple[int, ...], dtype: torch.dtype, arch: str):
    """The configuration of one op: a GatedLinearConfig for shape (T, N, K) of "gated_linear", ...

    The function that _CHOICES names for the op says what its shape stands for. dtype is that of the
    operands. arch is "sm_<n>", "gfx<n>" or "cpu" (Triton's interpreter). Refuses an unknown op.
    """
    if op not in _CHOICES:
        raise ValueError(f"op: expected one of {sorted(_CHOICES)}, got {op!r}")
    return _CHOICES[op](shape, dtype, arch)
