import pytest
import torch
import triton
import triton.language as tl

from gatepack.kernels._common import offsets, philox, philox_uniform

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32 + 5, 2**62 + 12345, -7]
STARTS = [0, 2**31 - 8, 2**32 - 8, 2**40 + 3]


@triton.jit
def _rand_kernel(seed_ptr, out_ptr, start, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.rand(tl.load(seed_ptr), i.to(tl.int64) + start))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_philox_in_torch_equals_triton(seed, start, device):
    key, out = torch.tensor([seed], device=device), torch.empty(16, device=device)
    _rand_kernel[(1,)](key, out, start, BLOCK=16)
    counter = torch.arange(start, start + 16, device=device)
    for form in (seed, key):
        assert torch.equal(philox_uniform(philox(form, counter)[0]), out)


def test_philox_gives_the_published_words():
    """Known answer of Random123 for philox4x32-10 with counter 0 and key 0."""
    words = [word.item() for word in philox(0, torch.zeros((), dtype=torch.int64))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@triton.jit
def _offsets_kernel(out_ptr, row, stride_row, col, stride_col, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    out = offsets(row + i, stride_row, col + i, stride_col)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], out)


@pytest.mark.parametrize(
    ("row", "stride_row", "col", "stride_col"),
    [
        (2**20, 14336, 14000, 1),  # the last rows of 2^20 tokens
        (3, 1, 2**18, 2**14),  # a transposed matrix
        (2**31 - 8, 2**31 - 1, 2**31 - 8, 2**31 - 1),
        (5, 0, 2**30, 7),  # an expanded dimension
    ],
)
def test_offsets_pass_2_to_the_31(row, stride_row, col, stride_col, device):
    out = torch.empty(8, 8, dtype=torch.int64, device=device)
    _offsets_kernel[(1,)](out, row, stride_row, col, stride_col, BLOCK=8)
    expected = [
        [(row + i) * stride_row + (col + j) * stride_col for j in range(8)] for i in range(8)
    ]
    assert expected[-1][-1] > 2**31 and out.tolist() == expected
