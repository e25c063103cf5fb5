import dataclasses

import pytest
import torch
from tune import neighbours

from gatepack.kernels import GatedLinearConfig, Tile, choose_config

ARCHS = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "cpu"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8192, 4096, 14336), (1, 4096, 4096), (7, 16, 576), (0, 0, 0)])
def test_every_choice_is_a_valid_tile_no_larger_than_needed(arch, dtype, shape):
    t, n, k = shape
    config = choose_config("gated_linear", shape, dtype, arch)
    for tile, (rows, columns) in ((config.fwd, (t, n)), (config.dx, (t, k)), (config.dw, (n, k))):
        assert tile.block_m < 2 * max(rows, 16) and tile.block_n < 2 * max(columns, 16)


def test_consumer_chips_get_tiles_that_fit_99_kB():
    tile = choose_config("gated_linear", (8192, 4096, 4096), torch.bfloat16, "sm_120").fwd
    assert (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages <= 99 * 1024


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120", "sm_121"])
def test_fp32_attention_fits_99_kB(arch):
    """dk and dv hold q, do, k, v and the scores of one step in shared memory."""
    tile = choose_config("gated_attention", (4096, 4096, 256, 256), torch.float32, arch).dkv
    queries, keys = tile.block_q, tile.block_k
    assert 4 * (2 * (queries + keys) * 256 + queries * keys) <= 99 * 1024


def test_integers_round_trip():
    config = choose_config("gated_linear", (64, 128, 256), torch.float16, "sm_90")
    assert GatedLinearConfig.from_ints(config.to_ints()) == config
    with pytest.raises(ValueError, match="config: expected 21 integers"):
        GatedLinearConfig.from_ints([1, 2, 3])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_m", 8),
        ("block_n", 48),
        ("block_k", 512),
        ("num_warps", 3),
        ("num_stages", 0),
        ("persistent", -1),
    ],
)
def test_tile_refuses(field, value):
    tile = Tile(16, 16, 16, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        dataclasses.replace(tile, **{field: value})


def test_tuning_tries_no_tile_that_is_too_wide():
    tried = list(neighbours(Tile(256, 256, 128, num_warps=4, num_stages=2)))
    assert {tile.block_k for tile in tried} == {64, 128, 256}
    assert all(max(tile.block_m, tile.block_n) <= 256 for tile in tried)


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op: expected one of .*'gated_linear'.* got 'nothing'"):
        choose_config("nothing", (1, 1, 1), torch.float32, "sm_90")
