"""mkdocs hooks: the pages that are made from something else, each time the site is built.

ops.md from the docstrings of gatepack.kernels, performance.md from benchmarks/results, and
quickstart.md from the notebook.
"""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import torch

from gatepack import kernels

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
_SPECIAL = re.compile(r"`[^`\n]+`|[\\`*_<>\[\]#]")


def on_files(files, config):
    """Adds the made pages; the notebook itself is shown as one of them."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def ops_page() -> str:
    """Every public name of gatepack.kernels: formulas of its file, signature and docstring."""
    parts = [
        "# Ops",
        "Made from the docstrings of `gatepack.kernels`. Every op is a function `<op>_fn`, with "
        "its reference in plain torch, `<op>_ref`, beside it, and is registered as "
        "`torch.ops.gatepack.<op>`.",
    ]
    rest = []
    for name in kernels.__all__:
        op, _, kind = name.rpartition("_")
        if kind == "fn":
            parts += _op_section(op)
        elif kind != "ref":
            rest.append(name)
    parts += ["## Tiles and results"]
    for name in rest:
        parts += [f"### {name}", *_signed(name)]
    return "\n\n".join(parts) + "\n"


def _op_section(op: str) -> list[str]:
    function = getattr(kernels, f"{op}_fn")
    module = inspect.getmodule(function)
    about = inspect.getdoc(module).removeprefix("Stage 2, kernels: ")
    parts = [f"## {op}", to_markdown(about[0].upper() + about[1:])]
    parts += [f"### {op}_fn", *_signed(f"{op}_fn")]
    parts += [f"### {op}_ref", *_signed(f"{op}_ref")]
    schema = getattr(torch.ops.gatepack, op).default._schema
    return [*parts, "Registered as", f"```text\n{schema}\n```"]


def _signed(name: str) -> list[str]:
    """Signature and docstring of a public name."""
    value = getattr(kernels, name)
    parameters = inspect.signature(value).parameters.values()
    lines, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {parameter},")
    signature = re.sub(r"gatepack\.kernels\.\w+\.", "", "\n".join([f"{name}(", *lines, ")"]))
    return [f"```python\n{signature}\n```", to_markdown(inspect.getdoc(value) or "")]


def to_markdown(docstring: str) -> str:
    """A docstring in Markdown: formulas and `names` stay code, what is special elsewhere is not."""
    blocks = docstring.split("\n\n")
    return "\n\n".join(b if b.startswith("    ") else _SPECIAL.sub(_plain, b) for b in blocks)


def _plain(match: re.Match) -> str:
    found = match.group()
    return found if len(found) > 1 else f"&#{ord(found)};"


def performance_page() -> str:
    """What benchmarks/report.py makes of benchmarks/results."""
    return _benchmark("report").performance_page()


def quality_page() -> str:
    """What benchmarks/report_quality.py makes of benchmarks/results/quality."""
    return _benchmark("report_quality").quality_page()


def _benchmark(name: str):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook_page() -> str:
    """The notebook's text and code, with a link to the file."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    parts = [
        f"```python\n{''.join(cell['source'])}\n```"
        if cell["cell_type"] == "code"
        else "".join(cell["source"])
        for cell in cells
    ]
    parts.insert(1, f"This page is the notebook [{NOTEBOOK.name}]({NOTEBOOK.name}).")
    return "\n\n".join(parts) + "\n"


PAGES = {
    "ops.md": ops_page,
    "performance.md": performance_page,
    "quality.md": quality_page,
    "quickstart.md": notebook_page,
}
