"""Conditions on the fields of settings, for `__post_init__`. Fields that are None always pass, NaN never does."""

from collections.abc import Callable, Iterable
from typing import Any


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_positive(settings: object, *names: str) -> None:
    require_each(settings, names, lambda value: value > 0, "be greater than 0")


def require_not_negative(settings: object, *names: str) -> None:
    require_each(settings, names, lambda value: value >= 0, "not be negative")


def require_at_least(least: float, settings: object, *names: str) -> None:
    require_each(settings, names, lambda value: value >= least, f"be at least {least}")


def require_between(low: float, high: float, settings: object, *names: str) -> None:
    """Raise ValueError unless these fields lie between `low` and `high`, both included."""
    require_each(settings, names, lambda value: low <= value <= high, f"lie between {low} and {high}")


def require_each(settings: object, names: Iterable[str], holds: Callable[[Any], bool], must: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(value is None or holds(value), f"{name}={value} must {must}")
