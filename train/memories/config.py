"""Settings of head selection and of the memory's fit. Imports no torch, so that the command line can show them quickly."""

from dataclasses import dataclass
from typing import Literal

from dijiang.common.conditions import require, require_at_least, require_between, require_positive

Method = Literal[
    "greedy",
    "gates",
    "teacher_gradient",
    "content_free",
    "induction",
    "random",
    "perplexity",
    "uniform",
    "layers",
]


MOST_SLOTS = 512  # of a head that slots are spread over: as far as its error is measured


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """
    Which key/value heads keep every token.

    Attributes:
        heads: number of heads to keep.
        bytes_per_token: as many heads as fit into this growth of the cache per token, instead of `heads`.
        method: how heads are ranked: `greedy` (one after another, by how much recall asks for it), `gates` (gates trained on
            all heads together), `teacher_gradient`, `content_free` or `induction` (scores of the teacher's attention), and for
            comparison `random`, `perplexity`, `uniform` and `layers`.
        samples: made-up samples of recall to rank heads by.
        lengths: tokens of a sample, in turn.
        per_step: samples that `greedy` and `layers` look at before they choose the next head: the next ones, in turn.
        held_aside: further samples, on which recall is measured after each choice; 0: it is not measured.
        seed: of the samples, and of `random`.
    """

    heads: int = 7
    bytes_per_token: int | None = None
    method: Method = "greedy"
    samples: int = 28
    lengths: tuple[int, ...] = (256, 512, 768)
    per_step: int = 8
    held_aside: int = 7
    seed: int = 0

    @property
    def reads_samples(self) -> bool:
        """Whether the method ranks heads by samples of recall."""
        return self.method in ("greedy", "gates", "teacher_gradient", "layers")

    def __post_init__(self) -> None:
        require_at_least(1, self, "heads", "samples", "per_step")
        require_at_least(0, self, "bytes_per_token", "held_aside")
        require(bool(self.lengths) and min(self.lengths) >= 64, f"lengths={self.lengths} must be 64 tokens or more each")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """
    The exact memory of the heads that do not keep every token.

    Attributes:
        slots: tokens that a head holds, the mean over heads.
        spread: give more slots to the heads that gain by them, at the same total; false: `slots` for every head.
        least_slots: that every head gets.
        large_slots: turns heads that keep every token into heads with this many slots, so that memory is constant; null: they
            stay as they are.
        text_tokens: tokens of text to fit on.
        block_size: tokens of a sequence of text; the first one is twice as long.
        recall_samples: made-up samples of recall to fit on besides.
        recall_length: tokens of such a sample.
        recall_share: of what is learned from that comes from recall samples.
        linear_branch: give the linear branch the weight at which it helps each head most on the longest sequence of the fit;
            beyond that length it does harm, up to making the model useless. False: it stays as it is, which after conversion
            means silent.
        steps: of the fit.
        seed: of samples and fit.
    """

    slots: int = 128
    spread: bool = True
    least_slots: int = 32
    large_slots: int | None = None
    text_tokens: int = 10_240
    block_size: int = 2048
    recall_samples: int = 7
    recall_length: int = 1024
    recall_share: float = 0.5
    linear_branch: bool = False
    steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "slots", "text_tokens", "block_size", "recall_length")
        require_at_least(1, self, "large_slots", "least_slots")
        require_at_least(20, self, "steps")
        require_at_least(0, self, "recall_samples")
        require_between(0, 1, self, "recall_share")
        require(
            not self.spread or self.slots <= MOST_SLOTS,
            f"slots={self.slots}: slots are spread up to {MOST_SLOTS} a head; give fewer, or set spread=false",
        )
        require(
            not self.spread or self.least_slots <= self.slots,
            f"least_slots={self.least_slots} is more than slots={self.slots}, the mean; lower one of them",
        )
