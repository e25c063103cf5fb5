"""The vLLM plugin against a stub that records what is called, in the form of vLLM's classes."""

import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import transformers
from packed import UNEVEN, modules_cache, packed_model  # noqa: F401

import gatepack as gp
from gatepack import vllm_plugin

pytestmark = pytest.mark.usefixtures("modules_cache")
ROOT = Path(__file__).resolve().parent.parent


class Registry:
    """vllm.ModelRegistry: which architectures there are, and what was registered."""

    def __init__(self, *known):
        self.models = dict.fromkeys(known)
        self.calls = []

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, model_arch, model_cls):
        self.calls.append((model_arch, model_cls))
        self.models[model_arch] = model_cls


class DecoderLayer:
    def __init__(self, vllm_config, prefix="", config=None, attn_layer_type=None):
        self.config = config or vllm_config.model_config.hf_config
        self.prefix = prefix


class ForCausalLM:
    def __init__(self, *, vllm_config, prefix="", layer_type=DecoderLayer):
        count = vllm_config.model_config.hf_config.num_hidden_layers
        self.layers = [
            layer_type(vllm_config=vllm_config, prefix=f"model.layers.{i}") for i in range(count)
        ]


@pytest.fixture
def registry(monkeypatch):
    registry = Registry("LlamaForCausalLM")
    llama = {"LlamaDecoderLayer": DecoderLayer, "LlamaForCausalLM": ForCausalLM}
    utils = {"extract_layer_index": lambda prefix: int(prefix.rpartition(".")[2])}
    for name, values in {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": llama,
        "vllm.model_executor.models.utils": utils,
    }.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "gatepack.vllm_models", raising=False)
    yield registry
    sys.modules.pop("gatepack.vllm_models", None)


def test_the_entry_point_names_it():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"vllm\.general_plugins"\]\ngatepack = "(.+):(.+)"', text)
    assert getattr(importlib.import_module(found[1]), found[2]) is vllm_plugin.register


def test_registers_each_architecture_once_and_imports_none(registry):
    vllm_plugin.register()
    assert registry.calls == [
        (f"Packed{name}ForCausalLM", f"gatepack.vllm_models:Packed{name}ForCausalLM")
        for name in ("Llama", "Mistral", "Qwen2")
    ]
    assert "gatepack.vllm_models" not in sys.modules
    vllm_plugin.register()
    assert len(registry.calls) == 3


def as_older_transformers(config):
    """Before 5.14 the key is a plain attribute, with the indices as written."""
    return types.SimpleNamespace(**config.to_dict())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("older", [False, True])
def test_each_layer_has_its_own_sizes(registry, tmp_path, model_type, older):
    gp.export(packed_model(model_type, **UNEVEN), tmp_path / "m", "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    if older:
        config = as_older_transformers(config)
    vllm_plugin.register()
    module, _, name = registry.models[config.architectures[0]].partition(":")
    vllm_config = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=config))
    model = getattr(importlib.import_module(module), name)(vllm_config=vllm_config)
    sizes = [
        (each.num_attention_heads, each.num_key_value_heads, each.intermediate_size)
        for each in (layer.config for layer in model.layers)
    ]
    assert sizes == [(6, 2, 16), (3, 1, 24)]
    assert getattr(model.layers[0].config, "qkv_bias", False) == (model_type == "qwen2")
    assert config.num_attention_heads == 6
