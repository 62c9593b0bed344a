"""Settings of an evaluation. Imports no torch, so that the command line can show them quickly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dijiang.common.conditions import require, require_at_least

from .recall_kinds import refuse_unknown_kinds

AT_LEAST_ONE = ("text_tokens", "stride", "recall_samples", "prompts", "prompt_length", "new_tokens", "limit", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """
    What an evaluation measures, and on how much.

    Attributes:
        texts: UTF-8 files of held-out text, each with perplexities of its own; the first also gives prompts, the haystack of
            needles and the row of the attention maps.
        text_tokens: tokens of each text, at most (None: all).
        lengths: tokens of a perplexity window (None: `usual_length`, or the models' context if that is shorter).
        stride: tokens between the starts of windows (None: the length, so that windows do not overlap).
        recall_lengths: tokens of a recall sample (None: those of `usual_recall_lengths` that fit the models' context).
        recall_kinds: kinds of recall: `needle`, `associative recall`, `several keys` (a needle among others), `long code` (a
            UUID among others), `copied span` (of random words), `list by position` (None: all that fit the lengths).
        recall_samples: samples of each kind and length of recall.
        prompts: prompts whose greedy continuations are compared with the teacher's.
        prompt_length: tokens of a prompt, fewer where the context is shorter.
        new_tokens: tokens of a continuation.
        tasks: lm-eval tasks: names, groups, `paper`, `paper-7b`, or YAML files.
        limit: documents of each lm-eval task, at most (None: all).
        num_fewshot: examples in the prompts of lm-eval tasks (None: the task's own).
        batch_size: requests that lm-eval runs at a time.
        map_tokens: tokens of the row that attention maps are measured on, at most; 0 leaves the maps out.
        dtype: `auto` (the faster of float32 and bfloat16), `float32`, `bfloat16` or `float16`.
        device: `auto` (the GPU if there is one), `cpu` or `cuda`.
        seed: seed of the recall samples and of the bootstrap.
        usual_length: tokens of a perplexity window where `lengths` is None.
        usual_recall_lengths: tokens of recall samples where `recall_lengths` is None.
    """

    texts: tuple[Path, ...]
    text_tokens: int | None = 32768
    lengths: tuple[int, ...] | None = None
    stride: int | None = None
    recall_lengths: tuple[int, ...] | None = None
    recall_kinds: tuple[str, ...] | None = None
    recall_samples: int = 24
    prompts: int = 16
    prompt_length: int = 128
    new_tokens: int = 32
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    map_tokens: int = 256
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    usual_length: int = 1024
    usual_recall_lengths: tuple[int, ...] = (128, 256, 512, 1024)

    def __post_init__(self) -> None:
        require(self.texts, "no text given; name at least one text file")
        require_at_least(1, self, *AT_LEAST_ONE)
        require_at_least(0, self, "num_fewshot", "map_tokens")
        for name in ("lengths", "recall_lengths"):
            shortest = min(getattr(self, name) or (1,))
            require(shortest >= 1, f"{name} holds {shortest}, which must be at least 1")
        refuse_unknown_kinds(self.recall_kinds or ())
        for name in ("texts", "lengths", "recall_lengths", "recall_kinds", "tasks"):
            words = [str(x) for x in getattr(self, name) or ()]
            if len(set(words)) < len(words):
                raise ValueError(f"{name} holds {max(words, key=words.count)} twice; give each once")

    def within(self, context: int) -> "EvaluationConfig":
        """
        These settings with those that were left open fitted to models of this context.

        Raises:
            ValueError: if a setting exceeds the context.
        """
        refuse_long(self.lengths or (), context, "perplexity in windows")
        refuse_long(self.recall_lengths or (), context, "recall in samples")
        if self.new_tokens >= context:
            raise ValueError(f"new_tokens={self.new_tokens} must be less than the models' context, {context}")
        usual = tuple(length for length in self.usual_recall_lengths if length <= context)
        return replace(
            self,
            lengths=(min(self.usual_length, context),) if self.lengths is None else self.lengths,
            recall_lengths=usual if self.recall_lengths is None else self.recall_lengths,
            prompt_length=min(self.prompt_length, context - self.new_tokens),
            map_tokens=min(self.map_tokens, context),
        )

    def quick(self) -> "EvaluationConfig":
        """These settings cut down to a little of everything, to see that an evaluation works."""
        shortest = min(self.lengths[0] if self.lengths else 256, 1024)
        return replace(
            self,
            text_tokens=1100,
            lengths=first_of(self.lengths),
            stride=self.stride and min(self.stride, shortest),
            recall_lengths=first_of(self.recall_lengths),
            recall_samples=4,
            prompts=2,
            prompt_length=32,
            new_tokens=8,
            limit=min(self.limit or 8, 8),
            map_tokens=48,
            usual_length=256,
            usual_recall_lengths=self.usual_recall_lengths[:1],
        )


def first_of(lengths: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The first length, cut to 1,024 tokens; None for None."""
    return lengths and (min(lengths[0], 1024),)


def refuse_long(lengths: Sequence[int], context: int, what: str) -> None:
    """Raise ValueError if a length exceeds the models' context."""
    for length in lengths:
        if length > context:
            raise ValueError(
                f"{what} of {length:,} tokens exceeds the {context:,} that these models were made for "
                "(max_position_embeddings); choose a shorter one"
            )
