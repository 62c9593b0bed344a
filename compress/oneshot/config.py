"""What a pruning run is asked to do."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from .allocate import BUDGETS, refuse_range
from .hessian import DAMPING
from .loss_allocation import POINTS
from .masks import parse_pattern
from .obs import BLOCK, COMPARISONS
from .scores import SCORES, SWEPT
from .sensitivity.hessian_trace import NORMALISATIONS

METHODS = ("mixed-sparsity",)
ALLOCATIONS = ("rank", "loss")
GRANULARITIES = ("weight", "layer", "uniform")
ROW_WEIGHTS = ("alike", "fisher", "shuffled")
SENSITIVITIES = ("fisher", "hutchinson", "finite-difference", "owl", "local", "random", "reversed")
SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """
    Settings of a pruning run.

    Attributes:
        method: `mixed-sparsity`.
        sparsity: share of the decoder layers' linear weights to remove, in (0, 1) (None: 0.5, or the pattern's).
        score: which weights of a matrix go, see `column_weights`: `isc`, `obs` (SparseGPT's), `obd`, `isc-b`, `isc-c`,
            `wanda`, `magnitude`.
        granularity: what gets a sparsity of its own: `weight` (each matrix), `layer` (each decoder layer), `uniform`
            (nothing). None: `weight`, or `uniform` with a pattern.
        allocation: `rank`, the paper's rule, or `loss`, sparsities that are reckoned to cost least, see `allocate_by_loss`.
        alpha: half the range of sparsities; for `loss` how far they may exceed `sparsity` (None: 0.1, for `loss` 0.2).
        budget: how ranks become sparsities, see `allocate`.
        sensitivity: what ranks: `fisher`, `hutchinson`, `finite-difference` (of the same trace), `owl`, `local`; controls:
            `random`, and `reversed`, fisher's ranks backwards.
        sensitivity_samples: calibration sequences (or probes) for it, at most as many as there are.
        probes_by_layer: take one decoder layer at a time in `hutchinson` and `finite-difference`: less memory and no noise
            from other layers, as many times slower.
        normalisation: `total`: a matrix's whole trace; `mean`: per weight.
        owl_m: how many times the layer's mean counts as an outlier, for `owl`.
        pattern: "N:M", N zeros in every M weights of a row, for all matrices alike (None: unstructured).
        row_weights: `alike`, or `fisher`: scores are multiplied by the root mean square gradient of the loss in their row's
            output, so that outputs the loss depends on keep more weights; control: `shuffled`, the same in other rows.
        comparison: whether scores compete within a `block` of columns, or within the whole `matrix`, see `sweep`.
        bits: round what stays to so many, 2 to 8, on a grid per row (None: keep it).
        block_size: columns among which weights are chosen together; damping: share of the Hessian's mean diagonal added to it.
        true_sequential: gather inputs anew for each group of matrices in a layer, those before already pruned.
        calibration: UTF-8 text files; samples: sequences; length: tokens of each (None: 2048, or the model's context).
        held_out: text whose perplexity is measured before and after (None: not measured); held_out_tokens: of it, at most.
        seed: of the calibration sequences, probes and random ranks.
        device: `auto` is the GPU where there is one.
        bitmask: also write the weights in the compressed container.

    Raises:
        ValueError: on settings that make no sense, or not together.
    """

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
    normalisation: str = "total"
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
        object.__setattr__(self, "calibration", tuple(map(Path, texts)))
        if self.held_out is not None:
            object.__setattr__(self, "held_out", Path(self.held_out))
        for name, known in (
            ("method", METHODS),
            ("score", SCORES),
            ("granularity", (*GRANULARITIES, None)),
            ("allocation", ALLOCATIONS),
            ("budget", BUDGETS),
            ("sensitivity", SENSITIVITIES),
            ("normalisation", NORMALISATIONS),
            ("row_weights", ROW_WEIGHTS),
            ("comparison", COMPARISONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(filter(None, known))}")
        for name in ("sensitivity_samples", "block_size", "samples", "held_out_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.length is not None and self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping={self.damping} must be greater than 0")
        if not (math.isfinite(self.owl_m) and self.owl_m > 0):
            raise ValueError(f"owl_m={self.owl_m} must be greater than 0")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be from 2 to 8")
        self.settle_pattern()
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must lie between 0 and 1, both left out")
        self.settle_allocation()
        self.refuse_idle()
        if self.needs_text and not self.calibration:
            raise ValueError("no calibration text given; name at least one text file")

    def settle_pattern(self) -> None:
        """Fill in what the pattern decides."""
        if self.pattern is None:
            settled = {"sparsity": self.sparsity, "granularity": self.granularity or "weight"}
            settled["sparsity"] = SPARSITY if self.sparsity is None else self.sparsity
        else:
            zeros, group = parse_pattern(self.pattern)
            if self.sparsity not in (None, zeros / group):
                raise ValueError(
                    f"pattern {self.pattern} removes {zeros / group:g} of the weights, sparsity={self.sparsity:g} was asked "
                    "for too; leave one of them out"
                )
            if self.granularity not in (None, "uniform"):
                raise ValueError(
                    f"pattern {self.pattern} is the same for all matrices, so granularity {self.granularity} has no effect; "
                    "leave one of them out"
                )
            settled = {"sparsity": zeros / group, "granularity": "uniform", "zeros_of": (zeros, group)}
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def settle_allocation(self) -> None:
        """Fill in alpha, and refuse what does not go together."""
        if self.ranked and self.allocation == "loss" and self.sparsity > POINTS[-1]:
            raise ValueError(f"sparsity={self.sparsity:g} was asked for, but allocation by loss goes up to {POINTS[-1]:g}")
        if self.alpha is None:
            alpha = 0.1 if self.allocation == "rank" else min(0.2, POINTS[-1] - self.sparsity)
            object.__setattr__(self, "alpha", alpha)
        if not self.ranked:
            return
        if self.allocation == "rank":
            refuse_range(self.sparsity, self.alpha)
        elif not (0 <= self.alpha <= POINTS[-1] - self.sparsity):
            raise ValueError(
                f"sparsity={self.sparsity:g} and alpha={self.alpha:g} allow a matrix {self.sparsity + self.alpha:g}, but "
                f"allocation by loss goes up to {POINTS[-1]:g}"
            )

    def refuse_idle(self) -> None:
        """Refuse what was set and has no effect because of another setting."""
        pattern, score = self.pattern and f"pattern {self.pattern}", f"score {self.score}"
        unswept = pattern or (None if self.score in SWEPT else score)
        unranked = None if self.ranked else pattern or "granularity uniform"
        by_loss = "allocation loss" if self.allocation == "loss" else None
        probed = self.sensitivity in ("hutchinson", "finite-difference")
        reasons = {
            "row_weights": unswept,
            "comparison": unswept,
            "allocation": unranked,
            "budget": unranked or by_loss,
            "sensitivity": unranked or by_loss,
            "probes_by_layer": unranked or (None if probed else f"sensitivity {self.sensitivity}"),
            "true_sequential": None if self.calibrated else score,
        }
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, other in reasons.items():
            value = getattr(self, name)
            if other and value != defaults[name]:
                what = name if value is True else f"{name} {value}"
                raise ValueError(f"{what} has no effect with {other}; leave one of them out")

    @property
    def ranked_by_gradients(self) -> bool:
        return self.ranked and self.sensitivity in ("fisher", "reversed")

    @property
    def by_row(self) -> bool:
        """Whether gradients of single outputs are needed."""
        return self.row_weights != "alike" or (self.ranked and self.allocation == "loss")

    @property
    def calibrated(self) -> bool:
        """Whether the score needs the layers' inputs."""
        return self.score != "magnitude"

    @property
    def ranked(self) -> bool:
        """Whether units get sparsities of their own."""
        return self.granularity != "uniform"

    @property
    def needs_text(self) -> bool:
        return self.calibrated or (self.ranked and self.sensitivity != "random")
