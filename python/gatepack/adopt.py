"""Stage 3, modules: another class for a module that is there, also one that is made at run time."""

from collections.abc import Callable

from torch import nn

from gatepack.sites import Site


def adopt(module: nn.Module, cls: type, site: Site | None = None) -> nn.Module:
    """A module of class cls with module's own parameters, buffers, children, hooks and
    attributes."""
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        adopted.__dict__[registry] = dict(module.__dict__[registry])
    if site is not None:
        adopted.site = site
    return adopted


def derived(
    prefix: str, dense: type, members: dict[str, object], again: Callable[[type], type]
) -> type:
    """A subclass of a linear's class, made at run time, whose instances pickle and copy.

    again(dense), a function at the top of a module, gives the class where one is loaded.
    """

    def __reduce_ex__(self, protocol):
        return _instance, (again, dense), *dense.__reduce_ex__(self, protocol)[2:]

    return type(f"{prefix}{dense.__name__}", (dense,), {**members, "__reduce_ex__": __reduce_ex__})


def _instance(again: Callable[[type], type], dense: type) -> nn.Module:
    cls = again(dense)
    return cls.__new__(cls)
