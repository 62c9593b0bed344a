"""The result of choosing which key/value heads keep every token, and how many of them fit into a budget."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from dijiang.modeling import DiJiangConfig

Head = tuple[int, int]  # layer, key/value head


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """
    What a method finds.

    Attributes:
        order: (layer, head), the one to keep first at the beginning.
        scores: by (layer, head); what they measure is the method's own affair.
        steps: facts of each step, such as the loss before it and the recall after it.
    """

    order: list[Head]
    scores: dict[Head, float]
    steps: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """
    All key/value heads of a model's linear layers in the order in which to keep them.

    Attributes:
        method: name in `METHODS`.
        order: (layer, head), the one to keep first at the beginning; every head exactly once.
        scores: by layer and head; None for heads of softmax layers.
        steps: facts of each step, such as the loss before it and the recall after it.
        seconds: that it took.
        settings: that it was made with.
    """

    method: str
    order: list[Head]
    scores: list[list[float | None]]
    steps: list[dict[str, Any]]
    seconds: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A dict of what JSON can hold; scores that are no finite number become None."""
        scores = [[x if x is not None and math.isfinite(x) else None for x in row] for row in self.scores]
        return asdict(self) | {"order": [list(head) for head in self.order], "scores": scores}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The selection that `to_json` wrote."""
        return cls(**content | {"order": [(layer, head) for layer, head in content["order"]]})


def full_heads_of(selection: Selection, k: int) -> list[list[int]]:
    """
    The first `k` heads of a selection as the config's `full_heads`: for each layer its heads, in rising order.

    Raises:
        ValueError: if k is negative or there are fewer heads.
    """
    if not 0 <= k <= len(selection.order):
        raise ValueError(
            f"{k} heads cannot be kept of {len(selection.order)}; choose a number from 0 to {len(selection.order)}"
        )
    return heads_by_layer(selection.order[:k], len(selection.scores))


def heads_by_layer(heads: Sequence[Head], layers: int) -> list[list[int]]:
    """(layer, head) pairs as a list of heads for each layer, in rising order."""
    return [sorted(head for at, head in heads if at == layer) for layer in range(layers)]


def heads_within(bytes_per_token: float, config: DiJiangConfig, element_size: int) -> int:
    """
    The number of key/value heads whose growing cache takes at most `bytes_per_token`, at `element_size` bytes a number.

    Raises:
        ValueError: on a negative budget.
    """
    if bytes_per_token < 0:
        raise ValueError(f"bytes_per_token={bytes_per_token} is negative; give 0 or more")
    linear = config.layer_types.count("linear_attention")
    return min(int(bytes_per_token // (2 * config.head_dim * element_size)), linear * config.num_key_value_heads)
