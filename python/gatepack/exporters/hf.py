"""Stage 6, export: sizes of each layer for transformers, with a small modelling file.

config.json has per_layer_config (transformers >= 5.14 reads it), auto_map, and gatepack_layout, the
family's row; modeling_gatepack.py gives the stock classes those sizes. Loads with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), and with
gatepack.from_pretrained, which runs no code of the folder.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from gatepack.checkpoint import write_manifest
from gatepack.exporters.parity import auto_class, check_reloaded
from gatepack.exporters.source import Source, edited_config

MODELING = "modeling_gatepack"
_CLASSIFIERS = ("SequenceClassification", "TokenClassification")


def refuse(source: Source) -> None:
    """ValueError for a model that is not of a class of transformers."""
    auto_class(source.stock_class().__name__)


def write(source: Source, folder: Path) -> list[str]:
    """Writes the checkpoint with its modelling file; returns what it does not carry."""
    name = source.stock_class().__name__
    source.model.save_pretrained(folder)
    digits = len(str(len(source.sizes) - 1))
    with edited_config(folder) as config:
        config["per_layer_config"] = {
            str(index).zfill(digits): source.config_sizes(sizes)
            for index, sizes in enumerate(source.sizes)
        }
        config["allow_global_per_layer_attribute_access"] = True
        config["gatepack_layout"] = {
            **asdict(source.layers[0].family),
            "width_key": source.width_key,
        }
        config["architectures"] = [f"Packed{name}"]
        config["auto_map"] = _auto_map(source, name)
    shutil.copyfile(Path(__file__).with_name(f"{MODELING}.py"), folder / f"{MODELING}.py")
    write_manifest(folder)
    return []


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    return check_reloaded(source, folder, windows, trust_remote_code=True)


def _auto_map(source: Source, name: str) -> dict[str, str]:
    """The model's own head, the bare model, and the classifiers that its family has."""
    import transformers

    family = name.partition("For")[0].removesuffix("LMHeadModel")
    classes = {auto_class(name): name, "AutoModel": f"{family}Model"}
    for head in _CLASSIFIERS:
        classes.setdefault(f"AutoModelFor{head}", f"{family}For{head}")
    return {
        auto: f"{MODELING}.Packed{found}"
        for auto, found in classes.items()
        if hasattr(transformers, found)
    }
