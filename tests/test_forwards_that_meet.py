"""Forwards that meet others: layers that gradient checkpointing runs again after later forwards,
caches that were filled under noise, and caches that no gated forward filled."""

import copy
from operator import attrgetter

import pytest
import torch
from tiny import for_family, mask_dense, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.families import FAMILIES
from gatepack.gates import mix

IDS = token_ids()
UNITS = [("heads", "channels"), ("rows", "columns")]
BETWEEN = ["training", "reference", "evaluation", "all open", "another path"]


def gated(model_type="llama", noise=0.2, units=UNITS[0], seed=0, **overrides):
    model = tiny_model(model_type, **overrides)
    config = gp.GateConfig(noise=noise, target=0.9, width_multiple=1, units=units, seed=seed)
    gates = gp.attach(model, for_family(model_type, config))
    set_gates(gates, "mixed")
    return model.train(), gates


def save_activations(model, use_reentrant=False):
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    return model


def weighted(logits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=generator)).sum()


def head_counts(gates):
    return [
        attrgetter(name)(attention)
        for attention, family, _ in gates.attachment.attentions
        for name, _ in family.head_attributes
    ]


def gradients(model, gates, between, monkeypatch):
    """Gradients of a forward whose backward comes after another forward, or with its loss."""
    loss = weighted(model(IDS).logits)
    if between == "training":
        loss = loss + weighted(model(IDS.flip(1)).logits, 1)
    if between == "another path":
        monkeypatch.setenv("GATEPACK_BACKEND", "dense")
    with gates.all_open() if between == "all open" else torch.enable_grad():
        if between != "training":
            with torch.no_grad():
                model.train(between != "evaluation")(IDS.flip(1))
        paths, counts, draws = gates.paths, head_counts(gates), int(gates.draws)
        loss.backward()
    assert gates.paths is paths and head_counts(gates) == counts and int(gates.draws) == draws
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys() and "gatepack_gates.logits" in found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


class TestCheckpointing:
    @pytest.mark.parametrize("between", BETWEEN)
    @pytest.mark.parametrize("units", [*UNITS, ("channels",)], ids="-".join)
    def test_layers_run_again_with_their_own_gates(self, units, between, monkeypatch):
        found = []
        for saving in (False, True):
            monkeypatch.setenv("GATEPACK_BACKEND", "folded")
            model, gates = gated(units=units)
            if saving:
                save_activations(model)
            found.append(gradients(model, gates, between, monkeypatch))
        assert_equal_gradients(found[1], found[0])

    @pytest.mark.parametrize("path", ["folded", "dense"])
    @pytest.mark.parametrize("model_type", sorted(FAMILIES))
    def test_every_family(self, model_type, path, monkeypatch):
        monkeypatch.setenv("GATEPACK_BACKEND", path)
        found = []
        for saving in (False, True):
            model, gates = gated(model_type)
            if saving:
                save_activations(model)
            found.append(gradients(model, gates, "reference", monkeypatch))
        assert_equal_gradients(found[1], found[0])

    def test_switched_on_again_and_copied(self, folded, monkeypatch):
        expected = gradients(*gated(), "training", monkeypatch)
        model, _ = gated()
        with torch.no_grad():
            save_activations(model).eval()(IDS)
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            model(IDS)
        save_activations(model.train())
        twin = copy.deepcopy(model)
        for each in (twin, model, copy.deepcopy(model)):
            gates = gp.gates_of(each)
            each.zero_grad()
            gates.draws.zero_()
            gates.sync_from_buffers()
            assert_equal_gradients(gradients(each, gates, "training", monkeypatch), expected)
        assert gp.gates_of(twin).logits.grad is not gp.gates_of(model).logits.grad

    def test_detach_leaves_the_functions_of_transformers(self, folded):
        model, _ = gated()
        layers = save_activations(model).model.layers
        functions = [layer._gradient_checkpointing_func for layer in layers]
        model(IDS)
        gp.detach(model)
        assert [layer._gradient_checkpointing_func for layer in layers] == functions
        weighted(model(IDS).logits).backward()

    def test_reentrant_is_for_frozen_gates(self, folded, monkeypatch):
        model, gates = gated()
        save_activations(model, use_reentrant=True).enable_input_require_grads()
        expected = r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}'
        with pytest.raises(ValueError, match=expected):
            model(IDS)
        found = []
        for each in (gated()[0], model):
            gates = gp.gates_of(each)
            gates.freeze()
            found.append(gradients(each, gates, "all open", monkeypatch))
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, msg=name)


def drawn_values(gates, number=0):
    """Values of a draw, computed beside the GateSet; differentiable in what is returned second."""
    generator = torch.Generator().manual_seed(mix(gates.config.seed, number))
    logits = gates.logits.detach().clone().requires_grad_()
    noise = gates.estimator.noise_like(logits, generator)
    return gates.split(gates.estimator.values(logits, noise).double()), logits


GREEDY = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


class TestNoisyCache:
    @pytest.mark.parametrize("path", ["folded", "dense", None])
    @pytest.mark.parametrize(
        "model_type, overrides",
        [("llama", {}), ("llama", {"num_key_value_heads": 6}), ("gpt2", {})],
        ids=["grouped", "one-to-one", "gpt2"],
    )
    def test_generate_draws_once(self, model_type, overrides, path, monkeypatch):
        if path:
            monkeypatch.setenv("GATEPACK_BACKEND", path)
        for seed in range(8):
            model, gates = gated(model_type, seed=seed, **overrides)
            with torch.no_grad():
                gates.logits.fill_(-0.5)
            reference = tiny_model(model_type, **overrides)
            with torch.no_grad():
                mask_dense(reference, drawn_values(gates)[0])
            got, expected = (
                each.generate(IDS[:, :3], max_new_tokens=6, **GREEDY) for each in (model, reference)
            )
            assert torch.equal(got.sequences, expected.sequences) and int(gates.draws) == 1
            torch.testing.assert_close(got.logits, expected.logits, rtol=1e-6, atol=1e-6)
            model.generate(IDS[:, :3], max_new_tokens=2, **GREEDY)
            assert int(gates.draws) == 2

    def test_rows_and_columns(self, folded):
        model, gates = gated(units=UNITS[1])
        got = model.generate(IDS[:, :3], max_new_tokens=6, **GREEDY)
        gates.draws.zero_()
        gates.sync_from_buffers()
        expected = model(got.sequences[:, :-1], use_cache=False).logits[:, 2:]
        found = torch.stack(got.logits, 1).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_kernels_repeat_their_draw(self, monkeypatch):
        monkeypatch.setenv("GATEPACK_BACKEND", "triton")
        model, gates = gated(dtype=torch.float32)
        cache = model(IDS[:, :5]).past_key_values
        first = gates.sample().flat
        model(IDS)
        assert int(gates.draws) == 2 and not torch.equal(gates.sample().flat, first)
        for each in (copy.deepcopy(cache), cache):
            model(IDS[:, 5:6], past_key_values=each)
            assert int(gates.draws) == 2 and torch.equal(gates.sample().flat, first)

    @torch.no_grad()
    @pytest.mark.parametrize("training", [False, True])
    def test_mode_may_change(self, training, folded):
        """A cache goes on with the noise that it began with, or without, and so do its copies."""
        model, gates = gated()
        reference = tiny_model("llama").train()
        values = gates.split(gates.deterministic_values().double())
        mask_dense(reference, drawn_values(gates)[0] if training else values)
        cache = model.train(training)(IDS[:, :5]).past_key_values
        expected = reference(IDS).logits[:, 5:]
        for each in (copy.deepcopy(cache), cache):
            got = model.train(not training)(IDS[:, 5:], past_key_values=each).logits
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            model.train()(IDS)

    def test_training_on_a_cache_reaches_the_logits(self, folded):
        model, gates = gated()
        with torch.no_grad():
            cache = model(IDS[:, :5]).past_key_values
        reference = tiny_model("llama").train()
        values, logits = drawn_values(gates)
        mask_dense(reference, values)
        with torch.no_grad():
            whole = reference(IDS[:, :5]).past_key_values
        got = model(IDS[:, 5:], past_key_values=cache).logits
        expected = reference(IDS[:, 5:], past_key_values=whole).logits
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        weighted(got).backward()
        weighted(expected).backward()
        size = float(logits.grad.abs().max())
        torch.testing.assert_close(gates.logits.grad, logits.grad, rtol=1e-5, atol=1e-6 * size)


class TestForeignCache:
    @pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 6}], ids=["grouped", "same"])
    @pytest.mark.parametrize("path", ["folded", "dense", None])
    def test_prefix_tuning(self, path, overrides, monkeypatch):
        peft = pytest.importorskip("peft")
        if path:
            monkeypatch.setenv("GATEPACK_BACKEND", path)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)

        def tuned(model):
            torch.manual_seed(0)
            return peft.get_peft_model(model, config).double()

        model, gates = gated(**overrides)
        values, logits = drawn_values(gates)
        reference = tuned(mask_dense(tiny_model("llama", **overrides), values))
        model = tuned(model)
        gates.unfreeze()
        got, expected = (each.train()(input_ids=IDS).logits for each in (model, reference))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        weighted(got).backward()
        weighted(expected).backward(retain_graph=True)
        size = float(logits.grad.abs().max())
        torch.testing.assert_close(gates.logits.grad, logits.grad, rtol=1e-5, atol=1e-6 * size)
        gates.draws.zero_()
        gates.sync_from_buffers()
        got, expected = (
            each.generate(input_ids=IDS, max_new_tokens=4, **GREEDY) for each in (model, reference)
        )
        assert torch.equal(got.sequences, expected.sequences) and int(gates.draws) == 1

    @torch.no_grad()
    @pytest.mark.parametrize("units", UNITS, ids="-".join)
    def test_a_cache_of_before_attach(self, units, folded):
        model = tiny_model("llama").eval()
        cache = model(IDS[:, :5]).past_key_values
        config = gp.GateConfig(noise=0.0, target=0.9, width_multiple=1, units=units)
        gates = gp.attach(model, config)
        set_gates(gates, "mixed")
        kept = copy.deepcopy(cache)
        got = model(IDS[:, 5:], past_key_values=cache).logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GATEPACK_BACKEND", "dense")
            expected = model(IDS[:, 5:], past_key_values=kept).logits
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


class TestValueGradients:
    """value_grads: summed over the forwards that backward passes reach since the last of them."""

    @pytest.fixture(params=UNITS, ids="-".join)
    def trained(self, request, folded):
        return gated(units=request.param)

    @staticmethod
    def forward(model, gates, seed=0):
        """A loss and the values of its gates, whose gradient is kept."""
        loss = weighted(model(token_ids(seed=seed)).logits, seed)
        values = gates.sample().flat
        values.retain_grad()
        return loss, values

    def test_two_forwards_and_one_backward(self, trained):
        model, gates = trained
        (first, a), (second, b) = (self.forward(model, gates, seed) for seed in (0, 1))
        (first + second).backward()
        assert not torch.equal(a, b) and a.grad.any() and b.grad.any()
        torch.testing.assert_close(gates.value_grads(), a.grad + b.grad)

    def test_each_forward_with_its_backward(self, trained):
        model, gates = trained
        for seed in (0, 1):
            loss, values = self.forward(model, gates, seed)
            loss.backward()
            torch.testing.assert_close(gates.value_grads(), values.grad)

    def test_a_forward_without_gradients_between(self, trained):
        model, gates = trained
        loss, values = self.forward(model, gates)
        with torch.no_grad():
            model.eval()(IDS)
        with pytest.raises(RuntimeError, match="run a training forward and backward first"):
            gates.value_grads()
        loss.backward()
        assert values.grad.any()
        torch.testing.assert_close(gates.value_grads(), values.grad)

    def test_checkpointed_layers(self, trained):
        model, gates = trained
        save_activations(model)
        (first, a), (second, b) = (self.forward(model, gates, seed) for seed in (0, 1))
        (first + second).backward()
        torch.testing.assert_close(gates.value_grads(), a.grad + b.grad)
