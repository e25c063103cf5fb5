"""What the documentation promises: code that runs, links that lead somewhere, tables that agree."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import _results
import hooks
import pytest
import report
import torch
from checkpoints import save_tiny
from letters import letter_tokenizer
from tiny import tiny_model, token_ids
from transformers import Trainer, TrainingArguments

import gatepack as gp
from gatepack import families, kernels, methods
from gatepack.distillation import Distillation
from gatepack.gate_training import GateSchedule
from gatepack.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NAMES = [page.name for page in PAGES]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """An empty folder to run in; families that the examples register are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    torch.manual_seed(0)
    return tmp_path


def run_code(code: str, folder: Path, **given) -> None:
    """Runs code as a file, whose source Triton can read."""
    (folder / "example.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(folder / "example.py"), init_globals=given)


def python_code(page: Path) -> str:
    """The Python blocks of a page in order, each line where it is on the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines)


def what_readers_have(page: Path, device: torch.device) -> dict:
    """README speaks of a model, its Trainer, a loader and operands; docs/ makes its own."""
    if page.name != "README.md":
        return {}
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4)]
    batches = [{"input_ids": token_ids(seed=i), "labels": token_ids(seed=i)} for i in range(4)]
    settings = {"max_steps": 4, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    return {
        "torch": torch,
        "Trainer": Trainer,
        "args": TrainingArguments("run", use_cpu=True, **settings),
        "data": rows,
        "model": tiny_model("llama", torch.float32, intermediate_size=256),
        "tokenizer": letter_tokenizer(),
        "loader": batches,
        "x": torch.randn(3, 128, device=device),
        "w": torch.randn(16, 128, device=device),
        "bias": torch.randn(16, device=device),
        "z": torch.tensor([1.0, 0.0], device=device),
    }


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_runs(page, scene, device):
    if page.name == "methods.md":
        pytest.importorskip("peft")
    run_code(python_code(page), scene, **what_readers_have(page, device))


def test_the_notebook_runs(scene):
    cells = json.loads(hooks.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code
    run_code("\n".join(code), scene)


def test_the_notebook_holds_no_output():
    for cell in json.loads(hooks.NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "|".join(("python", "csrc", "triton_kernels", "benchmarks", "tests", "docs"))
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*(p.name for p in DOCS.glob("*.md")), *hooks.PAGES])


def test_ops_page_has_every_public_name():
    page = hooks.ops_page()
    for name in kernels.__all__:
        assert f"### {name}\n" in page, name
        first = (getattr(kernels, name).__doc__ or "").strip().splitlines()[0]
        assert hooks.to_markdown(first) in page, name


def test_performance_page_has_every_bench_with_results():
    page = hooks.performance_page()
    rows = [
        json.loads(line)
        for path in (ROOT / "benchmarks" / "results").glob("*/*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    titles = {
        "demo": "From text to a packed model",
        "level": "Levels",
        "op": "Ops",
        "fold_pack": "Packing weights",
        "startup": "Start-up",
    }
    for bench in {row["bench"] for row in rows} & set(titles):
        assert f"## {titles[bench]}\n" in page


def page_of(bench, rows, folder, monkeypatch):
    """The performance page of results of one bench on one device."""
    (folder / "chip").mkdir()
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "chip" / f"{bench}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(_results, "RESULTS", folder)
    return report.performance_page()


def test_op_results_have_a_line_per_setting(tmp_path, monkeypatch):
    stamp = {"commit": "abc", "dirty": False, "date": "2026-01-01", "threads": 1, "torch": "2.9"}
    setting = {"bench": "op", "op": "gated_mlp", "model": "tiny", "dtype": "float32", "open": 0.6}
    rows = [
        {"contender": name, "tokens": tokens, "ms": ms, "flops": 1e6, "bytes": 1, "device": "chip"}
        for name, tokens, ms in (("ours", 8, 1.25), ("masked", 8, 2.5), ("masked", 16, 5.0))
    ]
    roof = {"bench": "ceilings", **dict.fromkeys(("flops", "bytes", "copy", "read"), 1.6e9)}
    rows.append({**roof, "device": "chip"})
    page = page_of("ops", [setting | stamp | row for row in rows], tmp_path, monkeypatch)
    assert "| shape | open | masked, ms | ours, ms | ours, of roofline |" in page
    assert "| tiny, T=8, float32 | 60% | 2.500 | 1.250 | 50% |" in page
    assert "| tiny, T=16, float32 | 60% | 5.000 |  |  |" in page
    assert "chip, 1 threads, torch 2.9, 2026-01-01, commit abc." in page


def test_startup_is_told_of_the_last_run(tmp_path, monkeypatch):
    stamp = {"commit": "abc", "dirty": False, "threads": 1, "torch": "2.9", "device": "chip"}
    rows = [
        {"bench": "startup", "what": what, "seconds": 0.5, "date": date, **more, **stamp}
        for what, date, more in (
            ("import", "2026-01-01", {}),
            ("extension", "2026-01-02", {}),
            ("first call, cold", "2026-01-02", {"op": "gated_linear"}),
        )
    ]
    page = page_of("startup", rows, tmp_path, monkeypatch)
    assert "| extension |  | 0.500 |" in page
    assert "| first call, cold | gated_linear | 0.500 |" in page
    assert "| import |" not in page


def test_packing_of_a_layer_says_into_which_memory(tmp_path, monkeypatch):
    stamp = {"commit": "abc", "dirty": False, "date": "2026-01-01", "threads": 1, "torch": "2.9"}
    row = {"bench": "pack_tensors", "op": "pack", "along": "rows", "shape": "tiny", "kept": 0.6}
    row |= {"dtype": "bfloat16", "backend": "cpp", "GB/s": 40.0, "device": "chip", **stamp}
    rows = [
        {**row, "memory": memory, "ms": ms, "of_copy": of_copy}
        for memory, ms, of_copy in (("fresh", 42.0, 1.5), ("mapped", 9.0, 0.94))
    ]
    page = page_of("pack_tensors", rows, tmp_path, monkeypatch)
    assert "| pack, rows | tiny, bfloat16, 60% kept | fresh | 42.00 | 40.0 | 150% |" in page
    assert "| pack, rows | tiny, bfloat16, 60% kept | mapped | 9.00 | 40.0 | 94% |" in page


def documented_defaults() -> list[tuple[str, str, str]]:
    """(class, field, default) of the tables in methods.md, whose heading names the class."""
    found, current = [], None
    for line in (DOCS / "methods.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            current = re.search(r"`(\w+)`", line)
        elif current and (row := re.match(r"\| `(\w+)` \| `(.*?)` \|", line)):
            found.append((current.group(1), *row.groups()))
    return found


def test_tables_of_methods_agree_with_the_code():
    shared = {"gates"}  # of every one-shot method; the page says it once
    documented = documented_defaults()
    known = {name: getattr(methods, name) for name in methods.__all__} | {
        "Distillation": Distillation,
        "GateSchedule": GateSchedule,
        "TrainConfig": TrainConfig,
    }
    published = set(known) - {"MethodRun", "OneShot"}
    assert {name for name, _, _ in documented} == published
    for name in published:
        defaults = {f.name: repr(f.default) for f in dataclasses.fields(known[name])}
        table = {field: default for owner, field, default in documented if owner == name}
        assert table == {k: v for k, v in defaults.items() if k not in shared}, name


def test_formats_page_names_what_is_written(tmp_path):
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    model = gp.from_pretrained(packed_checkpoint(tmp_path))
    assert all(f"`{key}`" in page for key in model.config.gatepack)
    for path in (tmp_path / "packed").iterdir():
        assert f"`{path.name}`" in page, path.name


def packed_checkpoint(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "dense"))
    gates = gp.attach(model, gp.GateConfig(target=0.7, noise=0.0, width_multiple=1))
    gates.snap()
    gp.pack(model)
    gp.save_pretrained(model, folder / "packed")
    return folder / "packed"


def test_the_site_builds(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build.build(config)
    assert (tmp_path / "site" / "ops" / "index.html").is_file()
