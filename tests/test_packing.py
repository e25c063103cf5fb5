"""pack, unpack and the mask encoding: the same function in fewer weights, and back to exact
zeros."""

import copy
import gc
import weakref

import pytest
import torch
from tiny import for_family, set_gates, tiny_model, token_ids

import gatepack as gp
from gatepack.families import FAMILIES
from gatepack.layers import layers_of
from gatepack.masks import decode_mask, encode_mask, physical_mask
from gatepack.packing import shrink
from gatepack.repack import pack_tensors

CONFIG = gp.GateConfig(noise=0.1, target=0.5, width_multiple=4)
PATTERNS = ("open", "closed", "single", "mixed", "ragged")
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gated(model_type="llama", pattern="mixed", dtype=torch.float64, seed=0, **overrides):
    model = tiny_model(model_type, dtype, **overrides).eval()
    gates = gp.attach(model, for_family(model_type, CONFIG))
    set_gates(gates, pattern, seed)
    return model, gates


@torch.no_grad()
def logits_of(model):
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return model(input_ids=ids, attention_mask=mask).logits


def block_numel(model):
    return sum(
        layer.linear(path).weight.numel()
        for layer in layers_of(model)
        for path in layer.family.linears
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_packs_to_the_same_function_and_back(model_type, pattern):
    model, gates = gated(model_type, pattern)
    expected = logits_of(model)
    scale = expected.abs().max()
    keys = [key for key in model.state_dict() if "gatepack" not in key]
    dense_params = sum(p.numel() for p in model.parameters()) - gates.logits.numel()
    dense_block, open_masks = block_numel(model), gates.open_masks()
    values = gates.split(gates.deterministic_values().detach().clone())
    original = tiny_model(model_type).state_dict()

    report = gp.pack(model)
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * scale
    assert list(model.state_dict()) == keys
    assert report.params == (dense_params, sum(p.numel() for p in model.parameters()))
    assert report.block_params == (dense_block, block_numel(model))
    assert report.bytes == (8 * report.params[0], 8 * report.params[1])
    assert report.kept_fraction == report.block_params[1] / report.block_params[0]
    for name, kind, before, kept in report.rows:
        assert before == open_masks[name].numel() and kept >= int(open_masks[name].sum())
        assert kept == max(1, int(open_masks[name].sum())) or kind == "heads"
    assert report.padded == sum(
        kept - int(open_masks[name].sum()) for name, _, _, kept in report.rows
    )
    if pattern in ("single", "mixed", "open"):
        assert (report.params[1] < report.params[0]) == (pattern != "open")

    masks = gp.unpack(model)
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * scale
    assert not hasattr(model.config, "gatepack")
    fresh = tiny_model(model_type)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in original.items()
    }
    for layer in layers_of(model):
        for gate, path in (
            (f"{layer.heads_name}:heads", layer.family.out),
            (f"{layer.channels_name}:channels", layer.family.down),
        ):
            if gate not in masks:
                continue
            lanes = layer.head_dim if gate.endswith("heads") else 1
            z = values[gate].repeat_interleave(lanes)
            kept = masks[gate].repeat_interleave(lanes)
            dense = original[f"{layer.name}.{path}.weight"]
            now = model.state_dict()[f"{layer.name}.{path}.weight"]
            if model_type == "gpt2":
                dense, now = dense.t(), now.t()
            assert (now[:, z == 0] == 0).all()
            assert torch.equal(now[:, z == 1], dense[:, z == 1])
            assert torch.equal(kept | (z == 0), torch.ones_like(kept))
        for path in layer.family.up:
            dense, now = (d[f"{layer.name}.{path}.weight"] for d in (original, model.state_dict()))
            if model_type == "gpt2":
                dense, now = dense.t(), now.t()
            kept = masks[f"{layer.channels_name}:channels"].repeat(len(now) // 40)
            assert torch.equal(now[kept], dense[kept]) and (now[~kept] == 0).all()


def test_unpacked_head_rows_and_biases():
    model, gates = gated("qwen2", "single")
    original = tiny_model("qwen2").state_dict()
    gp.pack(model)
    masks = gp.unpack(model)
    heads = masks["model.layers.0.self_attn:heads"]
    assert heads.nonzero().tolist() == [[3]]
    blocks = heads.reshape(2, 3).any(1)
    for path, kept in (("q_proj", heads), ("k_proj", blocks), ("v_proj", blocks)):
        rows = kept.repeat_interleave(8)
        for what in ("weight", "bias"):
            key = f"model.layers.0.self_attn.{path}.{what}"
            now = model.state_dict()[key]
            assert torch.equal(now[rows], original[key][rows]) and (now[~rows] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_packed_logits_equal_gated_logits_to_rounding(model_type, dtype):
    model, _ = gated(model_type, "mixed", dtype)
    exact, _ = gated(model_type, "mixed", dtype)
    exact = logits_of(exact.double())
    gated_logits = logits_of(model)
    gp.pack(model)
    packed = logits_of(model)
    assert packed.dtype == dtype
    own = (gated_logits.double() - exact).norm()
    assert (packed.double() - exact).norm() <= 2 * own
    assert own > 0


def test_ragged_heads_are_padded_and_counted():
    model, gates = gated(pattern="open")
    gates.close("model.layers.0.self_attn:heads", [0, 1, 3])
    expected = logits_of(model)
    report = gp.pack(model)
    assert report.rows[0] == ("model.layers.0.self_attn:heads", "heads", 6, 4)
    assert report.padded == 1
    assert model.model.layers[0].self_attn.num_key_value_groups == 2
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 48)
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_report_prints_and_serialises():
    model, _ = gated(pattern="single")
    report = gp.pack(model)
    data = report.to_dict()
    assert data["layers"][0] == {
        "gate": "model.layers.0.self_attn:heads", "kind": "heads", "before": 6, "kept": 1
    }  # fmt: skip
    assert data["params"] == list(report.params) and data["padded_units"] == 0
    lines = str(report).splitlines()
    assert lines[1].split() == ["model.layers.0.self_attn:heads", "6", "1"]
    assert lines[-2].startswith(
        f"in blocks {report.block_params[0]:,} -> {report.block_params[1]:,} ("
    )


def test_generation_is_unchanged():
    model, _ = gated(pattern="ragged")
    ids = token_ids()
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **arguments)
    gp.pack(model)
    assert torch.equal(model.generate(ids, **arguments), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_packed_model_trains(model_type):
    model, _ = gated(model_type)
    gp.pack(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_frozen_weights_stay_frozen():
    model, gates = gated()
    model.requires_grad_(False)
    gp.pack(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_pack_again_composes_with_the_first():
    model, gates = gated(pattern="mixed")
    gp.pack(model)
    dense = {key: value.shape for key, value in tiny_model("llama").state_dict().items()}
    gates = gp.attach(
        model, gp.GateConfig(units=("channels",), noise=0.0, target=0.9, width_multiple=1)
    )
    for name, gate in gates.items():
        gates.close(name, [0, gate.size - 1])
    expected = logits_of(model)
    gp.pack(model)
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * expected.abs().max()
    assert len(model.config.gatepack["kept"]) == 4
    for layer in layers_of(model):
        kept = decode_mask(model.config.gatepack["kept"][f"{layer.channels_name}:channels"])
        assert kept.numel() == 40 and int(kept.sum()) == layer.linear("mlp.down_proj").in_features
        assert layer.linear("mlp.down_proj").dense_shape == (48, 40)
    gp.unpack(model)
    assert {key: value.shape for key, value in model.state_dict().items()} == dense
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_unpacked_model_can_be_gated_where_it_was():
    model, _ = gated(pattern="mixed")
    gp.pack(model)
    expected = logits_of(model)
    masks = gp.unpack(model)
    gates = gp.attach(model, CONFIG)
    gates.set_open(masks)
    assert (logits_of(model.eval()) - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_tied_embeddings_stay_tied():
    model, _ = gated(tie_word_embeddings=True)
    expected = logits_of(model)
    gp.pack(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits_of(model) - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_refusals():
    with pytest.raises(ValueError, match="model has no gates"):
        gp.pack(tiny_model("llama"))
    with pytest.raises(ValueError, match="model is not packed"):
        gp.unpack(tiny_model("llama"))
    model, _ = gated()
    with pytest.raises(ValueError, match="model has gates: pack or detach them first"):
        gp.unpack(model)


class TestPeft:
    def adapted(self, model, names=("default",), **lora):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=LLAMA_LINEARS, **lora)
        model = peft.get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        torch.manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn_like(parameter))
        return model.double().eval()

    @pytest.mark.parametrize("pattern", ["single", "mixed", "ragged"])
    def test_pack_with_lora_equals_merge_then_pack(self, pattern):
        model, _ = gated(pattern=pattern)
        model = self.adapted(model)
        merged = copy.deepcopy(model).merge_and_unload()
        expected = logits_of(model)
        report = gp.pack(model)
        packed = logits_of(model)
        assert (packed - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert report.kept_fraction < 1
        gp.pack(merged)
        assert (packed - logits_of(merged)).abs().max() <= 1e-12 * expected.abs().max()
        plain = model.merge_and_unload()
        assert (logits_of(plain) - packed).abs().max() <= 1e-12 * expected.abs().max()
        for key, value in merged.state_dict().items():
            assert torch.allclose(plain.state_dict()[key], value, rtol=0, atol=1e-12), key

    def test_packed_adapters_train_and_unpack(self):
        model, _ = gated(pattern="mixed")
        model = self.adapted(model)
        gp.pack(model)
        expected = logits_of(model)
        ids = token_ids()
        model.train()(ids, labels=ids).loss.backward()
        trained = [key for key, p in model.named_parameters() if p.grad is not None]
        assert len(trained) == 28 and all("lora_" in key for key in trained)
        model.eval()
        gp.unpack(model)
        assert (logits_of(model) - expected).abs().max() <= 1e-12 * expected.abs().max()
        fresh = self.adapted(tiny_model("llama"))
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in fresh.state_dict().items()
        }

    def test_inactive_adapter_is_sliced_too(self):
        model, _ = gated(pattern="mixed")
        model = self.adapted(model, ("one", "two"))
        expected = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            expected[name] = logits_of(model)
        assert not torch.allclose(expected["one"], expected["two"])
        gp.pack(model)
        for name in ("one", "two"):
            model.set_adapter(name)
            assert (logits_of(model) - expected[name]).abs().max() <= 1e-12 * expected[
                name
            ].abs().max()

    def test_adapters_around_adapters_are_all_sliced(self):
        pytest.importorskip("peft")
        from adapters import lora_around

        model, _ = gated(pattern="mixed")
        model = self.adapted(model)
        config = model.peft_config["default"]
        torch.manual_seed(6)
        for layer in layers_of(model.get_base_model()):
            for path in layer.family.linears:
                parent, _, name = path.rpartition(".")
                parent = layer.module.get_submodule(parent)
                outer = lora_around(getattr(parent, name), "default", config)
                torch.nn.init.normal_(outer.lora_B["default"].weight)
                setattr(parent, name, outer.double())
        model.eval()
        expected = logits_of(model)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        gp.pack(model)
        assert (logits_of(model) - expected).abs().max() <= 1e-12 * expected.abs().max()
        up = model.get_base_model().model.layers[0].mlp.up_proj
        assert len({m.out_features for m in (up, up.base_layer, up.get_base_layer())}) == 1
        gp.unpack(model)
        assert (logits_of(model) - expected).abs().max() <= 1e-12 * expected.abs().max()
        unpacked = {key: value.shape for key, value in model.state_dict().items()}
        assert unpacked == {key: shape for key, shape in shapes.items() if "gatepack" not in key}

    def test_adalora_is_refused_until_merged(self):
        peft = pytest.importorskip("peft")
        model, _ = gated(pattern="mixed")
        config = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=LLAMA_LINEARS)
        model = peft.get_peft_model(model, config).double().eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_E" in key:
                    parameter.normal_()
        expected = logits_of(model)
        message = (
            "self_attn.q_proj cannot be packed: adapter type peft.tuners.adalora.layer.SVDLinear "
            r"is not LoRA. Merge it first \(model.merge_and_unload\(\)\)"
        )
        with pytest.raises(ValueError, match=message):
            gp.pack(model)
        assert torch.equal(logits_of(model), expected)
        model = model.merge_and_unload()
        gp.pack(model)
        assert (logits_of(model) - expected).abs().max() <= 1e-12 * expected.abs().max()

    @pytest.mark.parametrize("active", [True, False])
    def test_opaque_adapter_is_refused_and_nothing_changes(self, active):
        peft = pytest.importorskip("peft")
        model, _ = gated(pattern="mixed")
        model = self.adapted(model, ("plain",))
        dora = peft.LoraConfig(r=2, target_modules=["up_proj"], use_dora=True)
        model.add_adapter("dora", dora)
        model.set_adapter("dora" if active else "plain")
        model = model.double().eval()
        before = logits_of(model)
        state = copy.deepcopy(model.state_dict())
        message = "mlp.up_proj cannot be packed: adapter 'dora' is a DoraLinearVariant. Merge it"
        with pytest.raises(ValueError, match=message):
            gp.pack(model)
        assert torch.equal(logits_of(model), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert "kept" not in model.get_base_model().config.gatepack


class TestMasks:
    @pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1000])
    def test_round_trip(self, size):
        mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) > 0.5
        record = encode_mask(mask)
        assert record["size"] == size and record["kept"] == int(mask.sum())
        assert torch.equal(decode_mask(record), mask)

    @pytest.mark.parametrize(
        "change",
        [
            {"kept": 4},
            {"size": 8},
            {"size": 3},
            {"size": 20},
            {"bits": "////"},
            {"bits": "!!!!"},
            {"bits": 3},
            {"size": "x"},
        ],
        ids=str,
    )
    def test_tampering_is_refused(self, change):
        record = encode_mask(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool))
        with pytest.raises(
            ValueError, match=r"config\.gatepack holds an (unreadable open set|open set of)"
        ):
            decode_mask({**record, **change})

    @pytest.mark.parametrize("field", ["size", "kept", "bits"])
    def test_missing_field_is_refused(self, field):
        record = encode_mask(torch.ones(5, dtype=torch.bool))
        del record[field]
        with pytest.raises(ValueError, match="unreadable open set"):
            decode_mask(record)
        with pytest.raises(ValueError, match="unreadable open set"):
            decode_mask([1])

    def test_physical_mask(self):
        def physical(*bits):
            return physical_mask("heads", 3, torch.tensor(bits, dtype=torch.bool)).int().tolist()

        assert physical(0, 0, 0, 0, 0, 0) == [1, 0, 0, 0, 0, 0]
        assert physical(1, 0, 1, 0, 0, 0) == [1, 0, 1, 0, 0, 0]
        assert physical(1, 0, 1, 0, 1, 0) == [1, 0, 1, 1, 1, 0]
        some = torch.tensor([0, 1, 0, 1], dtype=torch.bool)
        assert torch.equal(physical_mask("channels", 1, some), some)
        assert physical_mask("channels", 1, torch.zeros(4, dtype=torch.bool)).tolist() == [
            True,
            False,
            False,
            False,
        ]

    def test_shrink_refuses_what_does_not_fit(self):
        name = "model.layers.0.self_attn:heads"
        for record, message in (
            (
                {"x:heads": encode_mask(torch.ones(6, dtype=torch.bool))},
                "names gate 'x:heads', which this arch",
            ),
            (
                {name: encode_mask(torch.ones(5, dtype=torch.bool))},
                "has 5 units for .*, the architecture has 6",
            ),
            (
                {name: encode_mask(torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool))},
                "unequally many query heads per key/value head",
            ),
            ({name: encode_mask(torch.zeros(6, dtype=torch.bool))}, "or none at all"),
        ):
            model = tiny_model("llama")
            with pytest.raises(ValueError, match=message):
                shrink(model, record)


def test_one_layer_at_a_time_is_in_memory_twice(monkeypatch):
    """A call for each layer, and by the next one the dense weights of the last are gone."""
    model, _ = gated("llama", num_hidden_layers=3)
    dense = [
        [weakref.ref(layer.linear(path).weight) for path in layer.family.linears]
        for layer in layers_of(model)
    ]
    alive = []

    def counted(pieces):
        gc.collect()
        alive.append(sum(any(ref() is not None for ref in refs) for refs in dense))
        return pack_tensors(pieces)

    monkeypatch.setattr("gatepack.packing.pack_tensors", counted)
    gp.pack(model)
    assert alive == [3, 2, 1]


@pytest.mark.parametrize(("closed", "warned"), [([], True), ([0], False)])
def test_a_model_of_which_nothing_is_closed_is_packed_with_a_warning(closed, warned, caplog):
    model, gates = gated(pattern="open")
    gates.close(next(name for name in gates if name.endswith(":channels")), closed)
    gp.pack(model)
    assert ("every gate is open, so nothing is removed" in caplog.text) is warned
