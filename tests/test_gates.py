"""GateSet: sampling, closing and budget terms, on bare specs and on a tiny model."""

import copy
import pickle

import pytest
import torch
from tiny import make_gates, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.gates import GateSet


def gated_llama(pattern="mixed", **config):
    model = tiny_model("llama")
    gates = gp.attach(
        model, gp.GateConfig(**{"noise": 0.3, "target": 0.5, "width_multiple": 4, **config})
    )
    set_gates(gates, pattern)
    return model.train(), gates


def closed_units(values):
    return (values == 0).nonzero().squeeze(1).tolist()


class TestSampling:
    def test_one_sample_per_forward(self):
        model, gates = gated_llama()
        seen = []
        for module in model.modules():
            if hasattr(module, "site"):
                module.register_forward_hook(lambda *_: seen.append(gates.sample()))
        model(token_ids())
        assert len(seen) == 14 and len(set(map(id, seen))) == 1
        assert int(gates.draws) == 1
        model(token_ids())
        assert len(set(map(id, seen))) == 2 and int(gates.draws) == 2

    def test_noise_changes_with_each_draw_and_seed(self):
        gates = make_gates(init_logit=0.0, seed=1)
        first, second = (gates.draw().flat.clone() for _ in range(2))
        other = make_gates(init_logit=0.0, seed=2).draw().flat
        assert not torch.equal(first, second)
        assert not torch.equal(first, other)
        again = make_gates(init_logit=0.0, seed=1)
        assert torch.equal(again.draw().flat, first) and torch.equal(again.draw().flat, second)

    def test_global_random_state_plays_no_part(self):
        gates, again = make_gates(init_logit=0.0), make_gates(init_logit=0.0)
        torch.manual_seed(1)
        first = gates.draw().flat
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(again.draw().flat, first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_resume_gives_the_next_sample(self):
        gates = make_gates(init_logit=0.0)
        for _ in range(3):
            gates.draw()
        resumed = make_gates(init_logit=1.0)
        resumed.draw()
        resumed.load_state_dict(copy.deepcopy(gates.state_dict()))
        assert torch.equal(resumed.draw().flat, gates.draw().flat)
        assert int(resumed.draws) == 4

    def test_sample_is_the_estimator_plus_noise(self):
        gates = make_gates(init_logit=0.0, noise=0.3)
        flat = gates.draw().flat.detach()
        noise = (flat - 0.5)[(flat > 0) & (flat < 1)]
        assert noise.numel() > 10
        assert 0.15 <= float(noise.std()) <= 0.45

    def test_eval_is_deterministic_and_cached(self):
        gates = make_gates(init_logit=0.0).eval()
        with torch.no_grad():
            sample = gates.draw()
            assert gates.draw() is sample
        assert torch.equal(sample.flat, gates.deterministic_values())
        assert int(gates.draws) == 0

    @pytest.mark.parametrize("change", ["logits", "close", "freeze", "load", "train"])
    def test_cache_does_not_outlive_its_inputs(self, change):
        gates = make_gates(init_logit=0.0).eval()
        with torch.no_grad():
            stale = gates.draw()
            if change == "logits":
                gates.logits.fill_(-1.0)
            elif change == "close":
                gates.close("a:heads", [0])
            elif change == "freeze":
                gates.freeze()
            elif change == "load":
                gates.load_state_dict(make_gates(init_logit=-1.0).state_dict())
            elif change == "train":
                gates.train()
            assert gates.sample() is not stale
            assert gates.draw() is not stale

    def test_freeze_drops_a_noisy_sample(self):
        gates = make_gates(init_logit=0.0)
        noisy = gates.draw().flat
        gates.freeze()
        assert torch.equal(gates.draw().flat, gates.deterministic_values())
        assert not torch.equal(gates.draw().flat, noisy)

    def test_sample_read_without_grad_does_not_lose_the_gradient(self):
        gates = make_gates(init_logit=0.0).eval()
        with torch.no_grad():
            assert not gates["a:heads"].values().requires_grad
        assert gates["a:heads"].values().requires_grad

    def test_a_graph_that_was_walked_is_not_used_again(self):
        model, gates = gated_llama(noise=0.0)
        model.eval()(token_ids())
        gates.logits.requires_grad_(False)
        for seed in (0, 1):
            hidden = model.get_input_embeddings()(token_ids(seed=seed)).detach().requires_grad_()
            model(inputs_embeds=hidden).logits.sum().backward()
            assert hidden.grad.abs().sum() > 0

    def test_inference_mode_then_training(self):
        model, gates = gated_llama(noise=0.0)
        with torch.inference_mode():
            expected = model.eval()(token_ids()).logits.clone()
        got = model.train()(token_ids()).logits
        assert torch.equal(got, expected.clone())
        got.backward(torch.randn_like(got))
        assert gates.logits.grad.abs().max() > 0
        with torch.inference_mode():
            assert torch.equal(model.eval()(token_ids()).logits, expected)

    def test_no_grad_training_forward_is_noisy_too(self):
        gates = make_gates(init_logit=0.0)
        with torch.no_grad():
            assert not torch.equal(gates.draw().flat, gates.draw().flat)


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_logits_keep_their_bits_when_the_model_is_cast(self, dtype):
        model, gates = gated_llama()
        before = gates.logits.detach().clone()
        parameter = gates.logits
        model.to(dtype)
        assert model.lm_head.weight.dtype == dtype
        assert gates.logits is parameter and gates.logits.dtype == torch.float32
        assert torch.equal(gates.logits, before)
        assert gates.closed.dtype == torch.bool and gates.draws.dtype == torch.int64
        assert gates.controller.state.dtype == torch.float32
        assert model(token_ids()).logits.dtype == dtype

    def test_half_and_bfloat16_methods(self):
        gates = make_gates(init_logit=1.0009765)
        before = gates.logits.detach().clone()
        assert torch.equal(gates.half().bfloat16().logits, before)

    def test_moves_between_devices(self):
        gates = make_gates().to("meta")
        assert gates.logits.is_meta and gates.closed.is_meta and gates.logits.dtype == torch.float32


class TestClosing:
    def test_closed_is_exactly_zero_until_reopened(self):
        gates = make_gates(init_logit=3.0)
        gates.close("b:channels", [2, 5])
        for training in (True, False):
            gates.train(training)
            assert closed_units(gates["b:channels"].values()) == [2, 5]
            assert closed_units(gates.draw().values["b:channels"]) == [2, 5]
        gates.reopen("b:channels", [5])
        assert closed_units(gates["b:channels"].values()) == [2]

    def test_training_does_not_reopen(self):
        gates = make_gates(init_logit=0.3)
        gates.close("a:heads", [1])
        before = gates.logits[1].item()
        optimizer = torch.optim.Adam(gates.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            (gates.penalty() - 3 * gates.draw().flat[:9].sum()).backward()
            assert gates.logits.grad[1] == 0
            optimizer.step()
        assert gates.logits[1].item() == before
        assert closed_units(gates.draw().values["a:heads"]) == [1]

    def test_reopen_opens_a_shut_logit(self):
        gates = make_gates().eval()
        with torch.no_grad():
            gates.logits[gates["b:channels"].start :] = -3.0
        assert gates.open_fraction("b:channels") == 0.0
        gates.reopen("b:channels", torch.tensor([3]))
        assert gates["b:channels"].values()[3] == 1.0
        assert gates.open_fraction("b:channels") == 1 / 16

    @pytest.mark.parametrize("indices", [[16], [-1], [0, 99]])
    @pytest.mark.parametrize("method", ["close", "reopen"])
    def test_out_of_range_is_refused(self, method, indices):
        gates = make_gates()
        with pytest.raises(ValueError, match=r"indices of 'b:channels' must be in \[0, 16\), got"):
            getattr(gates, method)("b:channels", indices)
        assert not gates.closed.any()

    @pytest.mark.parametrize("indices", [torch.ones(16, dtype=torch.bool), [0.5]])
    def test_indices_that_are_no_integers_are_refused(self, indices):
        with pytest.raises(ValueError, match="indices of 'b:channels' must be integers, got torch"):
            make_gates().close("b:channels", indices)

    @pytest.mark.parametrize("indices", [None, {1, 2}, "1"])
    def test_indices_that_are_no_sequence_are_refused(self, indices):
        with pytest.raises(
            ValueError, match="indices of 'b:channels' must be a tensor or sequence"
        ):
            make_gates().close("b:channels", indices)

    def test_empty_and_single_indices(self):
        gates = make_gates()
        gates.close("b:channels", [])
        assert not gates.closed.any()
        gates.close("b:channels", 4)
        assert gates.closed.nonzero().tolist() == [[gates["b:channels"].start + 4]]

    def test_unknown_gate_is_refused_by_name(self):
        with pytest.raises(
            ValueError, match="no gate named 'c:heads'; the first of 2 is 'a:heads'"
        ):
            make_gates().close("c:heads", [0])

    def test_set_open_closes_what_the_mask_leaves_out(self):
        gates = make_gates().eval()
        gates.close("b:channels", [0])
        mask = torch.arange(16) % 3 == 0
        gates.set_open({"b:channels": mask})
        assert torch.equal(gates["b:channels"].values() > 0, mask)
        gates.set_open({"b:channels": mask.tolist()})
        assert torch.equal(gates["b:channels"].values() > 0, mask)
        assert not gates.closed[:6].any()

    @pytest.mark.parametrize("mask", [torch.ones(1, dtype=torch.bool), torch.ones(16)])
    def test_set_open_refuses_other_shapes(self, mask):
        with pytest.raises(ValueError, match=r"masks\['b:channels'\] must be bool \[16\], got"):
            make_gates().set_open({"b:channels": mask})


class TestFreezing:
    def test_freeze_stops_noise_and_gradients(self):
        model, gates = gated_llama()
        gates.freeze()
        assert not gates.logits.requires_grad
        first, second = (model(token_ids()).logits for _ in range(2))
        assert torch.equal(first, second)
        first.backward(torch.randn_like(first))
        assert gates.logits.grad is None
        gates.unfreeze()
        assert gates.logits.requires_grad
        assert not torch.equal(model(token_ids()).logits, first)

    def test_frozen_logits_error_after_get_peft_model(self):
        peft = pytest.importorskip("peft")
        model, gates = gated_llama()
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
        assert not gates.logits.requires_grad
        with pytest.raises(
            RuntimeError,
            match=r"get_peft_model freezes .*call gates\.unfreeze\(\).*gates\.freeze\(\)",
        ):
            model(token_ids())
        with torch.no_grad():
            model(token_ids())
        model.eval()(token_ids())
        gates.unfreeze()
        assert model.train()(token_ids()).logits.requires_grad


class TestNumbers:
    def test_summary_counts(self):
        gates = make_gates()
        with torch.no_grad():
            gates.logits[:6] = torch.tensor([2.0, 2.0, 0.1, -2.0, -2.0, -2.0])
            gates.logits[6:] = 2.0
        gates.close("b:channels", [0, 1, 2, 3])
        summary = gates.summary()
        assert summary.rows == (
            ("a:heads", "heads", 6, 3, 1),
            ("b:channels", "channels", 16, 12, 0),
        )
        assert summary.open_fraction == gates.open_fraction() == pytest.approx(15 / 22, abs=1e-7)
        assert gates.open_fraction("b:channels") == 0.75
        total = 500 + 6 * 100 + 2 * 70 + 16 * 11
        assert gates.costs.total == total
        assert summary.kept_fraction == gates.kept_fraction() == (500 + 300 + 70 + 12 * 11) / total
        lines = str(summary).splitlines()
        assert lines[1].split() == ["a:heads", "heads", "6", "3", "1"]
        assert lines[-1] == "open units 68.2%, kept parameters 70.8%"

    def test_numbers_ignore_noise(self):
        gates = make_gates(init_logit=0.0, noise=5.0)
        assert gates.training and gates.open_fraction() == 1.0 and gates.kept_fraction() == 1.0

    def test_expected_cost_is_literal(self):
        gates = make_gates()
        p = torch.rand(22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kept = 500 + 100 * p[:6].sum() + 11 * p[6:].sum()
        for block in (p[:3], p[3:6]):
            kept = kept + 70 * (1 - (1 - block[0]) * (1 - block[1]) * (1 - block[2]))
        assert abs(gates.costs.expected(p) - kept / gates.costs.total) <= 1e-15
        hard = (p > 0.5).double()
        masks = {"a:heads": hard[:6].bool(), "b:channels": hard[6:].bool()}
        assert float(gates.costs.expected(hard)) == pytest.approx(
            gates.costs.kept_fraction(masks), abs=1e-15
        )

    def test_expected_cost_gradient_by_finite_differences(self):
        gates = make_gates()
        p = torch.rand(
            22, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
        )
        assert torch.autograd.gradcheck(gates.costs.expected, (p,), eps=1e-6, atol=1e-9, rtol=1e-6)

    @pytest.mark.parametrize("estimator", ["stg", "hard_concrete"])
    def test_penalty_gradient_by_finite_differences(self, estimator):
        gates = make_gates(estimator=estimator)
        logits = torch.randn(22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            gates.logits.copy_(logits)
        gates.close("b:channels", [0])
        gates.controller.state[0] = 1.5
        logits = gates.logits.detach().double()
        kept = gates.kept_fraction()
        penalty = gates.penalty()
        (grad,) = torch.autograd.grad(penalty, gates.logits)

        def literal(logits):
            p = gates.estimator.open_probability(logits).masked_fill(gates.closed, 0.0)
            return float((1.5 + 5.0 * (kept - 0.5)) * gates.costs.expected(p))

        assert penalty.item() == pytest.approx(literal(logits), rel=1e-6)
        step = 1e-5
        for unit in range(22):
            shift = torch.zeros(22, dtype=torch.float64)
            shift[unit] = step
            slope = (literal(logits + shift) - literal(logits - shift)) / (2 * step)
            assert float(grad[unit]) == pytest.approx(slope, rel=1e-4, abs=1e-7), unit
        assert grad[6] == 0 and (grad[7:] > 0).all()

    def test_needs_a_gate(self):
        with pytest.raises(ValueError, match="specs must hold at least one gate, got none"):
            GateSet(gp.GateConfig(), {})


class TestValueGrads:
    def test_equals_autograd_of_the_masked_dense_model(self):
        model = tiny_model("llama")
        reference = copy.deepcopy(model)
        gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.5, width_multiple=4))
        set_gates(gates, "mixed")
        leaf = gates.deterministic_values().detach().double().requires_grad_()
        mask_dense(reference, gates.split(leaf))
        logits = model.train()(token_ids()).logits
        upstream = torch.randn_like(logits)
        logits.backward(upstream)
        (expected,) = torch.autograd.grad(reference(token_ids()).logits, leaf, upstream)
        is_open = leaf > 0
        assert is_open.any() and not is_open.all()
        got = gates.value_grads()
        assert got.dtype == torch.float32
        assert (got - expected)[is_open].abs().max() <= 1e-6 * expected.abs().max()
        assert (got[~is_open] == 0).all()

    def test_needs_a_backward(self):
        gates = make_gates()
        with pytest.raises(RuntimeError, match="run a training forward and backward first"):
            gates.value_grads()
        gates.draw()
        with pytest.raises(RuntimeError, match="run a training forward and backward first"):
            gates.value_grads()


class TestWithoutAModel:
    def test_handles(self):
        gates = make_gates()
        assert list(gates) == ["a:heads", "b:channels"] and len(gates) == 2
        gate = dict(gates.items())["a:heads"]
        assert (gate.kind, gate.size, gate.lanes, gate.start) == ("heads", 6, 4, 0)
        assert repr(gate) == "Gate('a:heads', heads, size=6, lanes=4)"

    def test_has_no_attachment_and_is_copied_and_pickled(self):
        gates = make_gates()
        gates.draw()
        assert set(gates.state_dict()) == {"logits", "closed", "draws", "controller.state"}
        twins = (copy.deepcopy(gates), pickle.loads(pickle.dumps(gates)))
        flat = gates.draw().flat
        assert gates.attachment is None
        for twin in twins:
            assert twin.attachment is None and torch.equal(twin.draw().flat, flat)


class TestDeepcopy:
    def test_copy_is_independent(self, monkeypatch):
        monkeypatch.setenv("GATEPACK_BACKEND", "folded")  # sets the counts of heads
        model, gates = gated_llama(pattern="open", noise=0.01)
        logits = model(token_ids()).logits
        logits.backward(torch.randn_like(logits))
        twin = copy.deepcopy(model)
        twin_gates = gp.gates_of(twin)
        assert twin_gates is not gates and twin_gates.logits is not gates.logits
        gates.draw(), twin_gates.draw()
        assert torch.equal(gates.sample().flat, twin_gates.sample().flat)
        for module, other in zip(model.modules(), twin.modules(), strict=True):
            if hasattr(module, "site"):
                for role in ("in_gate", "rows_gate"):
                    gate, copied = getattr(module.site, role), getattr(other.site, role)
                    assert (gate is None) == (copied is None)
                    assert copied is None or (copied._set is twin_gates and gate._set is gates)
        before = model.eval()(token_ids()).logits
        draws = int(gates.draws)
        set_gates(twin_gates, "single")
        twin.train()(token_ids())
        assert twin.model.layers[0].self_attn.num_key_value_groups == 1
        assert model.model.layers[0].self_attn.num_key_value_groups == 3
        assert int(gates.draws) == draws
        assert torch.equal(model(token_ids()).logits, before)

    def test_copy_can_be_detached_alone(self):
        model, gates = gated_llama(pattern="single", noise=0.0)
        twin = copy.deepcopy(model)
        before = model.eval()(token_ids()).logits
        gp.detach(twin)
        assert not hasattr(twin.config, "gatepack") and model.config.gatepack
        assert not any(hasattr(module, "site") for module in twin.modules())
        assert torch.equal(
            twin.eval()(token_ids()).logits, tiny_model("llama").eval()(token_ids()).logits
        )
        assert torch.equal(model(token_ids()).logits, before)
