import pytest
import torch
import triton
import triton.language as tl

from gatepack.kernels._dropout import Dropout, kept_ref, kept_tile

COLUMNS = 40


@triton.jit
def _kept_kernel(seed_ptr, lane_ptr, out_ptr, p, row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    lane = tl.load(lane_ptr + i)
    kept = kept_tile(seed_ptr, p, row, lane, ROWS)
    out = tl.arange(0, ROWS)[:, None] * BLOCK + i[None, :]
    tl.store(out_ptr + out, kept.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 2**33 + 1, -5])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_a_tile_equals_the_reference_whatever_its_lanes(p, seed, device):
    drop = Dropout(p, torch.tensor(seed, device=device))
    expected = kept_ref(drop, 64, COLUMNS)
    lanes = torch.randperm(COLUMNS, device=device)[:16]
    for row in (0, 16, 48):
        out = torch.empty(16, 16, dtype=torch.int32, device=device)
        _kept_kernel[(1,)](drop.seed, lanes, out, p, row, ROWS=16, BLOCK=16)
        assert torch.equal(out.bool(), expected[row : row + 16, lanes])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_dropped_fraction_is_p(p, device):
    """Within 5 standard errors, over all elements and over each of the four rows of one draw."""
    kept = kept_ref(Dropout(p, torch.tensor(1, device=device)), 256, 256).view(64, 4, 256)
    for part in (kept, *kept.unbind(1)):
        error = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(1 - part.double().mean().item() - p) < 5 * error


def test_neighbours_are_independent(device):
    """Correlation of each element with the next row and the next column, within 5 / sqrt(n)."""
    kept = kept_ref(Dropout(0.5, torch.tensor(2, device=device)), 256, 256).double() * 2 - 1
    for product in (kept[1:] * kept[:-1], kept[:, 1:] * kept[:, :-1]):
        assert abs(product.mean().item()) < 5 / product.numel() ** 0.5
