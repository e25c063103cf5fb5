"""Did a change make the CPU faster or slower? This tree against a commit: `make bench-compare`.

    python benchmarks/compare.py --base COMMIT [--seconds S] [--only NAME ...] [--instructions]

The base is checked out into a worktree of its own, with an extension cache of its own. One process
per tree runs the same probes; they take turns, run by run, and the table gives the median of the
paired ratios, base / this tree (more than 1: faster now), with its 20th and 80th percentile.

Wall time is noisy. --instructions also counts the instructions of every CPU op of gatepack._C, in
about half a minute: one thread, AVX2 (valgrind knows no AVX-512), where valgrind is installed.
--only without names leaves the timing out.
"""

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _harness import ROOT

WORKER = Path(__file__).resolve().parent / "_probes.py"
COUNTED = WORKER.with_name("_counted.py")
LONGEST = 300.0  # seconds for the counts of a tree; 30 on an idle machine


@contextlib.contextmanager
def worktree(commit: str):
    """A checkout of a commit, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gatepack-base-"))
    git = ["git", "-C", str(ROOT), "worktree"]
    done = subprocess.run(
        [*git, "add", "--detach", "--force", str(folder), commit], capture_output=True, text=True
    )
    if done.returncode:
        folder.rmdir()
        raise SystemExit(f"--base: expected a commit, got {commit!r}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def environment_of(tree: Path, cache: Path, **more: str) -> dict[str, str]:
    """Python of that tree, an extension cache of its own."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(tree / "python"), before]))
    return {**os.environ, "PYTHONPATH": path, "GATEPACK_CACHE_DIR": str(cache), **more}


class Worker:
    """A process that runs probes of one tree when asked to."""

    def __init__(self, tree: Path, cache: Path, threads: int, small: bool):
        command = [sys.executable, str(WORKER), "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, *(["--small"] if small else [])], env=environment_of(tree, cache), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, name: str) -> float | str:
        """Milliseconds of one run, or why there is none."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"{name}: a worker ended")
        try:
            return float(answer)
        except ValueError:
            return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def paired(
    base: Worker, head: Worker, name: str, seconds: float
) -> list[tuple[float, float]] | str:
    """(base ms, head ms) of runs in turn, the first pair dropped; a text where one cannot run."""
    pairs, start = [], time.perf_counter()
    while len(pairs) < 6 or time.perf_counter() - start < seconds:
        order = (base, head) if len(pairs) % 2 else (head, base)
        answers = {worker: worker.ask(name) for worker in order}
        for worker, answer in answers.items():
            if isinstance(answer, str):
                return f"{'base' if worker is base else 'this tree'}: {answer}"
        pairs.append((answers[base], answers[head]))
    return pairs[1:]


def instructions(tree: Path, cache: Path) -> tuple[dict[str, int], list[str]]:
    """({op: instructions of one call of it in a tree, under callgrind}, what could not be counted).

    callgrind is switched on when the ops are ready: to import torch under it takes minutes.
    """
    for tool in ("valgrind", "callgrind_control"):
        if shutil.which(tool) is None:
            return {}, [f"{tool} is not installed (Debian, Ubuntu: apt-get install valgrind)"]
    more = {"GATEPACK_SIMD": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    env = environment_of(tree, cache, **more)
    build = "from gatepack import _ext; _ext.backend()"
    subprocess.run([sys.executable, "-c", build], env=env, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, str(COUNTED)]
        process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        guard = threading.Timer(LONGEST, process.kill)
        guard.start()
        try:
            left_out = []
            for line in map(str.strip, process.stdout):
                if line == "ready":
                    switch = ["callgrind_control", "--instr=on", str(process.pid)]
                    subprocess.run(switch, check=True, capture_output=True)
                    break
                left_out.append(line)
            names, errors = process.communicate("go\n")
        finally:
            guard.cancel()
            process.kill()
        if process.returncode:
            last = errors.strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
            return {}, [*left_out, *last]
        dumps = (out.with_name(f"out.{i}") for i, _ in enumerate(names.splitlines(), 1))
        counts = (re.search(r"^totals: (\d+)", d.read_text(), re.MULTILINE)[1] for d in dumps)
        return dict(zip(names.splitlines(), map(int, counts), strict=True)), left_out


def print_instructions(caches: dict[Path, Path]) -> None:
    """Both trees' counts and their ratios; the trees are counted side by side."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(instructions, caches, caches.values()))
    (base, base_left), (head, head_left) = found
    print(f"{'op, one call':26}{'base':>14}{'now':>14}{'ratio':>8}  instructions")
    for name in [*head, *(name for name in base if name not in head)]:
        if name in base and name in head:
            ratio = base[name] / max(head[name], 1)
            print(f"{name:26}{base[name]:14,}{head[name]:14,}{ratio:8.3f}")
    for where, texts in (("base", base_left), ("this tree", head_left)):
        for text in texts:
            print(f"not counted in {where}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="commit, branch or tag")
    parser.add_argument("--seconds", type=float, default=10.0, help="per probe")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", help="probes, or none; default all")
    parser.add_argument("--small", action="store_true", help="tiny shapes: tries the machinery")
    parser.add_argument("--instructions", action="store_true", help="count them, too")
    options = parser.parse_args()
    listed = subprocess.run(
        [sys.executable, str(WORKER), "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    unknown = set(options.only or ()) - set(listed)
    if unknown:
        raise SystemExit(f"--only: expected some of {listed}, got {sorted(unknown)}")
    with worktree(options.base) as tree, tempfile.TemporaryDirectory() as cache:
        caches = {tree: Path(cache) / "base", ROOT: Path(cache) / "head"}
        base, head = (
            Worker(folder, caches[folder], options.threads, options.small) for folder in caches
        )
        print(f"base {options.base} against this tree, {options.threads} threads")
        print(
            f"{'probe':20}{'base ms':>10}{'now ms':>10}{'ratio':>8}{'p20':>7}{'p80':>7}{'runs':>6}"
        )
        for name in listed if options.only is None else options.only:
            pairs = paired(base, head, name, options.seconds)
            if isinstance(pairs, str):
                print(f"{name:20}skipped: {pairs}")
                continue
            ratios = [one / two for one, two in pairs]
            p20, *_, p80 = statistics.quantiles(ratios, n=5)
            middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
            print(
                f"{name:20}{middle[0]:10.3f}{middle[1]:10.3f}{statistics.median(ratios):8.3f}"
                f"{p20:7.3f}{p80:7.3f}{len(pairs):6}",
                flush=True,
            )
        for worker in (base, head):
            worker.close()
        if options.instructions:
            print_instructions(caches)


if __name__ == "__main__":
    main()
