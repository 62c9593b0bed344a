"""
The registry of the kinds of recall. Imports no torch, so that settings can be checked quickly.

To add a kind, write a function in recall_samples.py and name it in `RECALL_KINDS`.
"""

from collections.abc import Callable, Iterable
from importlib import import_module

from dijiang.common.errors import unknown

# name of the function in recall_samples.py by kind, in the order of the report's rows. Its arguments are the tokenizer, the
# tokens of a text, and as keywords length, samples and seed; it raises `DoesNotFit` where there can be no such samples
RECALL_KINDS = {
    "needle": "needle_samples",
    "associative recall": "associative_samples",
    "several keys": "several_keys_samples",
    "long code": "long_code_samples",
    "copied span": "copied_span_samples",
    "list by position": "list_samples",
}


class DoesNotFit(ValueError):
    """There are no samples of a kind at a length, or with a tokenizer."""


def refuse_unknown_kinds(kinds: Iterable[str]) -> None:
    """Raise ValueError on a kind that is not in the registry; it names the nearest one."""
    for kind in kinds:
        if kind not in RECALL_KINDS:
            raise unknown("recall kind", kind, RECALL_KINDS)


def generator_of(kind: str) -> Callable[..., list]:
    """The function that makes the samples of a kind."""
    return getattr(import_module(".recall_samples", __package__), RECALL_KINDS[kind])
