"""Calls of library functions that silently accept unknown keywords, where a renamed argument would go unnoticed."""

import contextlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

T = TypeVar("T")


def call_named(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """
    `function(*args, **kwargs)`, if its signature names every keyword.

    Raises:
        ValueError: if it does not, as in a version of its library that has renamed one.
    """
    parameters = inspect.signature(function).parameters
    if unknown := [name for name in kwargs if name not in parameters]:
        package = function.__module__.partition(".")[0]
        with contextlib.suppress(PackageNotFoundError):
            package = f"{package} {version(package)}"
        raise ValueError(
            f"{function.__qualname__} of {package} does not take {', '.join(unknown)}, which dijiang gives it; install the "
            "version in dijiang's constraints.txt, or a newer dijiang"
        )
    return function(*args, **kwargs)
