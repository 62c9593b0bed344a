"""Calls of other libraries' functions that swallow keywords they do not know, so that a renamed argument goes unnoticed."""

import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version


def call_named(function: Callable, *args, **kwargs):
    """
    `function(*args, **kwargs)`, if its signature names every keyword.

    Raises:
        ValueError: if it does not, as in a version of its library that has renamed one.
    """
    parameters = inspect.signature(function).parameters
    if unknown := [name for name in kwargs if name not in parameters]:
        package = function.__module__.partition(".")[0]
        try:
            package = f"{package} {version(package)}"
        except PackageNotFoundError:
            pass
        raise ValueError(
            f"{function.__qualname__} of {package} does not take {', '.join(unknown)}, which dijiang gives it; install the "
            "version in dijiang's constraints.txt, or a newer dijiang"
        )
    return function(*args, **kwargs)
