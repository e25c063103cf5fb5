"""Timing, environment stamp and JSONL, shared by every benchmark here.

One line per number: it can be read alone, years later, and says whether the tree was clean.
"""

import datetime
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def environment(device: torch.device | str = "cpu") -> dict:
    """What a number depends on besides the code: commit, dirty, date, device, torch, triton."""
    device = torch.device(device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def interleaved(functions: dict, seconds: float = 2.0, device: torch.device | str = "cpu") -> dict:
    """{name: {"ms", "p20", "p80", "runs"}}: the functions in turn, round by round, for `seconds`.

    Interleaving lets a disturbance hit all of them; the first round warms up and is dropped.
    """
    on_gpu = torch.device(device).type == "cuda"
    times = {name: [] for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            if on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end)
            else:
                begin = time.perf_counter()
                function()
                elapsed = (time.perf_counter() - begin) * 1e3
            if rounds:
                times[name].append(elapsed)
        rounds += 1
    summary = {}
    for name, values in times.items():
        p20, *_, p80 = statistics.quantiles(values, n=5)
        summary[name] = {
            "ms": statistics.median(values),
            "p20": p20,
            "p80": p80,
            "runs": len(values),
        }
    return summary


def append(path: Path | str, rows: list[dict]) -> None:
    """Add one JSON line per row; earlier results are never rewritten."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
