import dataclasses

import pytest
import torch

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


def test_integers_round_trip():
    config = choose_config("gated_linear", (64, 128, 256), torch.float16, "sm_90")
    assert GatedLinearConfig.from_ints(config.to_ints()) == config
    with pytest.raises(ValueError, match="config: expected 21 integers"):
        GatedLinearConfig.from_ints([1, 2, 3])


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_m", 8), ("block_n", 48), ("num_warps", 3), ("num_stages", 0), ("persistent", -1)],
)
def test_tile_refuses(field, value):
    tile = Tile(16, 16, 16, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match=f"{field}: expected .* got {value}"):
        dataclasses.replace(tile, **{field: value})


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op: expected one of .*'gated_linear'.* got 'nothing'"):
        choose_config("nothing", (1, 1, 1), torch.float32, "sm_90")
