"""Head counts of attention modules, and those that Phi-3 reads from the config of all layers."""

import copy
import pickle

import pytest
import torch
import transformers
from packed import UNEVEN, modules_cache, packed_model  # noqa: F401
from tiny import set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.head_counts import LayerConfig, head_counts, set_head_counts, write_head_counts
from gatepack.layers import layers_of


def attentions(model):
    return [layer.module.self_attn for layer in layers_of(model)]


@torch.no_grad()
def logits_of(model):
    return model(token_ids()).logits


def test_a_layers_count_is_its_own_and_the_rest_is_shared():
    model = packed_model("phi3", **UNEVEN)
    first, second = (attention.config for attention in attentions(model))
    # All query heads of layer 0 stay, as zeros: a group must not keep fewer than the other.
    assert first is model.config and model.config.num_attention_heads == 6
    assert isinstance(second, LayerConfig) and second.num_attention_heads == 3
    model.config.sliding_window = 4
    assert second.sliding_window == 4
    with pytest.raises(AttributeError, match="no_such_field"):
        second.no_such_field  # noqa: B018


def test_the_attention_implementation_is_that_of_the_model():
    model = packed_model("phi3", **UNEVEN)
    expected = logits_of(model)
    model.set_attn_implementation("eager")
    assert {a.config._attn_implementation for a in attentions(model)} == {"eager"}
    torch.testing.assert_close(logits_of(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_the_copied_config(copied):
    model = packed_model("phi3", **UNEVEN)
    twin = copied(model)
    assert torch.equal(logits_of(twin), logits_of(model))
    twin.config.sliding_window = 4
    assert attentions(twin)[1].config.sliding_window == 4
    assert attentions(model)[1].config.sliding_window is None


def test_a_config_that_copies_itself_is_copied_inside():
    class Shared:
        field = 1

        def __deepcopy__(self, memo):
            return Shared()

    shared = Shared()
    twin = copy.deepcopy(LayerConfig(shared, {"heads": 2}))
    assert isinstance(twin, LayerConfig) and (twin.heads, twin.field) == (2, 1)
    assert twin._shared is not shared


def test_dense_counts_give_the_shared_config_back():
    model = tiny_model("phi3")
    gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.5, width_multiple=4))
    set_gates(gates, "ragged")
    model.eval()(token_ids())
    gp.detach(model)
    assert all(attention.config is model.config for attention in attentions(model))
    packed = packed_model("phi3", **UNEVEN)
    gp.unpack(packed)
    assert all(attention.config is packed.config for attention in attentions(packed))


def test_counts_are_read_as_they_were_written():
    attention = attentions(tiny_model("phi3"))[0]
    family = layers_of(tiny_model("phi3"))[0].family
    names = [name for name, _ in family.head_attributes]
    dense = head_counts((attention, name) for name in names)
    set_head_counts(attention, family, 4, 2, 8)
    assert [count for *_, count in head_counts((attention, n) for n in names)] == [4, 2, 2]
    write_head_counts(dense)
    assert [count for *_, count in head_counts((attention, n) for n in names)] == [6, 2, 3]


def test_packed_model_compiles_into_one_graph():
    model = packed_model("phi3", **UNEVEN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(token_ids()).logits, logits_of(model))


@pytest.mark.usefixtures("modules_cache")
def test_exported_model_copies_and_shares_the_config(tmp_path):
    model = packed_model("phi3", **UNEVEN)
    gp.export(model, tmp_path / "m", "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", trust_remote_code=True
    )
    twin = copy.deepcopy(loaded)
    twin.set_attn_implementation("eager")
    first, second = attentions(loaded), attentions(twin)
    assert {a.config._attn_implementation for a in first} != {"eager"}
    assert {a.config._attn_implementation for a in second} == {"eager"}
    torch.testing.assert_close(logits_of(twin), logits_of(model))
