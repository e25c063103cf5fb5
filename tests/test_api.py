"""The public names: each one imports, their signatures are pinned, and importing gatepack alone
loads none of what is heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import api
import pytest

import gatepack

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}
# Sections are added by `make api`.
PINNED = json.loads(api.PINNED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", gatepack.__all__)
def test_public_name_imports(name):
    assert getattr(gatepack, name) is not None
    assert name in dir(gatepack)


@pytest.mark.parametrize("name", gatepack.methods.__all__)
def test_method_imports_on_first_use(name):
    assert getattr(gatepack.methods, name) is not None
    assert name in dir(gatepack.methods)


def test_unknown_method_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Guess'"):
        _ = gatepack.methods.Guess


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_this'"):
        _ = gatepack.nothing_like_this


@pytest.mark.parametrize("module", PINNED)
def test_signatures_are_as_pinned(module):
    if module == "gatepack.kernels":
        pytest.importorskip("triton")
    found = api.changes(PINNED[module], api.public_api(module))
    assert not found, "\n".join(
        [
            f"the public API of {module} is not what tests/api.json says:",
            *found,
            "Where that is meant: run `make api`, write it in CHANGELOG.md, and for what was "
            "removed or changed raise the major version (before 1.0: the minor one).",
        ]
    )


def test_changes_name_what_was_removed_changed_and_added():
    before = {"a": "(x)", "b": "(x)", "c": "(x)"}
    assert api.changes(before, {"b": "(x, y)", "c": "(x)", "d": "()"}) == [
        "removed: a(x)",
        "changed: b(x) is now (x, y)",
        "added: d()",
    ]


def test_type_checkers_see_every_name():
    message = "gatepack/__init__.py shows type checkers other names than _EXPORTS: run `make api`"
    assert api.written_imports() == api.typed_imports(gatepack._EXPORTS), message


def test_kernels_are_reached_by_the_package_name():
    pytest.importorskip("triton")
    from gatepack import kernels

    assert callable(kernels.gated_linear_fn)
    assert kernels.__name__ == "gatepack.kernels"


def test_import_loads_nothing_heavy():
    code = (
        "import sys, gatepack; gatepack.__version__, dir(gatepack); "
        "print([m for m in ('torch', 'triton', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_gates_need_no_transformers():
    code = (
        "import sys, gatepack as gp; gp.GateConfig(); gp.GateSet; gp.GatedLinear; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == 0
