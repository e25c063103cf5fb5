"""Stage 7, command line: what a run that was cut off has finished."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatepack.files import read_json, write_json

STATE = ".resume"


@dataclass(frozen=True)
class State:
    """What is finished so far, in a folder that a rerun with the same settings finds."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: dict) -> "State":
        """The state in a folder; ValueError if it belongs to a run with other settings.

        settings: plain JSON, stored when there is no state yet.
        """
        path = folder / "settings.json"
        if not path.is_file():
            write_json(path, settings)
            return cls(folder)
        found = _read(path)
        differs = sorted(key for key in settings if found.get(key) != settings[key])
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

    def clear(self) -> None:
        shutil.rmtree(self.folder)


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; pass --restart to start over") from error
