"""What an evaluation measures, and on how much."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """
    Settings of an evaluation.

    Attributes:
        texts: UTF-8 files of held-out text, each of which gives its own perplexities; the first also gives prompts, the
            haystack of needles, and what attention maps are drawn of.
        text_tokens: of each text, at most (None: all).
        lengths: of the windows that perplexity is measured in (None: `usual_length`, or the models' context if that is
            shorter); stride: tokens between their starts (None: their length).
        recall_lengths: tokens in which something is to be found again (None: the `usual_recall_lengths` that the models were
            made for); recall_samples: of each kind and length.
        prompts, prompt_length, new_tokens: greedy continuations that are compared with the teacher's; prompts are shorter
            where the context is.
        tasks: of lm-eval: names, groups, `paper`, `paper-7b`, or YAML files; limit: documents of each task (None: all);
            num_fewshot: None means the task's own; batch_size: of lm-eval.
        map_tokens: length of the row that attention maps are measured on, at most; 0 leaves them out, and so does a teacher
            with other layers or heads.
        dtype: `auto` is the faster of float32 and bfloat16; device: `auto` is the GPU where there is one.
        seed: of recall's samples and of the bootstrap.
    """

    texts: tuple[Path, ...]
    text_tokens: int | None = 32768
    lengths: tuple[int, ...] | None = None
    stride: int | None = None
    recall_lengths: tuple[int, ...] | None = None
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
        if not self.texts:
            raise ValueError("no text given; name at least one text file")
        positive = ("text_tokens", "stride", "recall_samples", "prompts", "prompt_length", "new_tokens", "limit", "batch_size")
        sizes = [(name, getattr(self, name)) for name in positive]
        sizes += [(name, length) for name in ("lengths", "recall_lengths") for length in getattr(self, name) or ()]
        for name, size in sizes:
            if size is not None and size < 1:
                raise ValueError(f"{name} holds {size}, which must be at least 1")
        if self.map_tokens < 0:
            raise ValueError(f"map_tokens={self.map_tokens} must be at least 0")
        for name in ("texts", "lengths", "recall_lengths", "tasks"):
            given = [str(x) for x in getattr(self, name) or ()]
            if len(set(given)) < len(given):
                raise ValueError(f"{name} holds {max(given, key=given.count)} twice; give each once")

    def within(self, context: int) -> "EvaluationConfig":
        """
        The same, fitted to models of this context wherever nothing else was asked for.

        Raises:
            ValueError: where what was asked for exceeds it.
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
        """The same on a little of everything, to see that it works."""
        small = {
            "text_tokens": 1100,
            "recall_samples": 4,
            "prompts": 2,
            "prompt_length": 32,
            "new_tokens": 8,
            "map_tokens": 48,
            "usual_length": 256,
            "usual_recall_lengths": self.usual_recall_lengths[:1],
        }
        lengths, recall = (given and tuple(min(x, 1024) for x in given[:1]) for given in (self.lengths, self.recall_lengths))
        shortest = min(self.lengths[0] if self.lengths else 256, 1024)
        stride = self.stride and min(self.stride, shortest)
        return replace(self, **small, lengths=lengths, recall_lengths=recall, stride=stride, limit=min(self.limit or 8, 8))


def refuse_long(lengths: Sequence[int], context: int, what: str) -> None:
    """Raise ValueError where a length exceeds what the models were made for."""
    for length in lengths:
        if length > context:
            raise ValueError(
                f"{what} of {length:,} tokens exceeds the {context:,} that these models were made for "
                "(max_position_embeddings); choose a shorter one"
            )
