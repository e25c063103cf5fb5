import pytest
import torch
import triton
import triton.language as tl

from gatepack.kernels._common import philox, philox_uniform

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
