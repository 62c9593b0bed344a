"""Settings of a pruning run. Importing them loads neither torch nor scipy."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from dijiang.common.conditions import require, require_at_least, require_between, require_each
from dijiang.common.errors import unknown
from dijiang.common.settings import accepts_former_names, refuse_idle

from .scores import SCORES
from .sensitivity.methods import SENSITIVITIES

BUDGETS = ("weighted", "shift", "paper")
COMPARISONS = ("block", "matrix")
NORMALIZATIONS = ("total", "mean")
CHOICES = {
    "method": ("mixed-sparsity",),
    "score": SCORES,
    "granularity": ("weight", "layer", "uniform"),
    "allocation": ("rank", "loss"),
    "budget": BUDGETS,
    "sensitivity": SENSITIVITIES,
    "normalization": NORMALIZATIONS,
    "row_weights": ("alike", "fisher", "shuffled"),
    "comparison": COMPARISONS,
}
BLOCK = 128
DAMPING = 0.01
SPARSITY = 0.5
POINTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # sparsities at which allocation by loss measures costs


@accepts_former_names
@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """
    Settings of a pruning run.

    Attributes:
        calibration: UTF-8 text files, like what the model will read. Default of the command line: a bundled text.
        method: `mixed-sparsity`; SparseGPT, Wanda and magnitude are settings of it.
        sparsity: share of the decoder layers' linear weights to remove, in (0, 1). None: 0.5, or the pattern's.
        score: which weights of a matrix go: `isc`, `obs` (SparseGPT's), `obd`, `isc-b`, `isc-c`, `wanda` or `magnitude`.
        granularity: what gets its own sparsity: each matrix (`weight`), each decoder `layer`, nothing (`uniform`). None:
            `weight`, or `uniform` with a pattern.
        allocation: `rank`, the paper's rule; `loss`, the sparsities with the least estimated loss.
        alpha: how far a sparsity may be above (for `rank` also below) `sparsity`. None: 0.1; for `loss` 0.2, up to 0.95.
        budget: how ranks become sparsities: `weighted`, `shift` (the sparsity holds over all weights), `paper` (it may not).
        sensitivity: what ranks: `fisher`, `hutchinson`, `finite-difference`, `owl`, `local`; baselines: `random`, `reversed`.
        sensitivity_samples: calibration sequences, or probes, behind ranks, costs and row weights.
        probes_by_layer: probe one decoder layer at a time (`hutchinson`, `finite-difference`): less memory and noise, slower.
        normalization: sensitivity of a matrix: `total`, or `mean` per weight.
        owl_m: multiple of the layer's mean score from which `owl` counts a weight as an outlier.
        pattern: "N:M" removes N of every M weights of each row. None: no pattern.
        row_weights: `alike`; `fisher`, rows whose outputs the loss depends on keep more weights; baseline: `shuffled`.
        comparison: scores compete within a `block` of columns, as SparseGPT's, or within the whole `matrix`.
        bits: round the remaining weights to this many bits, 2 to 8, on a grid per row. None: no rounding.
        block_size: columns of a block in the OBS update.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        true_sequential: gather inputs again after each group of a layer's matrices is pruned; slower.
        samples: calibration sequences.
        length: tokens of a sequence. None: 2048, or the model's context if that is shorter.
        held_out: text whose perplexity is measured before and after; the command line has a bundled one. None: not measured.
        held_out_tokens: tokens of the held-out text, at most.
        seed: seed of calibration sequences, probes and baselines.
        device: `auto` (the GPU if there is one), `cpu` or `cuda`.
        bitmask: also write the weights in the compressed container.
        zeros_of: (N, M) of the pattern; computed.

    Raises:
        ValueError: on settings that make no sense, or not together.
    """

    RENAMED: ClassVar[dict[str, str]] = {"normalisation": "normalization"}

    calibration: tuple[Path, ...] = ()
    method: str = "mixed-sparsity"
    sparsity: float | None = None
    score: str = "isc"
    granularity: str | None = None
    allocation: str = "rank"
    alpha: float | None = None
    budget: str = "weighted"
    sensitivity: str = "fisher"
    sensitivity_samples: int = 32
    probes_by_layer: bool = False
    normalization: str = "total"
    owl_m: float = 5.0
    pattern: str | None = None
    row_weights: str = "alike"
    comparison: str = "block"
    bits: int | None = None
    block_size: int = BLOCK
    damping: float = DAMPING
    true_sequential: bool = False
    samples: int = 128
    length: int | None = None
    held_out: Path | None = None
    held_out_tokens: int = 16384
    seed: int = 0
    device: str = "auto"
    bitmask: bool = False
    zeros_of: tuple[int, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        texts = [self.calibration] if isinstance(self.calibration, str | Path) else self.calibration
        self.fill_in(calibration=tuple(map(Path, texts)), held_out=self.held_out and Path(self.held_out))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "granularity" and value is None):
                raise unknown(name, value, choices)
        require_at_least(1, self, "sensitivity_samples", "block_size", "samples", "held_out_tokens")
        require_at_least(2, self, "length")
        require_each(self, ("damping", "owl_m"), lambda value: 0 < value < math.inf, "be greater than 0")
        require_between(2, 8, self, "bits")
        self.apply_pattern()
        require(0 < self.sparsity < 1, f"sparsity={self.sparsity} must lie between 0 and 1, both left out")
        refuse_idle((x.name for x in fields(self) if getattr(self, x.name) != x.default), self.idle())
        self.choose_alpha()
        require(self.calibration or not self.needs_text, "no calibration text given; name at least one text file")

    def fill_in(self, **values: Any) -> None:
        """Set fields of this frozen object while it is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def apply_pattern(self) -> None:
        """Fill in sparsity and granularity, which a pattern decides."""
        if self.pattern is None:
            sparsity = SPARSITY if self.sparsity is None else self.sparsity
            self.fill_in(sparsity=sparsity, granularity=self.granularity or "weight")
            return
        zeros, group = parse_pattern(self.pattern)
        if self.sparsity not in (None, zeros / group):
            raise ValueError(
                f"pattern {self.pattern} removes {zeros / group:g} of the weights, sparsity={self.sparsity:g} was asked for "
                "too; leave one of them out"
            )
        if self.granularity not in (None, "uniform"):
            raise ValueError(
                f"pattern {self.pattern} is the same for all matrices, so granularity {self.granularity} has no effect; leave "
                "one of them out"
            )
        self.fill_in(sparsity=zeros / group, granularity="uniform", zeros_of=(zeros, group))

    def choose_alpha(self) -> None:
        """Fill in alpha, and refuse sparsities beyond what the allocation can give."""
        if self.allocation == "rank":
            self.fill_in(alpha=0.1 if self.alpha is None else self.alpha)
            if self.ranked:
                refuse_range(self.sparsity, self.alpha)
            return
        highest = POINTS[-1]
        if self.sparsity > highest:
            raise ValueError(f"sparsity={self.sparsity:g} was asked for, but allocation by loss goes up to {highest:g}")
        self.fill_in(alpha=min(0.2, highest - self.sparsity) if self.alpha is None else self.alpha)
        if not 0 <= self.alpha <= highest - self.sparsity:
            raise ValueError(
                f"sparsity={self.sparsity:g} and alpha={self.alpha:g} allow a matrix {self.sparsity + self.alpha:g}, but "
                f"allocation by loss goes up to {highest:g}"
            )

    def idle(self) -> dict[str, str]:
        """Settings that have no effect, each with the setting that is the reason."""
        pattern, score = self.pattern and f"pattern {self.pattern}", f"score {self.score}"
        without_update = pattern or (None if SCORES[self.score].column_weights else score)
        unranked = None if self.ranked else pattern or "granularity uniform"
        by_loss = "allocation loss" if self.allocation == "loss" else None
        probed = SENSITIVITIES[self.sensitivity].probes
        reasons = {
            "row_weights": without_update,
            "comparison": without_update,
            "allocation": unranked,
            "budget": unranked or by_loss,
            "sensitivity": unranked or by_loss,
            "probes_by_layer": unranked or (None if probed else f"sensitivity {self.sensitivity}"),
            "true_sequential": None if self.calibrated else score,
        }
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def calibrated(self) -> bool:
        """Whether the score needs the layers' inputs."""
        return SCORES[self.score].calibrated

    @property
    def ranked(self) -> bool:
        """Whether matrices or layers get sparsities of their own."""
        return self.granularity != "uniform"

    @property
    def ranked_by_gradients(self) -> bool:
        """Whether ranks need gradients of the loss."""
        return self.ranked and SENSITIVITIES[self.sensitivity].gradients

    @property
    def by_row(self) -> bool:
        """Whether gradients of single outputs are needed."""
        return self.row_weights != "alike" or (self.ranked and self.allocation == "loss")

    @property
    def needs_text(self) -> bool:
        """Whether calibration sequences are needed."""
        return self.calibrated or (self.ranked and SENSITIVITIES[self.sensitivity].text)


def parse_pattern(text: str) -> tuple[int, int]:
    """
    (N, M) of "N:M", N zeros in every M weights of a row.

    Raises:
        ValueError: unless 0 < N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern {text!r} is not N:M with 0 < N < M, N zeros in every M weights; write for example 2:4")
    return int(match[1]), int(match[2])


def refuse_range(sparsity: float, alpha: float) -> None:
    """Raise ValueError unless every sparsity from `sparsity` - `alpha` to `sparsity` + `alpha` is from 0 to below 1."""
    if not (alpha >= 0 and sparsity - alpha >= 0 and sparsity + alpha < 1):
        widest = min(sparsity, 1 - sparsity)
        advice = f"set alpha below {widest:g}" if 0 < widest <= alpha else "set both from 0 to below 1"
        raise ValueError(
            f"sparsity={sparsity:g} and alpha={alpha:g} ask for sparsities from {sparsity - alpha:g} to {sparsity + alpha:g}, "
            f"which must lie from 0 to below 1; {advice}"
        )
