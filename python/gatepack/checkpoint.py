"""Stage 6, save: checkpoints of gated and packed models, written whole or not at all."""

import contextlib
import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gatepack.config import GateConfig
from gatepack.errors import first_line
from gatepack.files import left_aside, read_json, replaced_folder
from gatepack.hf import attach
from gatepack.layers import GATES_NAME, hf_model
from gatepack.packing import FORMAT_VERSION, shrink
from gatepack.row_column_packing import shrink_linears

MANIFEST = "gatepack.json"
INDEX = "model.safetensors.index.json"
# Files of a checkpoint: a new one in the same folder does without those that it does not write.
SUPERSEDED = re.compile(
    rf"(generation_)?config\.json|{re.escape(MANIFEST)}|(modeling_(gatepack|decilm)|configuration_decilm)\.py|model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_REFUSED = {
    "config": "the folder's config.json describes its weights; change model.config after loading",
    "output_loading_info": "a folder whose tensors do not fit is refused, and the first is named",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.py"]
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
MODELING_KEYS = (
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "gatepack_layout",
    "auto_map",
)


def save_pretrained(model: nn.Module, directory: str | os.PathLike, tokenizer=None) -> None:
    """Saves a gated or packed model (and tokenizer) in Hugging Face's layout, with checksums.

    Everything is written to a temporary folder beside `directory` and put in place by one rename,
    so an interruption or a full disk leaves what was there before. Files of `directory` that are
    not part of a checkpoint stay. Raises OSError, naming the folder, if writing fails, and
    ValueError for a model with unmerged PEFT adapters.
    """
    with saving(model, directory, tokenizer):
        pass


@contextlib.contextmanager
def saving(model: nn.Module, directory: str | os.PathLike, tokenizer=None) -> Iterator[Path]:
    """save_pretrained with a look at the folder before it is put in place.

    What is written there too is put in place with it; an error leaves what was there before.
    """
    root = hf_model(model)
    refuse_adapters(root)
    with replaced_folder(directory, SUPERSEDED) as folder:
        root.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_manifest(folder)
        yield folder


def refuse_adapters(root: nn.Module) -> None:
    """ValueError for a model with PEFT adapters, naming the first module that carries one."""
    for name, module in root.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} carries a PEFT adapter, which is not part of this format: merge it "
                "(model = model.merge_and_unload()) or save it with the PEFT model's own "
                "save_pretrained"
            )


def write_manifest(directory: Path) -> None:
    """Writes gatepack.json: size and SHA-256 of every safetensors file of a folder."""
    files = {
        path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.glob("*.safetensors"))
    }
    text = json.dumps({"format": FORMAT_VERSION, "files": files}, indent=2)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def from_pretrained(directory: str | os.PathLike, *, verify: bool = True, **kwargs) -> nn.Module:
    """Loads a gated or packed model saved by save_pretrained (ours or the model's own).

    directory: a folder, or the name of a model of the Hugging Face Hub (OWNER/NAME), for which
    kwargs may have revision, cache_dir, token and local_files_only. Builds the architecture that
    config.json names (a class of transformers, or one registered with its AutoModel classes), gives
    it the recorded open sets and gates, and lets transformers load the weights, so kwargs are those
    of its from_pretrained (dtype, device_map, attn_implementation, ...), without config and
    output_loading_info: the folder's config is what the weights fit, and tensors that do not are
    refused. Gates that were frozen are frozen again. verify checks the manifest's checksums first.
    Only safetensors are read, and no code of the folder runs unless kwargs have
    trust_remote_code=True. Raises ValueError for a folder that is not such a checkpoint or whose
    files are truncated, altered or do not fit the config, naming file or tensor.
    """
    for name, reason in _REFUSED.items():
        if name in kwargs:
            raise ValueError(f"{name}= is not taken: {reason}")
    if kwargs.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors=False is not taken: pickles are never read")
    directory = _folder_of(directory, kwargs)
    raw = _read_raw_config(directory)
    if verify:
        _verify_manifest(directory)
    shapes = tensor_shapes(directory)
    config = read_config(directory, raw, shapes)
    _forget_modeling_file(config)
    dense_class = _class_of(config, directory)
    record = config.gatepack
    frozen = record.pop("frozen", False)
    if not isinstance(frozen, bool):
        raise ValueError(f"{directory}/config.json: gatepack.frozen is {frozen!r}, not a bool")

    class Rebuilt(dense_class):
        """The dense class, given the recorded open sets and gates before weights are loaded."""

        _keep_in_fp32_modules_strict = {
            *(dense_class._keep_in_fp32_modules_strict or ()),
            f"{GATES_NAME}.logits",
            f"{GATES_NAME}.controller",
        }

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            if "kept" in record:
                shrink(self, record["kept"])
            if "linears" in record:
                shrink_linears(self, record["linears"])
            if "gates" in record:
                attach(self, GateConfig.from_dict(record["gates"]))

    # transformers renames and stacks the tensors of a file by the class that it is for.
    Rebuilt.__name__, Rebuilt.__module__ = dense_class.__name__, dense_class.__module__
    _refuse_misfits(_sketch(Rebuilt, config, directory), shapes, directory)
    try:
        # Sizes that differ are refused below, with the tensor's name, which transformers' own error
        # leaves out.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = Rebuilt.from_pretrained(
            directory, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as error:
        raise ValueError(f"{directory} cannot be loaded: {error!r}") from error
    for what in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if info.get(what):
            first = sorted(info[what], key=str)[0]
            raise ValueError(
                f"{directory} does not fit its config: {what.replace('_', ' ')}, the first is "
                f"{first!r}"
            )
    model.__class__ = dense_class
    model.config.gatepack = record
    gates = getattr(model, GATES_NAME, None)
    if gates is not None:
        # transformers leaves fp32 alone for half precisions only.
        gates.logits.data = gates.logits.data.float()
        gates.sync_from_buffers()
        if frozen:
            gates.freeze()
    return model


def _folder_of(name: str | os.PathLike, options: dict) -> Path:
    """The folder of that name, or a snapshot of the Hub's model; takes the Hub's options out."""
    ours = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    path = Path(name)
    here = path.exists() or left_aside(path.resolve()) is not None
    if here or not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, **ours))
    except Exception as error:
        raise ValueError(
            f"{name} is no folder, and the Hugging Face Hub does not give it: {first_line(error)}"
        ) from error


def _read_raw_config(directory: Path) -> dict:
    """config.json of a gated or packed model, as it stands there."""
    path = directory / "config.json"
    if not path.is_file():
        if aside := left_aside(directory.resolve()):
            raise ValueError(
                f"{directory} was being replaced when that was interrupted: what was there is in "
                f"{aside}; rename it, or save again"
            )
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
    raw = read_json(path)
    record = raw.get("gatepack")
    if not isinstance(record, dict) or not {"kept", "linears", "gates"} & record.keys():
        raise ValueError(
            f"{path} has no gatepack record: this is not a gated or packed model; load it with "
            "transformers"
        )
    packed = "kept" in record or "linears" in record
    if packed and record.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has packed format {record.get('format')!r}, this release reads "
            f"{FORMAT_VERSION}"
        )
    return raw


def read_config(directory: Path, raw: dict, shapes: dict[str, tuple[int, ...]]):
    """transformers' config of a checkpoint folder; ValueError if it cannot be that of the weights.

    raw: config.json. shapes: as of tensor_shapes. What a config builds in loops must have tensors,
    so that no number in it takes forever.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    most = dict.fromkeys(_LAYER_COUNTS, len(shapes))
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    most |= dict.fromkeys(("num_labels", "num_attention_heads", "n_head", "head_dim"), largest)
    for key, bound in most.items():
        value = raw.get(key)
        if value is not None and not (isinstance(value, int) and 0 <= value <= bound):
            raise ValueError(f"{path}: {key} is {value!r}, the weights have room for {bound}")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "/" in str(config._attn_implementation):
        raise ValueError(
            f"{path}: attn_implementation is {config._attn_implementation!r}, code of the Hugging "
            "Face Hub, which a checkpoint cannot ask for; pass attn_implementation= yourself"
        )
    return config


def leave_modeling_file(root: nn.Module) -> None:
    """Makes a model that the file of gatepack.export built one of its stock class again."""
    if hasattr(root.config, "gatepack_layout"):
        root.__class__ = type(root).__bases__[-1]
        _forget_modeling_file(root.config)


def _forget_modeling_file(config) -> None:
    """Removes what gatepack.export writes for transformers; the record of open sets says it all."""
    if hasattr(config, "gatepack_layout"):
        config.per_layer_config = None
        for name in MODELING_KEYS:
            config.__dict__.pop(name, None)
        config.architectures = [name.removeprefix("Packed") for name in config.architectures]


def _class_of(config, directory: Path):
    """The model class that config.json names: of transformers, or registered there."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = config.architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{directory}/config.json: architectures must name a class, got {names!r}")
    name = names[0]
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        registered = None if mapping is None else mapping.get(type(config), None)
        for found in registered if isinstance(registered, tuple) else (registered,):
            if found is not None and found.__name__ == name:
                return found
    raise ValueError(
        f"{directory}/config.json names architecture {name!r}, which transformers does not have; "
        f"where {name!r} is a class of your own, register it first: "
        "transformers.AutoModelForCausalLM.register(config_class, model_class)"
    )


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a folder's weights, from the headers of its safetensors files.

    Raises ValueError, naming the file, if transformers would read anything else: a pickle, a file
    outside of the folder, an adapter.
    """
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} has an adapter_config.json beside the model: move the adapter to a "
            "folder of its own and put it on with peft.PeftModel.from_pretrained"
        )
    shapes = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as handle:
                shapes |= {
                    name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()
                }
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return shapes


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names."""
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
        found = f", only {', '.join(pickles)}, and pickles are never read" if pickles else ""
        raise ValueError(f"{directory} has no safetensors file{found}")
    record = read_json(index)
    shards = record.get("weight_map")
    if not isinstance(shards, dict) or not isinstance(record.get("metadata"), dict):
        raise ValueError(f"{index} must have the objects weight_map and metadata")
    for tensor, name in shards.items():
        safe = isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        if not safe:
            raise ValueError(
                f"{index}: {tensor!r} must be in a safetensors file of this folder, got {name!r}"
            )
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing, {index} has {tensor!r} in it")
    return sorted({directory / name for name in shards.values()})


def _sketch(model_class: type, config, directory: Path) -> nn.Module:
    """The model of a config on meta, where sizes cost nothing."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            return model_class(config)
    except ValueError as error:
        raise ValueError(f"{directory}/config.json: {error}") from error
    except Exception as error:
        raise ValueError(f"{directory}/config.json describes no model: {error!r}") from error


def _refuse_misfits(model: nn.Module, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """ValueError where files and a model on meta differ, before memory is taken for it."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() & shapes.keys()):
        if expected[name] != shapes[name]:
            raise ValueError(
                f"{directory} does not fit its config: {name!r} is {list(shapes[name])}, and "
                f"{list(expected[name])} by config.json"
            )
    missing = {name: math.prod(expected[name]) for name in expected.keys() - shapes.keys()}
    # Tied parameters have two names, and one of them is in the file.
    if sum(missing.values()) > sum(math.prod(shape) for shape in shapes.values()):
        name = max(missing, key=missing.get)
        raise ValueError(
            f"{directory} does not fit its config: missing keys, the largest is {name!r}"
        )


def _verify_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    if not path.is_file():
        return
    try:
        files = read_json(path)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    hint = f". If transformers saved over it since, delete {path} or pass verify=False"
    for name, (size, digest) in expected.items():
        file = directory / Path(name).name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, {path} says {size}{hint}")
        if file_sha256(file) != digest:
            raise ValueError(
                f"{file} was altered after saving: its SHA-256 is not that of {path}{hint}"
            )
