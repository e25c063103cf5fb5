"""The public names and their signatures, as text; `make api` writes them down.

python tests/support/api.py [MODULE ...]    pins these modules (default: all of MODULES) in
                                            tests/api.json and writes the typed imports of
                                            gatepack/__init__.py
"""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "tests" / "api.json"
INIT = ROOT / "python" / "gatepack" / "__init__.py"
MODULES = ("gatepack", "gatepack.kernels", "gatepack.methods", "gatepack.repack", "gatepack.vocab")
_BLOCK = re.compile(r"(?<=^if TYPE_CHECKING:\n).*?(?=^else:\n)", re.DOTALL | re.MULTILINE)


def public_api(module: str) -> dict[str, str]:
    """name -> signature of what a module exports, "Class.name" for what its classes define."""
    found = {}
    package = importlib.import_module(module)
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value):
            found.update(_members(name, value))
        elif callable(value):
            found[name] = _signature(value)
        else:
            found[name] = type(value).__name__
    return dict(sorted(found.items()))


def changes(pinned: dict[str, str], present: dict[str, str]) -> list[str]:
    """One line per name that was removed, changed or added."""
    lines = [f"removed: {name}{pinned[name]}" for name in pinned if name not in present]
    lines += [
        f"changed: {name}{pinned[name]} is now {present[name]}"
        for name in pinned
        if present.get(name, pinned[name]) != pinned[name]
    ]
    return lines + [f"added: {name}{present[name]}" for name in present if name not in pinned]


def typed_imports(exports: dict[str, str]) -> str:
    """The imports that gatepack/__init__.py shows to type checkers; "as" makes them public."""
    rows = sorted((module, name) for name, module in exports.items())
    lines = [f"    from gatepack.{module} import {name} as {name}" for module, name in rows]
    lines.insert(0, "    from gatepack import methods as methods")
    names = "".join(f'        "{name}",\n' for name in sorted((*exports, "methods", "__version__")))
    return "\n".join([*lines, "", f"    __all__ = [\n{names}    ]\n"])


def written_imports() -> str:
    (block,) = _BLOCK.findall(INIT.read_text(encoding="utf-8"))
    return block


def _members(name: str, cls: type) -> dict[str, str]:
    """The constructor and what the class or its bases in gatepack define."""
    made_by = next(b for b in cls.__mro__ if {"__init__", "__new__"} & vars(b).keys())
    ours = made_by.__module__.startswith("gatepack")
    found = {name: _signature(cls) if ours else f"(as {made_by.__module__}.{made_by.__name__})"}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("gatepack"):
            continue
        for member, value in vars(base).items():
            if member.startswith("_"):
                continue
            if isinstance(value, property):
                found[f"{name}.{member}"] = f": {_annotation(value.fget)}"
            elif isinstance(value, classmethod | staticmethod):
                found[f"{name}.{member}"] = _signature(getattr(cls, member))
            elif inspect.isfunction(value):
                found[f"{name}.{member}"] = _signature(value)
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if not field.name.startswith("_"):
                found[f"{name}.{field.name}"] = f": {_text(field.type)}"
    return found


def _signature(value) -> str:
    return str(inspect.signature(value)).replace("pathlib._local.", "pathlib.")


def _annotation(function) -> str:
    return _text(inspect.signature(function).return_annotation)


def _text(annotation) -> str:
    return "?" if annotation is inspect.Signature.empty else inspect.formatannotation(annotation)


def main() -> None:
    pinned = json.loads(PINNED.read_text(encoding="utf-8")) if PINNED.exists() else {}
    for module in sys.argv[1:] or MODULES:
        pinned[module] = public_api(module)
    PINNED.write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")
    exports = importlib.import_module("gatepack")._EXPORTS
    text = INIT.read_text(encoding="utf-8")
    INIT.write_text(_BLOCK.sub(lambda _: typed_imports(exports), text), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(INIT.parents[1]))
    main()
