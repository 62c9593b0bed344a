"""Settings of the latency benchmark."""

from dataclasses import dataclass

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig:
    """
    Settings of the latency benchmark: what it measures, and on which models.

    Attributes:
        contexts: tokens of context.
        batches: sequences at a time.
        phases: of `prefill`, reading a prompt, and `decode`, a step of one token.
        rounds: timings of each contender in a row of the result, at least.
        seconds: more rounds follow until a row has taken this long.
        shape: name of a known shape to measure with random weights, such as pythia-410m; None for a checkpoint.
        preset: of a shape's linear layers, as for `convert_model`.
        settings: of a shape's linear layers, on top of the preset.
        dtype: `auto` is the faster of float32 and bfloat16.
        device: `auto` is the GPU if there is one.

    Raises:
        ValueError: on contexts, batches, phases or rounds that cannot be measured.
    """

    contexts: tuple[int, ...] = (1024, 2048, 4096)
    batches: tuple[int, ...] = (1,)
    phases: tuple[str, ...] = PHASES
    rounds: int = 7
    seconds: float = 2.0
    shape: str | None = None
    preset: str = "recommended"
    settings: dict | None = None
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, values in (("contexts", self.contexts), ("batches", self.batches)):
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"{name} {', '.join(map(str, values)) or '(none)'} must be numbers of at least 1, each once")
        phases = self.phases
        if not phases or set(phases) - set(PHASES) or len(set(phases)) < len(phases):
            raise ValueError(f"phases {', '.join(phases) or '(none)'} are unknown; choose from {', '.join(PHASES)}, each once")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")

    @property
    def longest(self) -> int:
        """The longest context."""
        return max(self.contexts)
