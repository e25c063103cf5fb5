"""Stage 6, save: checkpoints of gated and packed models, written whole or not at all."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from gatepack.config import GateConfig
from gatepack.hf import GATES_NAME, attach, hf_model
from gatepack.packing import FORMAT_VERSION, shrink
from gatepack.row_column_packing import shrink_linears

MANIFEST = "gatepack.json"
_SUPERSEDED = re.compile(
    rf"(generation_)?config\.json|{re.escape(MANIFEST)}|(modeling_(gatepack|decilm)|configuration_decilm)\.py|model(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
)
MODELING_KEYS = (
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "gatepack_layout",
    "auto_map",
)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def save_pretrained(model: nn.Module, directory: str | os.PathLike, tokenizer=None) -> None:
    """Saves a gated or packed model (and tokenizer) in Hugging Face's layout, with checksums.

    Everything is written to a temporary folder beside `directory` and put in place by one rename,
    so an interruption or a full disk leaves what was there before. Files of `directory` that are
    not part of a checkpoint stay. Raises OSError, naming the folder, if writing fails, and
    ValueError for a model with unmerged PEFT adapters.
    """
    root = hf_model(model)
    refuse_adapters(root)
    with replaced_folder(directory) as staging:
        root.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_manifest(staging)


def refuse_adapters(root: nn.Module) -> None:
    """ValueError for a model with PEFT adapters, naming the first module that carries one."""
    for name, module in root.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} carries a PEFT adapter, which is not part of this format: merge it "
                "(model = model.merge_and_unload()) or save it with the PEFT model's own "
                "save_pretrained"
            )


@contextlib.contextmanager
def replaced_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `directory`, put in its place by one rename if all goes well.

    Files of `directory` that are not part of a checkpoint stay. Raises OSError, naming the folder,
    if writing fails; what was there is then unchanged. ValueErrors and FloatingPointErrors pass.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise OSError(f"{directory} is not a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging = Path(
            tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent)
        )
    except OSError as error:
        raise OSError(f"cannot write beside {directory}: {error}") from error
    try:
        yield staging
        _replace(staging, directory)
    except (ValueError, FloatingPointError):
        raise
    except Exception as error:
        raise OSError(
            f"saving to {directory} failed, what was there is unchanged: {error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(directory: Path) -> None:
    """Writes gatepack.json: size and SHA-256 of every safetensors file of a folder."""
    files = {
        path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(directory.glob("*.safetensors"))
    }
    with open(directory / MANIFEST, "w", encoding="utf-8") as handle:
        json.dump({"format": FORMAT_VERSION, "files": files}, handle, indent=2)
        handle.flush()
        os.fsync(handle.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _replace(staging: Path, directory: Path) -> None:
    """Puts staging in directory's place; afterwards staging holds what was superseded."""
    os.chmod(staging, 0o777 & ~_umask())
    if not directory.exists():
        os.rename(staging, directory)
        return
    foreign = [
        path.name
        for path in directory.iterdir()
        if not _SUPERSEDED.fullmatch(path.name) and not (staging / path.name).exists()
    ]
    _exchange(staging, directory)
    moved = []
    try:
        for name in foreign:
            os.rename(staging / name, directory / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(directory / name, staging / name)
        _exchange(staging, directory)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _exchange(first: Path, second: Path) -> None:
    """Swaps two folders: in one step where the kernel can, else through a third name."""
    renameat2 = None
    with contextlib.suppress(OSError, AttributeError):
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2 is not None:
        arguments = (
            _AT_FDCWD,
            os.fsencode(first),
            _AT_FDCWD,
            os.fsencode(second),
            _RENAME_EXCHANGE,
        )
        if renameat2(*arguments) == 0:
            return
    aside = second.with_name(f"{first.name}.old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    try:
        os.rename(aside, first)
    except BaseException:
        os.rename(second, first)
        os.rename(aside, second)
        raise


def from_pretrained(directory: str | os.PathLike, *, verify: bool = True, **kwargs) -> nn.Module:
    """Loads a gated or packed model saved by save_pretrained (ours or the model's own).

    Builds the architecture that config.json names (a class of transformers, or one registered with
    its AutoModel classes), gives it the recorded open sets and gates, and lets transformers load
    the weights, so kwargs are those of its from_pretrained (dtype, device_map,
    attn_implementation, ...). verify checks the manifest's checksums first. Only
    safetensors are read. Raises ValueError for a folder that is not such a checkpoint or whose
    files are truncated, altered or do not fit the config, naming file or tensor.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if verify:
        _verify_manifest(directory)
    _check_readable(directory)
    dense_class = _class_of(config, directory)
    record = config.gatepack

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

    Rebuilt.__name__ = dense_class.__name__
    try:
        # Sizes that differ are refused below, with the tensor's name, which transformers' own error
        # leaves out.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = Rebuilt.from_pretrained(
            directory, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{directory} cannot be loaded: {error}") from error
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
        gates.sync_from_buffers()
    return model


def _read_config(directory: Path):
    from transformers import AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
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
    _forget_modeling_file(config)
    return config


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

    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if hasattr(found, "from_pretrained"):
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


def _check_readable(directory: Path) -> None:
    """Reads the header of every safetensors file, so that a truncated one is named."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{directory} has no safetensors file; other weight files are not read")
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _verify_manifest(directory: Path) -> None:
    path = directory / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
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
        if _sha256(file) != digest:
            raise ValueError(
                f"{file} was altered after saving: its SHA-256 is not that of {path}{hint}"
            )
