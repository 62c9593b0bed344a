"""Packages whose public names are imported when they are first used, so that importing the package itself is quick."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str], *, submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    The functions `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        modules: the module of each public name, relative to the package (`.run`) or absolute.
        submodules: modules of the package that are imported when they are first used.
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name in modules:
            value = getattr(import_module(modules[name], package), name)
        elif name in submodules:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *modules})

    return get, names
