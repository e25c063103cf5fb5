"""Stage 6, save: packages that only some commands need."""

import importlib.util


def require(purpose: str, *packages: str) -> None:
    """ImportError with the pip line if a package is missing, before the work and not after it."""
    names = {package: package.replace("-", "_") for package in packages}
    missing = [package for package, name in names.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{purpose} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
