"""What the benches of packing share: each op is timed beside a copy of the bytes that it writes."""

import argparse
from collections.abc import Iterable

import torch
from _harness import append, environment, interleaved

from gatepack import _ext


def options(doc: str, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="per comparison")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", help="file to append to, one line per number")
    return parser


def check(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if not torch.equal(actual, expected):
        raise SystemExit(f"{name} is wrong: not timed")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def timed(
    functions: dict, bases: tuple[str, ...], nbytes: int, seconds: float, device: str, **fields
) -> list[dict]:
    """One row for each function: its time, GB/s of nbytes read and written, and how many times
    faster than each of `bases` it is."""
    times = interleaved(functions, seconds, device, twice=torch.device(device).type == "cpu")
    return [
        {
            **fields,
            "op": name,
            "backend": _ext.backend().name,
            **{key: round(value, 5) for key, value in time.items()},
            "GB/s": round(2e-6 * nbytes / time["ms"], 2),
            **{
                f"of_{base}": round(times[base]["ms"] / time["ms"], 3) if base in times else None
                for base in bases
            },
            "error": 0.0,
        }
        for name, time in times.items()
    ]


def run(
    chosen: argparse.Namespace,
    bases: tuple[str, ...],
    labels: tuple[str, ...],
    tables: Iterable[tuple[str, list[dict]]],
) -> None:
    """Prints each (title, rows) as it is made, a line for each row with its `labels` in front, and
    appends the rows to --json."""
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    stamp = environment(chosen.device)
    print(f"{stamp['device']}, torch {stamp['torch']}, {_ext.backend().reason}")
    print("x: how many times faster than each; GB/s: bytes kept, read + written")
    for title, rows in tables:
        print(f"\n{title}")
        columns = ("ms", "p20", "p80", "GB/s", *(f"x {base}" for base in bases))
        print(" " * 16 * len(labels) + "".join(f"{column:>16}" for column in columns))
        for row in rows:
            ratios = ("" if row[f"of_{base}"] is None else row[f"of_{base}"] for base in bases)
            values = (*(f"{row[key]:.4g}" for key in ("ms", "p20", "p80", "GB/s")), *ratios)
            names = "".join(f"{row[label]:16}" for label in labels)
            print(names + "".join(f"{value:>16}" for value in values))
        if chosen.json:
            append(chosen.json, [{**row, **stamp} for row in rows])
