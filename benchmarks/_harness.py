"""Timing, environment stamp and JSONL, shared by every benchmark here.

One line per number: it can be read alone, years later, and says whether the tree was clean.
"""

import datetime
import itertools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch

from gatepack import _env

ROOT = Path(__file__).resolve().parent.parent
L2_BYTES = 256 << 20  # more than the L2 of any GPU at hand: 50 MB on H100, 126 MB on B200


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def environment(device: torch.device | str = "cpu") -> dict:
    """What a number depends on besides the code: commit, dirty, date, device, torch, triton.

    dirty: whether anything but results has changed since the commit. Of a copy of the sources that
    is no checkout, GATEPACK_COMMIT is the commit, and what has changed since cannot be known.
    """
    device = torch.device(device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "commit": _git("rev-parse", "--short", "HEAD") or _env.commit(),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def command_line() -> str:
    """What was called, with files by their names alone."""
    words = (Path(word).name if Path(word).exists() else word for word in sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def interleaved(
    functions: dict,
    seconds: float = 2.0,
    device: torch.device | str = "cpu",
    graphs: Collection[str] = (),
    twice: bool = False,
) -> dict:
    """{name: {"ms", "p20", "p80", "runs", "graph"}}: the functions in turn, round by round, for
    `seconds`.

    Interleaving lets a disturbance hit all of them; the first round warms up and is dropped. On a
    GPU the L2 cache is overwritten before each run. graphs: names to replay as a CUDA graph, so
    that launches cost nothing; one that cannot be captured runs as it is ("graph": false).
    twice: time the second of two calls. Memory that lies free for 2 s goes back to the host of a
    virtual machine, and fetching it again costs ten times the writing; what the first call frees,
    the second still finds.
    """
    on_gpu = torch.device(device).type == "cuda"
    captured = {name: on_gpu and name in graphs and _capture(f) for name, f in functions.items()}
    runs = {name: captured[name].replay if captured[name] else f for name, f in functions.items()}
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if on_gpu else None
    times = {name: [] for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < 6 or time.perf_counter() - start < seconds:
        for name, function in runs.items():
            if twice:
                function()
            if on_gpu:
                flush.zero_()
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
            "graph": bool(captured[name]),
        }
    return summary


def _capture(function):
    """function as a CUDA graph, or None where it waits for the host, which capture forbids."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
        waits = makes_the_host_wait(function)
    torch.cuda.current_stream().wait_stream(stream)
    if waits:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def makes_the_host_wait(function) -> bool:
    """Whether a call of function on a GPU waits for it, or fails.

    To be asked before a capture: one that fails leaves torch's generator of random numbers
    unusable for the rest of the process.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def ceilings(device: torch.device | str, dtype: torch.dtype) -> dict:
    """What torch reaches here, per second: {"flops"} of a large matmul, bytes of a large {"copy"}
    (read and written) and of a large {"read"} (a sum), and {"bytes"}, the faster of the two."""
    on_gpu = torch.device(device).type == "cuda"
    side, length = (8192, 1 << 29) if on_gpu else (1024, 1 << 27)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length // 4, device=device)
    target = torch.empty_like(source)
    functions = {
        "matmul": lambda: torch.mm(a, b),
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
    }
    times = interleaved(functions, 1.5, device)
    copy = 2 * length / times["copy"]["ms"] * 1e3
    read = length / times["read"]["ms"] * 1e3
    return {
        "flops": 2 * side**3 / times["matmul"]["ms"] * 1e3,
        "copy": copy,
        "read": read,
        "bytes": max(copy, read),
    }


def peak_bytes(function, device: torch.device | str) -> int:
    """The most that one call of function holds beyond what is held before it.

    CUDA: the allocator's own peak. CPU: the running sum of what torch's profiler says that the
    allocator gave and took, so memory that is not torch's is left out.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def append(path: Path | str, rows: list[dict]) -> None:
    """Add one JSON line per row; earlier results are never rewritten."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
