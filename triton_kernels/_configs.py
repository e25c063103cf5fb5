"""Stage 2, kernels: tile choices, as data.

`choose_config(op, shape, dtype, arch)` is a pure function of its arguments: it asks no device, so
the ahead-of-time tests use it for chips that are not there. The choices below come from what the
compiler reports (in 16 bit no spills, shared memory within the chip), not from timings.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """One matmul tile. block_m, block_n: output rows and columns; block_k: reduction step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def __post_init__(self):
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: expected a power of two >= 16, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps: expected 1, 2, 4, 8 or 16, got {self.num_warps}")
        for name in ("num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def _fields(*tiles) -> list[int]:
    """Every field of the tiles, in order.

    dataclasses.astuple copies deeply before Python 3.12, which torch.compile of 2.9 cannot trace.
    """
    return [getattr(tile, field.name) for tile in tiles for field in dataclasses.fields(tile)]


@dataclasses.dataclass(frozen=True)
class GatedLinearConfig:
    """Tiles of gated_linear: forward [T, N], input gradient [T, K], weight gradient [N, K]."""

    fwd: Tile
    dx: Tile
    dw: Tile

    def to_ints(self) -> list[int]:
        """Flat form that fits an operator schema; `from_ints` reads it back."""
        return _fields(self.fwd, self.dx, self.dw)

    @classmethod
    def from_ints(cls, values: list[int]) -> "GatedLinearConfig":
        if len(values) != 18:
            raise ValueError(f"config: expected 18 integers (3 tiles of 6), got {len(values)}")
        return cls(*(Tile(*values[i : i + 6]) for i in (0, 6, 12)))


_CPU = Tile(32, 64, 64, num_warps=1, num_stages=1)

# (family, 16-bit operands) -> tile of a large matmul. sm_80 also serves sm_86, sm_89 and sm_120,
# which have 99 kB of shared memory per block.
_LARGE = {
    ("sm_80", True): Tile(128, 128, 32, num_warps=8, num_stages=4),
    ("sm_80", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_90", True): Tile(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_90", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("sm_100", True): Tile(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_100", False): Tile(64, 64, 32, num_warps=4, num_stages=3),
    ("gfx942", True): Tile(128, 128, 64, num_warps=8, num_stages=2),
    ("gfx942", False): Tile(64, 64, 32, num_warps=4, num_stages=2),
}


def _family(arch: str) -> str:
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if 100 <= number < 120:
        return "sm_100"
    return "sm_90" if number == 90 else "sm_80"


def _pow2_between(low: int, value: int, high: int) -> int:
    """Smallest power of two >= value, clipped to [low, high]."""
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


def _fit(tile: Tile, rows: int, columns: int) -> Tile:
    """Shrink a tile to a short output, e.g. few tokens or the columns of a low-rank projection."""
    block_m = _pow2_between(16, rows, tile.block_m)
    block_n = _pow2_between(16, columns, tile.block_n)
    warps = tile.num_warps if block_m * block_n > 64 * 64 else min(4, tile.num_warps)
    return dataclasses.replace(tile, block_m=block_m, block_n=block_n, num_warps=warps)


def _gated_linear(shape: tuple[int, ...], dtype: torch.dtype, arch: str) -> GatedLinearConfig:
    t, n, k = shape
    large = _CPU if arch == "cpu" else _LARGE[_family(arch), dtype.itemsize == 2]
    return GatedLinearConfig(fwd=_fit(large, t, n), dx=_fit(large, t, k), dw=_fit(large, n, k))


_CHOICES = {"gated_linear": _gated_linear}


def choose_config(op: str, shape: tuple[int, ...], dtype: torch.dtype, arch: str):
    """Tiles for one op: op "gated_linear" takes shape (T, N, K) and gives a GatedLinearConfig.

    dtype is that of the operands. arch is "sm_<n>", "gfx<n>" or "cpu" (Triton's interpreter).
    Refuses an unknown op.
    """
    if op not in _CHOICES:
        raise ValueError(f"op: expected one of {sorted(_CHOICES)}, got {op!r}")
    return _CHOICES[op](shape, dtype, arch)
