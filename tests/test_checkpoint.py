"""save_pretrained and from_pretrained: exact round trips and named refusals."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from checkpoints import GATED, entries, gated, logits_of
from safetensors.torch import load_file, save_file
from tiny import tiny_model, token_ids

import gatepack as gp
from gatepack import checkpoint
from gatepack.masks import encode_mask

WEIGHTS = "model.safetensors"


def packed(model_type="llama", **overrides):
    model, _ = gated(model_type, "mixed", **overrides)
    gp.pack(model)
    return model


class TestRoundTrip:
    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "opt", "qwen3"])
    def test_gated(self, tmp_path, model_type):
        model, _ = gated(model_type)
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m")
        assert type(loaded) is type(model)
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert entries(tmp_path) == ["m"]

    @pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "opt", "qwen3"])
    def test_packed(self, tmp_path, model_type):
        model = packed(model_type)
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m")
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
        assert repr(loaded) == repr(model)
        assert loaded.config.gatepack == model.config.gatepack
        gp.unpack(loaded), gp.unpack(model)
        assert torch.equal(logits_of(loaded), logits_of(model))

    def test_packed_then_gated_then_packed_again(self, tmp_path):
        model = packed()
        gates = gp.attach(model, gp.GateConfig(noise=0.0, target=0.9, width_multiple=1))
        for name, gate in gates.items():
            if gate.kind == "channels":
                gates.close(name, [1, 2])
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m")
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert torch.equal(gp.gates_of(loaded).closed, gates.closed)
        gp.pack(loaded)
        gp.save_pretrained(loaded, tmp_path / "m")
        again = gp.from_pretrained(tmp_path / "m")
        assert torch.equal(logits_of(again), logits_of(loaded))
        gp.unpack(again)
        assert again.model.layers[0].mlp.up_proj.weight.shape == (40, 48)

    def test_training_state(self, tmp_path):
        model, gates = gated()
        gates.close("model.layers.0.mlp:channels", [3, 4])
        model.train()
        for _ in range(3):
            model(token_ids())
            gates.step()
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m").train()
        restored = gp.gates_of(loaded)
        assert restored.config == GATED
        assert restored.state_dict().keys() == gates.state_dict().keys()
        for key, value in gates.state_dict().items():
            assert torch.equal(restored.state_dict()[key], value), key
            assert restored.state_dict()[key].dtype == value.dtype
        assert restored.controller.multiplier == gates.controller.multiplier != 0
        assert restored.controller.steps == 3 and int(restored.draws) == 3
        assert restored.logits.requires_grad
        assert torch.equal(restored.draw().flat, gates.draw().flat)
        loaded(token_ids()).logits.backward(torch.randn(2, 9, 97))
        assert restored.logits.grad.abs().max() > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_load_in_another_dtype_keeps_logits_fp32(self, tmp_path, dtype):
        model, gates = gated()
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m", dtype=dtype)
        restored = gp.gates_of(loaded)
        assert loaded.lm_head.weight.dtype == dtype
        assert restored.logits.dtype == torch.float32 and torch.equal(restored.logits, gates.logits)
        assert restored.controller.state.dtype == torch.float32
        expected = model.to(dtype).state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
        assert logits_of(loaded).dtype == dtype

    @pytest.mark.parametrize(
        "save", [gp.save_pretrained, lambda model, f: model.save_pretrained(f)]
    )
    @pytest.mark.parametrize("units", [("heads", "channels"), ("rows", "columns")])
    def test_frozen_gates_stay_frozen(self, tmp_path, units, save):
        model = tiny_model("llama", torch.float32)
        gates = gp.attach(model, replace(GATED, units=units, width_multiple=1))
        save(model, tmp_path / "m")
        assert "frozen" not in read(tmp_path / "m")["gatepack"]
        assert not gp.gates_of(gp.from_pretrained(tmp_path / "m")).frozen

        gp.GateTraining(model, steps=4).finish()
        save(model, tmp_path / "m")
        assert read(tmp_path / "m")["gatepack"]["frozen"] is True
        loaded = gp.from_pretrained(tmp_path / "m").train()
        restored = gp.gates_of(loaded)
        assert restored.frozen and not restored.logits.requires_grad and not restored.noisy
        assert torch.equal(loaded(token_ids()).logits, model.train()(token_ids()).logits)
        assert loaded.config.gatepack == model.config.gatepack
        gates.unfreeze()
        save(model, tmp_path / "m")
        assert not gp.gates_of(gp.from_pretrained(tmp_path / "m")).frozen

    def test_frozen_is_said_of_gates_that_are_there(self):
        model, gates = gated()
        twin = copy.deepcopy(model)
        gates.freeze()
        assert model.config.gatepack["frozen"] is True and "frozen" not in twin.config.gatepack
        gp.detach(model)
        assert not hasattr(model.config, "gatepack")
        gp.gates_of(twin).freeze()
        gp.pack(twin)
        assert not {"frozen", "gates"} & twin.config.gatepack.keys()

    @pytest.mark.parametrize("kind", ["gated", "packed"])
    def test_transformers_own_save(self, tmp_path, kind):
        model = packed() if kind == "packed" else gated()[0]
        model.save_pretrained(tmp_path / "m")
        assert torch.equal(logits_of(gp.from_pretrained(tmp_path / "m")), logits_of(model))

    def test_tied_embeddings(self, tmp_path):
        model = packed(tie_word_embeddings=True)
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(logits_of(loaded), logits_of(model))

    def test_generates_after_loading(self, tmp_path):
        model, _ = gated(pattern="ragged")
        gp.save_pretrained(model, tmp_path / "m")
        loaded = gp.from_pretrained(tmp_path / "m").eval()
        arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 9)}
        assert torch.equal(
            loaded.generate(token_ids(), **arguments),
            model.eval().generate(token_ids(), **arguments),
        )


@pytest.fixture
def folder(tmp_path):
    model, _ = gated()
    gp.save_pretrained(model, tmp_path / "m")
    return tmp_path / "m"


def read(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, change):
    data = read(folder)
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


class TestRefusals:
    @pytest.mark.parametrize("verify", [True, False])
    def test_truncated_weights(self, folder, verify):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=WEIGHTS):
            gp.from_pretrained(folder, verify=verify)

    def test_flipped_byte(self, folder):
        path = folder / WEIGHTS
        data = bytearray(path.read_bytes())
        data[-50] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{WEIGHTS} was altered after saving: .* pass verify=False"
        ):
            gp.from_pretrained(folder)
        assert gp.from_pretrained(folder, verify=False) is not None

    @pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=name):
            gp.from_pretrained(folder)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere is not a checkpoint: it has no config.json"):
            gp.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", ["{", "[1]", "", '{"model_type": "llama", "gatepack": 3}'])
    def test_broken_config(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            gp.from_pretrained(folder)

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"files": 3}', '{"files": {"model.safetensors": {}}}']
    )
    def test_broken_manifest(self, folder, text):
        (folder / checkpoint.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="gatepack.json cannot be read"):
            gp.from_pretrained(folder)

    def test_manifest_cannot_point_outside(self, folder):
        outside = {"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(outside))
        with pytest.raises(ValueError, match=r"m/passwd is missing"):
            gp.from_pretrained(folder)

    def test_no_gatepack_record(self, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path / "m")
        with pytest.raises(
            ValueError, match="config.json has no gatepack record: .*load it with transformers"
        ):
            gp.from_pretrained(tmp_path / "m")

    @pytest.mark.parametrize(
        "option, message",
        [
            ({"config": None}, "config= is not taken: .*config.json"),
            ({"output_loading_info": True}, "output_loading_info= is not taken"),
            ({"use_safetensors": False}, "use_safetensors=False is not taken: pickles"),
        ],
    )
    def test_options_of_its_own(self, folder, option, message):
        with pytest.raises(ValueError, match=message):
            gp.from_pretrained(folder, **option)
        assert gp.from_pretrained(folder, use_safetensors=True)

    def test_frozen_that_is_no_bool(self, folder):
        edit(folder, lambda data: data["gatepack"].update(frozen="no"))
        with pytest.raises(ValueError, match="gatepack.frozen is 'no', not a bool"):
            gp.from_pretrained(folder)

    def test_pickles_are_not_read(self, folder, monkeypatch):
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
        os.rename(folder / WEIGHTS, folder / "pytorch_model.bin")
        (folder / checkpoint.MANIFEST).unlink()
        with pytest.raises(
            ValueError,
            match="no safetensors file, only pytorch_model.bin, and pickles are never",
        ):
            gp.from_pretrained(folder)

    def test_other_sizes_name_the_tensor(self, folder):
        edit(folder, lambda data: data.update(intermediate_size=44))
        with pytest.raises(
            ValueError, match="'gatepack_gates.closed' is .92., and .100. by config.json"
        ):
            gp.from_pretrained(folder)

    def test_fewer_layers_name_the_tensor(self, folder):
        edit(folder, lambda data: data.update(num_hidden_layers=1))
        with pytest.raises(
            ValueError, match="'gatepack_gates.closed' is .92., and .46. by config.json"
        ):
            gp.from_pretrained(folder)

    def test_gate_config_of_another_version(self, folder):
        edit(folder, lambda data: data["gatepack"]["gates"].update(version=9))
        with pytest.raises(ValueError, match="version must be 1, got 9"):
            gp.from_pretrained(folder)

    @pytest.mark.parametrize("gates", [3, [], {"colour": 1}, {"units": "heads"}])
    def test_broken_gate_config(self, folder, gates):
        edit(folder, lambda data: data["gatepack"].update(gates=gates))
        with pytest.raises(ValueError, match="GateConfig|units must be"):
            gp.from_pretrained(folder)

    def test_unknown_architecture(self, folder):
        edit(folder, lambda data: data.update(architectures=["MyLlama"]))
        with pytest.raises(
            ValueError,
            match="config.json names architecture 'MyLlama', which transformers does not",
        ):
            gp.from_pretrained(folder)


class TestPackedRefusals:
    NAME = "model.layers.0.mlp:channels"

    @pytest.fixture
    def folder(self, tmp_path):
        gp.save_pretrained(packed(), tmp_path / "m")
        return tmp_path / "m"

    @pytest.mark.parametrize(
        ("rename", "what"),
        [("lm_head.weight", "missing"), (None, "unexpected")],
        ids=["missing", "unexpected"],
    )
    def test_missing_and_unexpected_tensors_are_named(self, folder, rename, what):
        tensors = load_file(folder / WEIGHTS)
        if rename:
            del tensors[rename]
        else:
            tensors["stray.weight"] = torch.zeros(2)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / checkpoint.MANIFEST).unlink()
        with pytest.raises(
            ValueError, match=f"{what} keys, the first is '{rename or 'stray.weight'}'"
        ):
            gp.from_pretrained(folder)

    def test_mask_that_does_not_fit_the_weights(self, folder):
        def shorten(data):
            mask = torch.zeros(40, dtype=torch.bool)
            mask[:2] = True
            data["gatepack"]["kept"][self.NAME] = encode_mask(mask)

        edit(folder, shorten)
        with pytest.raises(
            ValueError,
            match=r"layers\.0\.mlp\.down_proj\.weight' is \[48, 25\], and \[48, 2\]",
        ):
            gp.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"size": 40, "kept": 3, "bits": ""}, "contradict"),
            ("all", "unreadable open set"),
            (
                encode_mask(torch.ones(39, dtype=torch.bool)),
                "has 39 units for 'model.layers.0.mlp:channels'",
            ),
            (encode_mask(torch.zeros(40, dtype=torch.bool)), "model.layers.0.mlp:channels"),
        ],
        ids=["contradicts itself", "not a record", "wrong size", "empty"],
    )
    def test_wrong_mask(self, folder, record, message):
        edit(folder, lambda data: data["gatepack"]["kept"].update({self.NAME: record}))
        with pytest.raises(ValueError, match=message):
            gp.from_pretrained(folder)

    def test_unknown_gate(self, folder):
        mask = encode_mask(torch.ones(4, dtype=torch.bool))
        edit(
            folder,
            lambda data: data["gatepack"]["kept"].update({"model.layers.7.mlp:channels": mask}),
        )
        with pytest.raises(
            ValueError, match="names gate 'model.layers.7.mlp:channels', which this architecture"
        ):
            gp.from_pretrained(folder)

    @pytest.mark.parametrize("kept", [[], 3, None])
    def test_kept_is_no_object(self, folder, kept):
        edit(folder, lambda data: data["gatepack"].update(kept=kept))
        with pytest.raises(ValueError, match="kept"):
            gp.from_pretrained(folder)

    def test_bad_format(self, folder):
        edit(folder, lambda data: data["gatepack"].update(format=2))
        with pytest.raises(
            ValueError, match="config.json has packed format 2, this release reads 1"
        ):
            gp.from_pretrained(folder)


def test_unmerged_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(gated()[0], peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"mlp.up_proj carries a PEFT adapter.*merge_and_unload"):
        gp.save_pretrained(model, tmp_path / "m")
    assert entries(tmp_path) == []
    merged = model.merge_and_unload()
    gp.save_pretrained(merged, tmp_path / "m")
    assert torch.equal(logits_of(gp.from_pretrained(tmp_path / "m")), logits_of(merged))
