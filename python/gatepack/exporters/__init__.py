"""Stage 6, export: a packed model in the formats that other programs load."""

import importlib
import os
import shutil
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from gatepack.checkpoint import SUPERSEDED
from gatepack.exporters.card import write_card
from gatepack.exporters.parity import default_windows
from gatepack.exporters.source import Source, read_model
from gatepack.files import files_in, link, refuse_out, replaced_folder
from gatepack.inspection import identify
from gatepack.models import DTYPES
from gatepack.progress import Log
from gatepack.resume import State
from gatepack.timing import Measurement

FORMATS = ("uniform", "hf", "gguf", "decilm", "onnx")
# Formats that convert weights themselves, and what they take beyond DTYPES.
_QUANTIZED = {"gguf": ("q8_0",)}


def export(
    model: nn.Module,
    directory: str | os.PathLike,
    format: str = "uniform",
    *,
    tokenizer=None,
    dtype: str = "auto",
    windows: torch.Tensor | None = None,
    base: str = "",
    data: str = "",
    speed: Measurement | None = None,
    log: Log | None = None,
    state: State | None = None,
) -> dict:
    """Writes a packed (or dense) model for other programs, runs one of them on it, and reports.

    format: "uniform" (a stock checkpoint; every layer has the same sizes), "hf" (sizes of each
    layer, with a modelling file for transformers), "gguf" (llama.cpp), "decilm" (vLLM, SGLang,
    TensorRT-LLM) or "onnx" (onnxruntime). dtype: float32, bfloat16, float16 or, for "auto", the
    model's own; "gguf" also takes q8_0. windows [n, length]: token ids on which what was written is
    compared with the model; None for random ones. For the model card, README.md: base, the dense
    model; data, what it was pruned or trained on; speed, of gatepack.measure.

    state: where the files and the comparison are kept until all is done, so that a run that was
    cut off goes on; None keeps nothing.

    The folder is written whole or not at all, after the comparison. Returns format, model, files
    (name -> bytes), parity, and notes, what the format does not carry. Raises ValueError for a
    model that the format cannot hold, naming what to change, and for the folder that the model was
    loaded from; ParityError if what was written does not compute what the model does; ImportError
    with the pip line for a missing package.
    """
    source, writer = plan(model, format, tokenizer=tokenizer, dtype=dtype)
    refuse_out(directory, source.model.name_or_path or None)
    windows = default_windows(source.model) if windows is None else windows
    log = log or Log()

    def write(folder: Path) -> list[str]:
        log.say(f"writing {format}")
        if format in _QUANTIZED:
            with log.bar("converting", "tensor") as tell:
                notes = writer.write(source, folder, dtype, tell)
        else:
            notes = writer.write(source, folder)
        if tokenizer is not None and format != "gguf":
            tokenizer.save_pretrained(folder)
        return notes

    def check(folder: Path) -> dict:
        log.say("comparing what was written with the model")
        return {**writer.check(source, folder, windows), "windows": list(windows[:4].shape)}

    with replaced_folder(directory, SUPERSEDED) as folder:
        if state is None:
            notes, parity = write(folder), check(folder)
        else:
            kept, notes, digest = state.folder_once("files", write)
            shutil.copytree(kept, folder, symlinks=True, copy_function=link, dirs_exist_ok=True)
            parity = state.once(f"parity of {digest}", lambda: check(folder))
        report = {
            "format": format,
            "model": identify(source.model, base),
            "files": _sizes(folder),
            "parity": parity,
            "notes": notes,
        }
        write_card(source, folder, report, base, data, speed)
    return report


def plan(
    model: nn.Module, format: str, *, tokenizer=None, dtype: str = "auto"
) -> tuple[Source, ModuleType]:
    """(Source, module of the format) for a model that the format holds; ValueError for others."""
    check_options(format, dtype)
    casts = format not in _QUANTIZED and dtype != "auto"
    source = read_model(model, tokenizer, DTYPES[dtype] if casts else None)
    writer = importlib.import_module(f"gatepack.exporters.{format}")
    writer.refuse(source)
    return source, writer


def check_options(format: str, dtype: str) -> None:
    """ValueError for a format that there is not, or a dtype that it does not take."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    allowed = (*DTYPES, *_QUANTIZED.get(format, ()))
    if dtype not in allowed:
        raise ValueError(
            f"dtype must be one of {', '.join(allowed)} for format {format!r}, got {dtype!r}"
        )


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files_in(folder)}
