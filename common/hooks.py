"""Hooks on modules that are removed again, whatever happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """
    Keep hooks for the length of a `with` block.

    Args:
        handles: what `register_forward_hook` and its relatives return. A generator is consumed inside the block, so that
            hooks registered before an error are removed too.
    """
    registered: list[RemovableHandle] = []
    try:
        for handle in handles:
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()
