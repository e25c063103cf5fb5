"""Stage 7, command line: what a run that was cut off has finished."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gatepack.training import write_json

STATE = ".resume"


@dataclass(frozen=True)
class State:
    """What is finished so far, in a folder that a rerun with the same settings finds."""

    folder: Path

    @classmethod
    def open(cls, out: Path, settings: dict) -> "State":
        """The state in a result's folder; ValueError if it belongs to a run with other settings.

        settings: plain JSON, stored when there is no state yet.
        """
        folder = out / STATE
        path = folder / "settings.json"
        if not path.is_file():
            write_json(path, settings)
            return cls(folder)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); pass --restart to start over"
            ) from error
        differs = sorted(key for key in settings if found.get(key) != settings[key])
        if differs:
            raise ValueError(
                f"{folder} holds an unfinished run with another {', '.join(differs)}; "
                "pass --restart to drop it or --out to write elsewhere"
            )
        return cls(folder)

    @staticmethod
    def drop(out: Path) -> None:
        """Forgets what was not finished."""
        shutil.rmtree(out / STATE, ignore_errors=True)

    def once(self, name: str, compute: Callable[[], float]) -> float:
        """The stored result of a stage, or compute's, which is then stored."""
        path = self.folder / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name not in results:
            results[name] = compute()
            write_json(path, results)
        return results[name]

    def clear(self) -> None:
        shutil.rmtree(self.folder)
