"""choose_path, on a GPU that need not be there."""

import pytest
import torch

from gatepack import paths

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for an sm_90 that captures nothing."""
    from gatepack.kernels import _common

    monkeypatch.setattr(_common, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize(("width", "limit"), [(576, 64), (1024, 64), (2048, 256), (4096, 512)])
def test_few_and_many_tokens(gpu, width, limit):
    assert paths.few_tokens(width, GPU) == limit
    few = paths.choose_path(limit, width, GPU)
    assert few == ("triton", f"at most {limit} tokens")
    assert paths.choose_path(limit + 1, width, GPU) == ("folded", f"more than {limit} tokens")


def test_a_rule_can_name_a_chip(gpu, monkeypatch):
    rules = (paths.Rule("sm_100", 1024, 8), paths.Rule("sm_9", 1024, 16), *paths.RULES)
    monkeypatch.setattr(paths, "RULES", rules)
    assert paths.few_tokens(1024, GPU) == 16 and paths.few_tokens(2048, GPU) == 256


def test_every_width_has_a_rule():
    assert any(rule.arch == "" and rule.width == float("inf") for rule in paths.RULES)


def test_capture_never_waits_for_the_host(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    expected = ("triton", "a CUDA graph is being captured")
    assert paths.choose_path(8192, 4096, GPU) == expected


def test_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(paths, "_has_triton", lambda: False)
    assert paths.choose_path(1, 4096, GPU) == ("folded", "triton is not installed")
    assert paths.few_tokens(4096, GPU) == 0


@pytest.mark.parametrize(
    ("kept", "limit"), [(0.0, 13), (0.4, 27), (0.6, 46), (0.8, 114), (0.9, 344)]
)
def test_a_cpu_packs_where_that_saves_more_than_it_costs(kept, limit):
    assert paths.few_tokens(576, CPU, kept) == limit
    few = paths.choose_path(limit, 576, CPU, kept)
    assert few == ("dense", f"at most {limit} tokens with {kept:.0%} open")
    many = paths.choose_path(limit + 1, 576, CPU, kept)
    assert many == ("folded", f"more than {limit} tokens with {kept:.0%} open")


def test_without_gradients_a_cpu_packs_later():
    """One product to save on, not two."""
    with torch.no_grad():
        assert paths.few_tokens(576, CPU, 0.6) == 92
        assert paths.choose_path(92, 576, CPU, 0.6).path == "dense"
        assert paths.choose_path(93, 576, CPU, 0.6).path == "folded"


def test_the_width_counts():
    """What a call costs beside its bytes is little there; where memory is fresh, all cost more."""
    assert paths.few_tokens(2048, CPU, 0.6) == 27
    assert paths.few_tokens(4096, CPU, 0.6) == 151


def test_a_cpu_never_packs_what_is_nearly_all_open():
    assert paths.choose_path(10**9, 576, CPU) == ("dense", "nothing is closed")
    little = ("dense", "too little to pack for is closed")
    assert paths.choose_path(10**9, 576, CPU, 0.96) == little
    assert paths.choose_path(10**9, 576, CPU, 0.95).path == "folded"


@pytest.mark.parametrize(("kept", "tokens"), [(0.4, 311), (0.6, 230), (1.0, 164)])
def test_backward_packs_again_where_that_is_cheap(kept, tokens):
    mlp = (1536, 576)
    assert paths.packs_again(tokens + 1, mlp, CPU, kept)
    assert not paths.packs_again(tokens, mlp, CPU, kept)
    assert not paths.packs_again(tokens + 1, (576, 576), CPU, kept)
    assert not paths.packs_again(tokens + 1, (4096, 14336), CPU, kept)
    assert not paths.packs_again(tokens + 1, mlp, GPU, kept)
    assert not paths.packs_again(tokens + 1, mlp, CPU, 0.0)
    assert not paths.packs_again(tokens + 1, (0, 576), CPU, kept)


def test_force(gpu, monkeypatch):
    for forced, device in (("triton", CPU), ("folded", GPU), ("dense", GPU)):
        monkeypatch.setenv("GATEPACK_BACKEND", forced)
        assert paths.choose_path(1, 576, device) == (forced, "GATEPACK_BACKEND")
