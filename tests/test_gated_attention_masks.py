"""gated_attention on parts of the keys: masks, windows, and sequences without padding."""

import pytest
import torch
from attention import (
    SMALL_TILES,
    S,
    check,
    make_inputs,
    make_varlen,
    mostly_slow,
    padding,
    upstream,
)
from ops import ids, run, to

from gatepack.kernels import gated_attention_fn
from gatepack.testing import MODEL_SHAPES


@pytest.mark.parametrize("causal", mostly_slow([True, False]))
@pytest.mark.parametrize("kind", ["left", "right", "holes", "nothing", "strided"])
def test_key_mask(kind, causal, device):
    inputs = make_inputs(torch.float32, batch=2, z=torch.tensor([0.5, 0.0]))
    mask = padding(kind, 2, S).to(device)
    ours = check(inputs, device, causal=causal, key_mask=mask)
    if kind == "nothing":
        assert all((result == 0).all() for result in ours.values())


def test_key_mask_of_a_cache(device):
    inputs = make_inputs(torch.bfloat16, queries=2, keys=37, batch=2)
    check(inputs, device, key_mask=padding("left", 2, 37).to(device))


def test_what_the_key_mask_hides_is_never_read(device):
    inputs = to(make_inputs(torch.float32, batch=2), device)
    do, mask = upstream(inputs).to(device), padding("right", 2, S).to(device)
    clean = run(gated_attention_fn, inputs, do, key_mask=mask, config=SMALL_TILES)
    inputs["k"][~mask] = float("nan")
    inputs["v"][~mask] = float("nan")
    dirty = run(gated_attention_fn, inputs, do, key_mask=mask, config=SMALL_TILES)
    for name, tensor in clean.items():
        assert torch.equal(tensor, dirty[name]), name


@pytest.mark.parametrize("window", mostly_slow([5, 1, 16, 100], 2))
@pytest.mark.parametrize(("queries", "keys"), [(35, 35), (5, 40)])
def test_window(queries, keys, window, device):
    inputs = make_inputs(torch.float32, queries, keys, heads=1)
    check(inputs, device, window=window, cancels=True)


def test_window_beside_key_mask(device):
    inputs = make_inputs(torch.float32, batch=2, heads=2)
    check(inputs, device, window=4, key_mask=padding("left", 2, S).to(device))


@pytest.mark.parametrize("causal", mostly_slow([True, False]))
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((5, 18), (5, 18)), ((2, 0, 17), (20, 3, 4))], ids=ids
)
def test_sequences_without_padding(lengths_q, lengths_k, causal, device):
    inputs, cuts = make_varlen(torch.float32, lengths_q, lengths_k, device)
    ours = check(inputs, device, causal=causal, **cuts)
    inputs, do = to(inputs, device), upstream(inputs).to(device)
    names = ("q", "k", "v")
    splits = dict(zip(names, (lengths_q, lengths_k, lengths_k), strict=True))
    parts = {name: inputs[name].split(splits[name]) for name in names}
    dz = 0.0
    for b, do_b in enumerate(do.split(lengths_q)):
        alone = {name: parts[name][b][None] for name in names} | {"z": inputs["z"]}
        got = run(gated_attention_fn, alone, do_b[None], causal=causal, config=SMALL_TILES)
        assert torch.equal(got["y"][0], ours["y"].split(lengths_q)[b])
        for name in names:
            assert torch.equal(got[f"d{name}"][0], ours[f"d{name}"].split(splits[name])[b]), name
        dz = dz + got["dz"]
    torch.testing.assert_close(dz, ours["dz"])


def test_sequences_from_a_table_of_begins_and_ends(device):
    """cu_seqlens that are a column of it are not contiguous."""
    inputs, cuts = make_varlen(torch.float32, (5, 18), (9, 14), device)
    inputs, do = to(inputs, device), upstream(inputs).to(device)
    expected = run(gated_attention_fn, inputs, do, config=SMALL_TILES, **cuts)
    columns = {
        name: torch.stack([t, t + 1], 1)[:, 0] if name.startswith("cu_") else t
        for name, t in cuts.items()
    }
    got = run(gated_attention_fn, inputs, do, config=SMALL_TILES, **columns)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_sequences_without_padding_in_low_precision(device):
    inputs, cuts = make_varlen(torch.bfloat16, (9, 18), (9, 18), device)
    check(inputs, device, **cuts)


def test_no_sequences(device):
    inputs, cuts = make_varlen(torch.float32, (5,), (5,), device)
    inputs = {name: t if name == "z" else t[:0] for name, t in inputs.items()}
    check(inputs, device, **cuts | {f"cu_seqlens_{x}": cuts[f"cu_seqlens_{x}"][:1] for x in "qk"})


@pytest.mark.gpu
def test_sequences_of_llama_3_8b(device):
    shape = MODEL_SHAPES["llama-3-8b"]
    lengths = (700, 1, 324)
    inputs, cuts = make_varlen(torch.bfloat16, lengths, lengths, device)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "lanes": shape.head_dim}
    wide = make_inputs(torch.bfloat16, sum(lengths), **heads)
    inputs = {name: t if name == "z" else t[0] for name, t in wide.items()}
    check(inputs, device, config=None, **cuts)
