"""A task: one row of an evaluation, measured on every variant; and what tasks are built from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from dijiang.common.result_cache import hash_of

from .config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    One row of an evaluation.

    Attributes:
        kind: its entry in the registry, such as "perplexity".
        name: tells it from others of its kind.
        metric: name of its value.
        better: whether "lower" or "higher" values are better.
        floor: value that costs nothing: the chance level, or the key of the variant whose score it is.
        settings: all that scores depend on besides the model, as JSON.
        cost: units of work per variant, roughly the tokens read.
        run: (model, reference, advance) -> scores: `totals` and `weights` by unit, `detail`. It calls `advance` with the
            number of tokens done since the last call.
        value_of: the metric of a mean over units; the mean itself by default.
        asks_teacher: whether `run` gets the teacher's scores as `reference`, rather than None; the teacher itself gets None.
    """

    kind: str
    name: str
    metric: str
    better: Literal["lower", "higher"] = "higher"
    floor: float | str
    settings: dict
    cost: int
    run: Callable[..., dict] = field(repr=False)
    value_of: Callable[[np.ndarray], np.ndarray] = field(default=np.asarray, repr=False)
    asks_teacher: bool = False

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskInputs:
    """
    What tasks are built from, before any model is in memory.

    Attributes:
        config: settings, fitted to the context.
        tokenizer: the tokenizer of all models.
        texts: token ids (T,) of each text, by file name.
        context: tokens that every model was made for.
        left_out: tasks that these models do not allow, with the reasons; builders fill it.
    """

    config: EvaluationConfig
    tokenizer: object
    texts: dict[str, torch.Tensor]
    context: int
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def first_text(self) -> tuple[str, torch.Tensor]:
        """Name and token ids of the text that prompts and haystacks are taken from."""
        return next(iter(self.texts.items()))


def hash_tokens(*tokens: torch.Tensor) -> str:
    """Hash of token ids, for the settings of a task."""
    return hash_of(*(part.numpy().tobytes() for part in tokens))
