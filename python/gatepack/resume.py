"""Stage 7, command line: what a run that was cut off has finished."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gatepack.checkpoint import file_sha256
from gatepack.files import files_in, read_json, replaced_folder, write_json
from gatepack.progress import Log
from gatepack.texts import sha256_of

STATE = ".resume"


@dataclass(frozen=True)
class State:
    """What is finished so far, in a folder that a rerun with the same settings finds."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: dict) -> "State":
        """The state in a folder; ValueError if it belongs to a run with other settings.

        settings: plain JSON, stored where nothing is finished yet.
        """
        path = folder / "settings.json"
        if not path.is_file() or list(folder.iterdir()) == [path]:
            write_json(path, settings)
            return cls(folder)
        found, wanted = _flat(_read(path)), _flat(settings)
        differs = [
            f"{key} ({_short(found.get(key))}, now {_short(wanted[key])})"
            for key in sorted(wanted)
            if found.get(key) != wanted[key]
        ]
        if differs:
            raise ValueError(
                f"{folder} holds an unfinished run with another {', '.join(differs)}; "
                "pass --restart to drop it or --out to write elsewhere"
            )
        return cls(folder)

    @staticmethod
    def drop(folder: Path) -> None:
        """Forgets what was not finished."""
        shutil.rmtree(folder, ignore_errors=True)

    def once(self, name: str, compute: Callable[[], object]):
        """The stored result of a stage, or compute's, which is then stored; plain JSON."""
        path = self.folder / "results.json"
        results = _read(path) if path.is_file() else {}
        if name not in results:
            results[name] = compute()
            write_json(path, results)
        return results[name]

    def folder_once(self, name: str, write: Callable[[Path], object]) -> tuple[Path, object, str]:
        """(folder, what write(folder) returned for it, a digest of its files).

        write fills it, whole or not at all, unless it was filled and no file was changed since.
        """
        folder, path = self.folder / name, self.folder / f"{name}.json"
        record = _read(path) if path.is_file() else {}
        if record.get("sha256") != _digest(folder):
            with replaced_folder(folder, re.compile(".*")) as staging:
                result = write(staging)
            record = {"sha256": _digest(folder), "result": result}
            write_json(path, record)
        return folder, record["result"], record["sha256"]

    def clear(self) -> None:
        shutil.rmtree(self.folder)


def say_what_goes(out: Path, log: Log) -> None:
    """Tells of a model in the folder that is about to be replaced."""
    if (Path(out) / "config.json").is_file():
        log.say(f"{out} holds a model, which the new one will replace")


def state_of(out: Path) -> Path:
    """Where a command that writes one file keeps what it has finished so far."""
    return out.with_name(f"{out.name}{STATE}")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A digest of a model's class and of its tensors."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted names."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _digest(folder: Path) -> str:
    """Of the names and bytes of a folder's files, at any depth."""
    return sha256_of(f"{p.relative_to(folder)} {file_sha256(p)}" for p in files_in(folder))


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; pass --restart to start over") from error
