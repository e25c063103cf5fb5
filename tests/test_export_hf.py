"""export(format="hf"): sizes of each layer in transformers, through the modelling file beside the
weights; what does not fit is refused, and nothing runs without trust_remote_code."""

import copy
import json

import pytest
import torch
import transformers
from packed import UNEVEN, modules_cache, packed_model  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import token_ids

import gatepack as gp
from gatepack.exporters import parity
from gatepack.families import FAMILIES

pytestmark = pytest.mark.usefixtures("modules_cache")
WEIGHTS = "model.safetensors"


@torch.no_grad()
def outputs_of(model):
    return model.eval()(token_ids())[0]


def load(folder, auto="AutoModelForCausalLM", **options):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def model():
    return packed_model(**UNEVEN)


@pytest.fixture
def folder(model, tmp_path):
    gp.export(model, tmp_path / "m", "hf")
    return tmp_path / "m"


def edit(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_packed_again_loads_again(folder, tmp_path):
    """config.json says nothing of the first export's file and sizes any more."""
    model = load(folder).eval()
    gp.attach(model, gp.GateConfig(target=0.7, noise=0.0, width_multiple=1)).snap()
    expected = outputs_of(model)
    gp.pack(model)
    torch.testing.assert_close(outputs_of(model), expected, rtol=1e-4, atol=1e-5)
    gp.save_pretrained(model, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert not {"auto_map", "per_layer_config", "gatepack_layout"} & config.keys()
    assert torch.equal(outputs_of(gp.from_pretrained(tmp_path / "own")), outputs_of(model))
    gp.export(model, tmp_path / "again", "hf")
    assert torch.equal(outputs_of(load(tmp_path / "again")), outputs_of(model))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_loads(tmp_path, model_type):
    model = packed_model(model_type, **UNEVEN)
    report = gp.export(model, tmp_path / "m", "hf")
    assert report["parity"]["max_abs_difference"] == 0
    auto = "AutoModelForCausalLM" if model.can_generate() else "AutoModelForSequenceClassification"
    loaded = load(tmp_path / "m", auto)
    assert isinstance(loaded, type(model))
    assert torch.equal(outputs_of(loaded), outputs_of(model))
    assert loaded.num_parameters() == model.num_parameters()
    ours = gp.from_pretrained(tmp_path / "m")
    assert type(ours) is type(model)
    assert torch.equal(outputs_of(ours), outputs_of(model))
    gp.save_pretrained(model, tmp_path / "own")
    plain = gp.from_pretrained(tmp_path / "own").config.to_dict()
    assert ours.config.to_dict() == {**plain, "_name_or_path": str(tmp_path / "m")}


def test_the_check_leaves_modes_alone():
    model = packed_model("bert").train()
    other = copy.deepcopy(model)
    model.base_model.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    parity._compare_outputs(model, other, token_ids(), "a copy")
    assert [module.training for module in model.modules()] == before


def test_config_has_the_sizes_that_differ(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 16},
        "1": {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 24},
    }
    assert config["model_type"] == "llama" and config["num_attention_heads"] == 6
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "gatepack.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_gatepack.py",
    ]


class TestLoading:
    @pytest.mark.parametrize(
        "options, dtype",
        [
            ({"dtype": "auto"}, torch.float32),
            ({"dtype": torch.bfloat16}, torch.bfloat16),
            ({"device_map": "cpu"}, torch.float32),
            ({"attn_implementation": "eager"}, torch.float32),
        ],
    )
    def test_options(self, folder, model, options, dtype):
        loaded = load(folder, **options)
        assert loaded.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(outputs_of(loaded), outputs_of(model))

    def test_bare_model_and_classifier(self, folder, model):
        bare = load(folder, "AutoModel")
        assert torch.equal(outputs_of(bare), outputs_of(model.model))
        classifier = load(folder, "AutoModelForSequenceClassification", num_labels=3)
        assert classifier.score.out_features == 3
        assert torch.equal(outputs_of(classifier.model), outputs_of(model.model))

    def test_saves_and_loads_again(self, folder, model, tmp_path):
        load(folder).save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "modeling_gatepack.py").is_file()
        assert torch.equal(outputs_of(load(tmp_path / "again")), outputs_of(model))

    def test_sharded(self, folder, model, tmp_path):
        load(folder).save_pretrained(tmp_path / "again", max_shard_size="40KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert torch.equal(outputs_of(load(tmp_path / "again")), outputs_of(model))

    @pytest.mark.parametrize("format", ["uniform", "decilm", "hf"])
    def test_exports_again(self, tmp_path, format):
        sizes = {"closed": ([1, 4], [0, 5]), "widths": (256, 256), "intermediate_size": 512}
        model = packed_model(**sizes)
        gp.export(model, tmp_path / "m", "hf")
        report = gp.export(load(tmp_path / "m"), tmp_path / "again", format)
        assert report["parity"]["max_abs_difference"] == 0
        assert 0.4 < report["model"]["kept_fraction"] < 0.7
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert ("per_layer_config" in config) == (format == "hf")
        assert torch.equal(outputs_of(load(tmp_path / "again")), outputs_of(model))

    def test_unpacks(self, folder, model):
        loaded = gp.from_pretrained(folder)
        gp.unpack(loaded)
        assert loaded.model.layers[1].self_attn.q_proj.weight.shape == (48, 48)
        torch.testing.assert_close(outputs_of(loaded), outputs_of(model))


class TestRunning:
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generates(self, folder, model, cache):
        arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 9)}
        expected = model.generate(token_ids(), use_cache=False, **arguments)
        loaded = load(folder).eval()
        found = loaded.generate(token_ids(), cache_implementation=cache, **arguments)
        assert torch.equal(found, expected)

    def test_compiles_without_a_break(self, folder, model):
        loaded = load(folder).eval()
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            found = compiled(token_ids(), use_cache=False).logits
        torch.testing.assert_close(found, outputs_of(model))

    def test_adapters_train_on_top(self, folder, model, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(load(folder), config)
        ids = token_ids()
        wrapped(ids, labels=ids).loss.backward()
        gradients = [p.grad for name, p in wrapped.named_parameters() if "lora_B" in name]
        assert len(gradients) == 4 and all(g.abs().max() > 0 for g in gradients)
        wrapped.save_pretrained(tmp_path / "adapter")
        merged = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
        torch.testing.assert_close(outputs_of(merged.merge_and_unload()), outputs_of(model))


class TestRefusals:
    def test_runs_no_code_without_trust(self, folder, tmp_path):
        ran = tmp_path / "ran"
        path = folder / "modeling_gatepack.py"
        path.write_text(f"open({str(ran)!r}, 'w')\n" + path.read_text())
        for options in ({}, {"trust_remote_code": False}):
            with pytest.raises((RuntimeError, ValueError)):
                transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        gp.from_pretrained(folder)
        assert not ran.exists()

    def test_a_size_that_does_not_fit_names_the_tensor(self, folder):
        edit(folder, lambda data: data["per_layer_config"]["1"].update(intermediate_size=20))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has another size"):
            load(folder)

    def test_a_tensor_that_is_missing_is_named(self, folder):
        weights = load_file(folder / WEIGHTS)
        del weights["model.layers.1.self_attn.k_proj.weight"]
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight is missing"):
            load(folder)

    def test_pickles_are_not_read(self, folder):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        with pytest.raises(OSError, match="safetensors"):
            load(folder)
