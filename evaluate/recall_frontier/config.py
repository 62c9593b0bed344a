"""Settings of the frontier benchmark. Imports no torch, so that the command line can show them quickly."""

from dataclasses import dataclass, replace
from pathlib import Path

from dijiang.common.conditions import require, require_at_least

from ..quality.config import refuse_long
from ..quality.recall_kinds import RECALL_KINDS, refuse_unknown_kinds

CONTROLS = ("random", "perplexity", "uniform", "layers")  # ways of choosing heads to compare with


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontierConfig:
    """
    What is measured, and of which configurations. Memory is that of one sequence of `reference_length` tokens.

    Attributes:
        texts: UTF-8 files of held-out text; the first also gives the haystacks of recall.
        text_tokens: tokens of each text, at most (None: all).
        lengths: tokens of a window of perplexity.
        recall_kinds: kinds of recall, as for `dijiang evaluate`.
        recall_lengths: tokens of a recall sample.
        recall_samples: samples of each kind and length.
        reference_length: tokens of the sequence whose memory is compared.
        heads: numbers of key/value heads that keep every token, chosen by recall.
        slots: numbers of slots of exact memory of the other key/value heads, the mean over them; every number of heads is
            measured with each.
        large_heads: numbers of heads that get `large_slots` in place of every token, so that memory is constant.
        large_slots: of these heads.
        scores: scores of the exact memory, which are compared with as many slots in every head; the first one is that of
            `slots`.
        score_heads: numbers of heads that scores are compared with.
        score_slots: numbers of slots that scores are compared with.
        windows: measure windows with as many exact tokens as window and slots have together.
        without_linear: measure every configuration of heads and slots also without its linear branch.
        controls: other ways of choosing heads: `random`, `perplexity`, `uniform` (evenly spaced layers), `layers` (the best).
        control_heads: numbers of heads that these choose, at most.
        random_draws: number of random choices.
        attention_window: tokens of the window.
        attention_sinks: number of sinks.
        dtype: of keys and values, whose bytes are counted: `float32`, `bfloat16` or `float16`.
        seed: seed of samples, random choices and bootstrap.
    """

    texts: tuple[Path, ...]
    text_tokens: int | None = 32768
    lengths: tuple[int, ...] = (1024, 4096)
    recall_kinds: tuple[str, ...] = tuple(RECALL_KINDS)
    recall_lengths: tuple[int, ...] = (256, 1024, 4096)
    recall_samples: int = 48
    reference_length: int = 4096
    heads: tuple[int, ...] = (0, 2, 4, 7, 12, 18, 45)
    slots: tuple[int, ...] = (0, 64, 128, 256, 512)
    large_heads: tuple[int, ...] = (7,)
    large_slots: tuple[int, ...] = (4096,)
    scores: tuple[str, ...] = ("learned", "window_attention", "self_recall", "random", "key_norm", "key_diff")
    score_heads: tuple[int, ...] = (0, 7)
    score_slots: tuple[int, ...] = (128,)
    windows: bool = True
    without_linear: bool = True
    controls: tuple[str, ...] = CONTROLS
    control_heads: tuple[int, ...] = (7, 12)
    random_draws: int = 5
    attention_window: int = 64
    attention_sinks: int = 4
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("texts", "lengths", "recall_kinds", "recall_lengths", "heads", "slots", "scores"):
            values = getattr(self, name)
            require(values, f"{name} is empty; name at least one")
            require(len(set(values)) == len(values), f"{name} holds a value twice; give each once")
        refuse_unknown_kinds(self.recall_kinds)
        for name in self.controls:
            require(name in CONTROLS, f"controls holds {name!r}; choose from {', '.join(CONTROLS)}")
        require_at_least(1, self, "text_tokens", "recall_samples", "reference_length", "random_draws", "attention_window")
        for name, least in (("lengths", 2), ("recall_lengths", 1), ("heads", 0), ("slots", 0), ("control_heads", 1)):
            lowest = min(getattr(self, name), default=least)
            require(lowest >= least, f"{name} holds {lowest}, which must be at least {least}")

    def refuse_beyond(self, context: int) -> None:
        """Raise ValueError if a length exceeds the models' context."""
        refuse_long(self.lengths, context, "perplexity in windows")
        refuse_long(self.recall_lengths, context, "recall in samples")

    def quick(self) -> "FrontierConfig":
        """These settings cut down to a little of everything, to see that the benchmark works."""
        return replace(
            self,
            text_tokens=1100,
            lengths=(256,),
            recall_lengths=(256,),
            recall_samples=2,
            heads=(0, 7),
            slots=(0, 128),
            scores=self.scores[:2],
            score_heads=(0,),
            control_heads=(7,),
            random_draws=1,
        )
