"""attach and the gated forward on every family: equal to the dense masked computation, forward and
backward."""

import copy

import pytest
import torch
import transformers
from tiny import (
    CHANNELS_ONLY,
    dense_gradients,
    for_family,
    mask_dense,
    set_gates,
    tiny_model,
    token_ids,
)

import gatepack as gp
from gatepack.families import FAMILIES
from gatepack.mlp import GatedMLP
from gatepack.modules import is_gated

pytestmark = pytest.mark.usefixtures("folded")
CONFIG = gp.GateConfig(noise=0.0, target=0.5, width_multiple=4)
PATTERNS = ("open", "closed", "single", "mixed", "ragged")


def logits_of(model, **inputs):
    return model(**inputs).logits


def inputs_for(model, padded: bool = False):
    ids = token_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("path", ["folded", "dense"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_equals_masked_dense_model(model_type, pattern, path, monkeypatch):
    monkeypatch.setenv("GATEPACK_BACKEND", path)
    model = tiny_model(model_type)
    reference = copy.deepcopy(model)
    gates = gp.attach(model, for_family(model_type, CONFIG))
    set_gates(gates, pattern)
    model.train()
    values = gates.split(gates.deterministic_values().double())
    mask_dense(reference.train(), values)
    inputs = inputs_for(model, padded=True)
    got, expected = logits_of(model, **inputs), logits_of(reference, **inputs)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-6 * scale
    upstream = torch.randn_like(got)
    (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream, retain_graph=True)
    got.backward(upstream)
    error = (gates.logits.grad - gate_grad).abs().max()
    assert error <= 1e-5 * gate_grad.abs().max() + 1e-12
    expected.backward(upstream)
    got_grads, expected_grads = dense_gradients(model), dense_gradients(reference)
    assert got_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (got_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-12, name


def gated_llama(pattern="mixed", noise=0.0, model_type="llama", **config):
    model = tiny_model(model_type)
    config = gp.GateConfig(**{"noise": noise, "target": 0.5, "width_multiple": 4, **config})
    gates = gp.attach(model, for_family(model_type, config))
    set_gates(gates, pattern)
    return model, gates


def assert_close(got, expected, tolerance=1e-6):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12


class TestAttach:
    def test_detach_restores_classes_and_bits(self):
        reference = tiny_model("llama")
        model, _ = gated_llama()
        attributes = {name: vars(m).keys() for name, m in reference.named_modules()}
        model(token_ids())
        gp.detach(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
        assert {name: vars(m).keys() for name, m in model.named_modules()} == attributes
        assert model.state_dict().keys() == reference.state_dict().keys()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in reference.state_dict().items())
        assert torch.equal(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )
        assert not hasattr(model.config, "gatepack")
        with pytest.raises(ValueError, match="model has no gates"):
            gp.detach(model)
        gp.attach(model, CONFIG)

    def test_state_dict_gains_the_gates_only(self):
        model, gates = gated_llama()
        added = model.state_dict().keys() - tiny_model("llama").state_dict().keys()
        assert added == {
            f"gatepack_gates.{key}" for key in ("logits", "closed", "draws", "controller.state")
        }
        assert gp.gates_of(model) is gates

    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
    def test_direct_calls_of_the_trunk(self, model_type):
        model, gates = gated_llama(noise=0.2, model_type=model_type)
        trunk = model.eval().base_model
        reference = mask_dense(
            tiny_model(model_type), gates.split(gates.deterministic_values().double())
        )
        expected = reference.base_model.eval()(token_ids()).last_hidden_state
        assert_close(trunk(token_ids()).last_hidden_state, expected)
        model.train()
        first, second = (trunk(token_ids()).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second) and int(gates.draws) == 2

    def test_trunk_model_by_itself(self):
        trunk = tiny_model("llama").model
        reference = copy.deepcopy(trunk)
        gates = gp.attach(trunk, CONFIG)
        set_gates(gates, "mixed")
        mask_dense(reference, gates.split(gates.deterministic_values().double()))
        assert next(iter(gates)) == "layers.0.self_attn:heads"
        assert_close(trunk(token_ids()).last_hidden_state, reference(token_ids()).last_hidden_state)

    @pytest.mark.parametrize("units", ["heads", "channels"])
    def test_one_kind_of_unit(self, units):
        model, gates = gated_llama(units=(units,), target=0.9)
        assert {gate.kind for _, gate in gates.items()} == {units}
        assert isinstance(model.model.layers[0].mlp, GatedMLP) == (units == "channels")
        assert is_gated(model.model.layers[0].self_attn.q_proj) == (units == "heads")
        assert gates.costs.total == 2 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 40)
        reference = mask_dense(
            tiny_model("llama"), gates.split(gates.deterministic_values().double())
        )
        assert_close(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )

    def test_target_patterns(self):
        model, gates = gated_llama(targets=("model.layers.1.*",), target=0.8)
        assert list(gates) == ["model.layers.1.self_attn:heads", "model.layers.1.mlp:channels"]
        assert not any(is_gated(m) for m in model.model.layers[0].modules())
        reference = mask_dense(
            tiny_model("llama"), gates.split(gates.deterministic_values().double())
        )
        assert_close(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )
        for targets in (("layer.9",), ("model.layers.1.*", "layer.9")):
            with pytest.raises(ValueError, match="'layer.9' matches nothing that can be gated"):
                gp.attach(tiny_model("llama"), gp.GateConfig(targets=targets))

    def test_refuses_a_config_that_is_none(self):
        with pytest.raises(ValueError, match="config must be a GateConfig or None, got 0.5"):
            gp.attach(tiny_model("llama"), 0.5)

    def test_costs_are_the_weights_of_the_blocks_linears(self):
        for model_type in FAMILIES:
            model, gates = gated_llama(model_type=model_type)
            names = (
                "embed",
                "wpe",
                "wte",
                "word",
                "position",
                "token_type",
                "lm_head",
                "classifier",
                "pooler",
                "head.dense",
            )
            expected = sum(
                p.numel()
                for key, p in tiny_model(model_type).named_parameters()
                if p.dim() == 2 and not any(name in key for name in names)
            )
            assert gates.costs.total == expected, model_type
            assert (gates.costs.fixed > 0) == (model_type in CHANNELS_ONLY), model_type

    def test_refusals(self):
        model, _ = gated_llama()
        with pytest.raises(
            ValueError, match="already has gates; take them off with gatepack.detach"
        ):
            gp.attach(model, CONFIG)
        with pytest.raises(
            ValueError, match="must be a transformers model or a PEFT model around one, got Linear"
        ):
            gp.attach(torch.nn.Linear(2, 2), CONFIG)
        with pytest.raises(
            ValueError, match=r"target=0.3 cannot be reached: the gated units hold 51.6% of"
        ):
            gp.attach(tiny_model("llama"), gp.GateConfig(units=("heads",), target=0.3))

    def test_refused_attach_changes_nothing(self):
        model = tiny_model("llama")
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="cannot be reached"):
            gp.attach(model, gp.GateConfig(units=("heads",), target=0.3))
        assert [type(m) for m in model.modules()] == classes and not hasattr(
            model.config, "gatepack"
        )

    def test_replaced_child_is_gated_again(self):
        model, gates = gated_llama()
        linear = torch.nn.Linear(40, 48, bias=False, dtype=torch.float64)
        model.model.layers[0].mlp.down_proj = linear
        reference = tiny_model("llama")
        reference.model.layers[0].mlp.down_proj = copy.deepcopy(linear)
        mask_dense(reference, gates.split(gates.deterministic_values().double()))
        assert_close(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )
        assert is_gated(model.model.layers[0].mlp.down_proj)

    def test_unknown_family_and_register_family(self, monkeypatch):
        model = tiny_model("llama")
        model.config.model_type = "my_llama"
        with pytest.raises(
            ValueError,
            match=r"no family is known for model_type 'my_llama'; known: \['apertus'.*register",
        ):
            gp.attach(model, CONFIG)
        with pytest.raises(ValueError, match="family must be a gatepack.Family, got str"):
            gp.register_family("my_llama", "llama")
        monkeypatch.setitem(FAMILIES, "my_llama", None)
        gp.register_family("my_llama", FAMILIES["llama"])
        assert len(gp.attach(model, CONFIG)) == 4


class TestGeneration:
    @pytest.mark.parametrize("pattern", ["single", "mixed", "ragged"])
    @pytest.mark.parametrize("model_type", ["llama", "gpt2"])
    def test_greedy_tokens_with_a_cache(self, model_type, pattern):
        model, gates = gated_llama(pattern, noise=0.2, model_type=model_type)
        reference = mask_dense(
            tiny_model(model_type), gates.split(gates.deterministic_values().double())
        )
        ids = token_ids()
        arguments = {
            "max_new_tokens": 8,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
        }
        got = model.eval().generate(ids, use_cache=True, **arguments)
        assert torch.equal(got, reference.eval().generate(ids, use_cache=True, **arguments))
        assert torch.equal(got, model.generate(ids, use_cache=False, **arguments))
        assert got.shape == (2, 17)

    @torch.no_grad()
    @pytest.mark.parametrize("direct", [False, True])
    @pytest.mark.parametrize("pattern", ["single", "mixed", "ragged"])
    def test_requests_may_take_turns(self, pattern, direct, monkeypatch):
        """Attention goes on as it filled a cache, whatever ran since, for copies of the cache too;
        direct: of a trunk that is called by itself and gives a tuple."""
        monkeypatch.setenv("GATEPACK_BACKEND", "folded")
        model, gates = gated_llama(pattern)
        reference = mask_dense(
            tiny_model("llama"), gates.split(gates.deterministic_values().double())
        )
        ids, options = token_ids(), {"use_cache": True, "return_dict": not direct}
        ours, theirs = (m.eval().model if direct else m.eval() for m in (model, reference))
        caches = {}
        for path in ("folded", "dense"):
            monkeypatch.setenv("GATEPACK_BACKEND", path)
            output = ours(ids[:, :5], **options)
            caches[path] = output[1] if direct else output.past_key_values
        for other, cache in (("dense", caches["folded"]), ("folded", caches["dense"])):
            monkeypatch.setenv("GATEPACK_BACKEND", other)
            ours(ids)
            for each in (copy.deepcopy(cache), cache):
                got = ours(ids[:, 5:], past_key_values=each, **options)[0]
                assert_close(got, theirs(ids, **options)[0][:, 5:])

    @torch.no_grad()
    def test_a_cache_that_is_given_and_not_returned_keeps_its_path(self, monkeypatch):
        model, gates = gated_llama("single")
        reference = mask_dense(
            tiny_model("llama"), gates.split(gates.deterministic_values().double())
        )
        ids, cache = token_ids(), transformers.DynamicCache()
        monkeypatch.setenv("GATEPACK_BACKEND", "dense")
        model.eval()(ids[:, :5], past_key_values=cache, use_cache=False)
        monkeypatch.setenv("GATEPACK_BACKEND", "folded")
        got = model(ids[:, 5:], past_key_values=cache).logits
        assert_close(got, reference.eval()(ids).logits[:, 5:])


class TestCheckpointing:
    def test_gradients_equal_the_run_without(self):
        grads = []
        for checkpointing in (False, True):
            model, gates = gated_llama(noise=0.4, seed=5)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            hits = []
            model.model.layers[0].mlp.register_forward_pre_hook(
                lambda *_, hits=hits: hits.append(1)
            )
            logits = logits_of(model, **inputs_for(model))
            torch.manual_seed(0)
            logits.backward(torch.randn_like(logits))
            assert len(hits) == 1 + checkpointing and int(gates.draws) == 1
            grads.append({name: p.grad for name, p in model.named_parameters()})
        assert (
            grads[0].keys() == grads[1].keys() and grads[0]["gatepack_gates.logits"].abs().max() > 0
        )
        for name, grad in grads[0].items():
            assert_close(grads[1][name], grad, 1e-12 if grad.dtype == torch.float64 else 1e-6)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(model, names=("default",), targets=LINEARS, **lora):
    """Wraps model in LoRA whose B is random, the same for the same names, in fp64."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, **lora)
    model = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.double()
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def adapted_pair(order="before", pattern="mixed", names=("default",), model_type="llama", **lora):
    """A gated PEFT model, attached in the given order, with its masked dense twin and gates."""
    model = tiny_model(model_type)
    reference = adapt(copy.deepcopy(model), names, **lora)
    if order == "before":
        gates = gp.attach(model, CONFIG)
        model = adapt(model, names, **lora)
    else:
        model = adapt(model, names, **lora)
        gates = gp.attach(model, CONFIG)
    gates.unfreeze()
    set_gates(gates, pattern)
    mask_dense(reference.get_base_model(), gates.split(gates.deterministic_values().double()))
    return model.train(), reference.train(), gates


class TestPeft:
    def test_a_wrapper_around_a_wrapper(self):
        peft = pytest.importorskip("peft")
        model = tiny_model("llama").eval()
        for name in ("inner", "outer"):
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config, adapter_name=name).double()
        gates = gp.attach(model, gp.GateConfig(noise=0.0))
        gates.close("model.layers.0.mlp:channels", range(8))
        expected = logits_of(model, **inputs_for(model))
        assert gp.gates_of(model) is gates
        gp.pack(model)
        assert_close(logits_of(model, **inputs_for(model)), expected)

    @pytest.mark.parametrize("pattern", ["open", "closed", "mixed", "ragged"])
    @pytest.mark.parametrize("order", ["before", "after"])
    def test_lora_equals_masked_dense(self, order, pattern):
        model, reference, gates = adapted_pair(order, pattern)
        inputs = inputs_for(model, padded=True)
        got, expected = logits_of(model, **inputs), logits_of(reference, **inputs)
        assert_close(got, expected)
        upstream = torch.randn_like(got)
        (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream, retain_graph=True)
        got.backward(upstream)
        assert_close(gates.logits.grad, gate_grad, 1e-5)
        expected.backward(upstream)
        mine, theirs = dense_gradients(model), dense_gradients(reference)
        assert mine.keys() == theirs.keys() and len(theirs) == 28
        for name, grad in theirs.items():
            assert_close(mine[name], grad, 1e-5)

    @pytest.mark.parametrize("order", ["before", "after"])
    def test_no_adapter_is_dropped(self, order):
        model, _, gates = adapted_pair(order, "open")
        base = tiny_model("llama")
        inputs = inputs_for(model)
        model.eval()(**inputs)
        for path in LINEARS:
            where = f"model.layers.1.{'self_attn' if path[0] in 'qkvo' else 'mlp'}.{path}"
            x = torch.randn(3, base.get_submodule(where).in_features, dtype=torch.float64)
            module = model.get_base_model().get_submodule(where)
            assert (
                is_gated(module)
                and hasattr(module, "base_layer")
                and not is_gated(module.base_layer)
            )
            adapter = module.scaling["default"] * module.lora_B["default"](
                module.lora_A["default"](x)
            )
            assert adapter.abs().max() > 0
            assert_close(module(x), base.get_submodule(where)(x) + adapter)

    def test_conv1d_lora(self):
        model, reference, _ = adapted_pair(
            model_type="gpt2", targets=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
        )
        assert_close(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )

    def test_dropout_is_off_in_eval_and_on_in_training(self):
        model, reference, _ = adapted_pair(lora_dropout=0.5)
        inputs = inputs_for(model)
        assert_close(logits_of(model.eval(), **inputs), logits_of(reference.eval(), **inputs))
        first, second = (logits_of(model.train(), **inputs) for _ in range(2))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("order", ["before", "after"])
    def test_disabled_and_merged(self, order):
        model, reference, gates = adapted_pair(order)
        inputs = inputs_for(model)
        adapted = logits_of(model, **inputs)
        with model.disable_adapter(), reference.disable_adapter():
            disabled = logits_of(model, **inputs)
            assert_close(disabled, logits_of(reference, **inputs))
            assert not torch.allclose(disabled, adapted)
        model.merge_adapter()
        assert_close(logits_of(model, **inputs), adapted)
        with model.disable_adapter():
            assert_close(logits_of(model, **inputs), disabled)
        model.unmerge_adapter()
        assert_close(logits_of(model, **inputs), adapted)
        plain = model.merge_and_unload()
        assert_close(logits_of(plain, **inputs), adapted)
        assert type(plain.model.layers[0].mlp.up_proj) is gp.GatedLinear

    def test_two_adapters(self):
        model, reference, _ = adapted_pair(names=("one", "two"))
        inputs, seen = inputs_for(model), []
        for active in (["one"], ["two"], ["one", "two"]):
            for m in (model, reference):
                m.base_model.set_adapter(active)
            seen.append(logits_of(model, **inputs))
            assert_close(seen[-1], logits_of(reference, **inputs))
        assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])

    @pytest.mark.parametrize("order", ["before", "after"])
    def test_dora_takes_the_dense_path(self, order):
        model, reference, gates = adapted_pair(order, use_dora=True)
        inputs = inputs_for(model)
        got, expected = logits_of(model, **inputs), logits_of(reference, **inputs)
        assert_close(got, expected)
        upstream = torch.randn_like(got)
        (gate_grad,) = torch.autograd.grad(expected, gates.logits, upstream, retain_graph=True)
        got.backward(upstream)
        assert_close(gates.logits.grad, gate_grad, 1e-5)
        expected.backward(upstream)
        for name, grad in dense_gradients(reference).items():
            assert_close(dense_gradients(model)[name], grad, 1e-5)
        assert {(row.few, row.many, row.why) for row in gp.explain(model).rows} == {
            ("dense", "dense", "adapter 'default' is a DoraLinearVariant")
        }

    def test_detach_right_after_wrapping(self):
        model = tiny_model("llama")
        gp.attach(model, CONFIG)
        model = adapt(model)
        gp.detach(model)
        assert not any(is_gated(m) for m in model.modules())
        reference = adapt(tiny_model("llama"))
        assert torch.equal(
            logits_of(model, **inputs_for(model)), logits_of(reference, **inputs_for(model))
        )
