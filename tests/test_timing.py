"""measure: what it runs, in which order, and how its numbers follow from the clock's."""

import json

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_model, token_ids

import gatepack as gp
from gatepack import timing
from gatepack.timing import measure

SIZES = {"prompt_tokens": 8, "new_tokens": 3, "batch_size": 2, "repeats": 3}


class Clock:
    """A clock that only forwards move: by a model's cost per token of one sequence, in seconds."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        self.order = []
        monkeypatch.setattr(timing, "now", lambda device: self.seconds)

    def drive(self, model, name, costs):
        """costs: one per forward over a prompt, the last one repeating."""
        costs = list(costs)

        def before(module, args, kwargs):
            length = kwargs["input_ids"].shape[1]
            if length > 1:
                self.order.append(name)
                module.cost = costs.pop(0) if len(costs) > 1 else costs[0]
            self.seconds += module.cost * length

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rates_and_ratios_follow_from_the_clock(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [1.0, 0.25, 0.5, 1.0])
    dense = clock.drive(tiny_model("llama", torch.float32), "dense", [1.0, 1.0, 2.0, 4.0])
    result = measure(model, dense=dense, **SIZES)
    # The first cost of each goes to the untimed forward; 2 sequences share a forward's seconds.
    for speed, costs in ((result.model, (0.25, 0.5, 1.0)), (result.dense, (1.0, 2.0, 4.0))):
        p20, median, p80 = np.quantile([2 / cost for cost in costs], (0.2, 0.5, 0.8))
        for rate in (speed.prefill, speed.decode):
            assert (rate.p20, rate.median, rate.p80) == pytest.approx((p20, median, p80))
    assert result.ratios == pytest.approx({"prefill": 4.0, "decode": 4.0})


def test_models_are_interleaved_in_alternating_order(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [1.0])
    dense = clock.drive(tiny_model("llama", torch.float32), "dense", [1.0])
    measure(model, dense=dense, **SIZES)
    assert clock.order[:2] == ["model", "dense"]
    assert clock.order[2:] == ["dense", "model", "model", "dense", "dense", "model"]


def test_warm_up_lasts_half_a_second(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [0.01])
    measure(model, **SIZES)
    # One repeat takes 8 + 3 tokens of 10 ms.
    assert len(clock.order) == 5 + SIZES["repeats"]


def test_forwards_are_a_prefill_and_greedy_steps(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [1.0])
    calls, outputs = [], []

    def record(module, args, kwargs, output):
        calls.append(kwargs)
        outputs.append(output.logits)

    model.register_forward_hook(record, with_kwargs=True)
    measure(model, **{**SIZES, "repeats": 1})
    calls, outputs = calls[4:], outputs[4:]
    assert [tuple(call["input_ids"].shape) for call in calls] == [(2, 8)] + [(2, 1)] * 3
    assert all(logits.shape == (2, 1, VOCAB) for logits in outputs)
    sequence = torch.cat([call["input_ids"] for call in calls], 1)
    got = torch.cat(outputs, 1)
    assert torch.equal(sequence[:, 8:], got[:, :-1].argmax(-1))
    with torch.no_grad():
        expected = model.eval()(input_ids=sequence, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_prompts_depend_on_the_seed_only(clock):
    prompts = []
    for seed in (3, 3, 4):
        model = clock.drive(tiny_model("llama", torch.float32), "model", [1.0])
        model.register_forward_pre_hook(
            lambda module, args, kwargs: prompts.append(kwargs["input_ids"]), with_kwargs=True
        )
        measure(model, **{**SIZES, "repeats": 1}, seed=seed)
    first, second, third = (prompts[i * len(prompts) // 3] for i in range(3))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen3"])
def test_real_clock_on_other_families(model_type):
    result = gp.measure(tiny_model(model_type, torch.float32), **{**SIZES, "repeats": 1})
    assert result.model.prefill.median > 0 and result.model.decode.median > 0
    assert result.dense is None and result.ratios is None


def test_encoder_is_timed_on_the_forward_alone(clock):
    model = clock.drive(tiny_model("bert", torch.float32), "model", [0.5])
    dense = clock.drive(tiny_model("bert", torch.float32), "dense", [1.0])
    result = measure(model, dense=dense, **SIZES)
    assert result.model.decode is None and result.model.prefill.median == pytest.approx(4.0)
    assert result.ratios == {"prefill": pytest.approx(2.0), "decode": None}
    assert "no cache" in str(result)


def test_decoder_that_returns_no_cache_is_timed_on_the_forward_alone(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [1.0])
    model.register_forward_hook(
        lambda module, args, output: output.__setitem__("past_key_values", None)
    )
    assert measure(model, **SIZES).model.decode is None


def test_gated_and_peft_models_are_measured_and_keep_their_modes():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", torch.float32)
    gp.attach(model, gp.GateConfig(target=0.5, width_multiple=4))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    model.base_model.model.model.layers[1].eval()
    before = {module: module.training for module in model.modules()}
    logits = []
    model.get_base_model().register_forward_hook(
        lambda module, args, output: logits.append(output.logits)
    )
    result = measure(model, **{**SIZES, "repeats": 1})
    assert result.model.decode is not None
    assert all(each.shape[1] == 1 and not each.requires_grad for each in logits)
    assert all(module.training == before.get(module, True) for module in model.modules())


def test_parameter_bytes_count_tied_weights_once():
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=True)
    result = measure(model, **{**SIZES, "repeats": 1})
    unique = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert result.model.parameter_bytes == 2 * sum(unique.values())
    assert result.model.dtype == "bfloat16" and result.model.peak_bytes is None


def test_result_is_plain_data_and_prints_as_a_table(clock):
    model = clock.drive(tiny_model("llama", torch.float32), "model", [0.5])
    dense = clock.drive(tiny_model("llama", torch.float32), "dense", [1.0])
    result = measure(model, dense=dense, **SIZES)
    record = json.loads(json.dumps(result.to_dict()))
    assert record["ratios"] == {"prefill": 2.0, "decode": 2.0}
    assert record["model"]["prefill"] == {"median": 4.0, "p20": 4.0, "p80": 4.0}
    assert {name: record[name] for name in SIZES} == SIZES
    header, prefill, decode, parameters, conditions = str(result).splitlines()
    assert header.split() == ["dense", "model", "ratio"]
    assert prefill.split() == [
        "prefill,",
        "tokens/s",
        *["2.0", "(2.0-2.0)"],
        "4.0",
        "(4.0-4.0)",
        "2.00x",
    ]
    assert decode.endswith("2.00x") and parameters.startswith("parameters, MB")
    assert "of 3; batch 2, prompt 8, 3 new tokens; float32, cpu" in conditions


@pytest.mark.parametrize("name", sorted(SIZES))
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        measure(tiny_model("llama", torch.float32), **{**SIZES, name: 0})


def test_prompt_longer_than_the_positions_is_refused():
    model = tiny_model("llama", torch.float32, max_position_embeddings=10)
    with pytest.raises(ValueError, match="has 10 positions, prompt_tokens and new_tokens need 11"):
        measure(model, **SIZES)
    with pytest.raises(ValueError, match="must be a transformers model"):
        measure(torch.nn.Linear(2, 2), **SIZES)
    with pytest.raises(ValueError, match="must be a transformers model.*got NoneType"):
        measure(None)


def test_models_on_two_devices_are_refused():
    model = tiny_model("llama", torch.float32)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        measure(model, dense=tiny_model("llama", torch.float32).to("meta"), **SIZES)


@pytest.mark.gpu
def test_peak_bytes_on_cuda_exclude_the_other_model():
    model, dense = (tiny_model("llama", torch.float32).cuda() for _ in range(2))
    result = measure(model, dense=dense, **SIZES)
    assert result.device == torch.cuda.get_device_name()
    for speed in (result.model, result.dense):
        assert speed.peak_bytes > speed.parameter_bytes
    alone = measure(model, **SIZES)
    assert alone.model.peak_bytes == result.model.peak_bytes
    assert model(input_ids=token_ids().cuda()).logits.isfinite().all()
