"""Chooses which key/value heads keep every token: those that find again what was read."""

from .gates import head_gates
from .job import SelectionJob
from .methods import METHODS, select_heads
from .selection import Selection, full_heads_of, heads_within

__all__ = ["METHODS", "Selection", "SelectionJob", "full_heads_of", "head_gates", "heads_within", "select_heads"]
