"""Settings of the feature map study."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMapStudyConfig:
    """
    Settings of the feature map study.

    Attributes:
        features: numbers of features m, in rising order.
        most_weighted: largest m for which weights are fitted.
        seeds: number of random states of each map.
        pairs: number of Gaussian queries, and of keys.
        tokens: length of the text that real queries and keys are measured on, and of the text before it for calibration.
        query_every: use every n-th real query.
        heads: number of real heads, each of another layer.

    Raises:
        ValueError: if there are too few features or seeds for a slope with a band.
    """

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    most_weighted: int = 512
    seeds: int = 8
    pairs: int = 256
    tokens: int = 512
    query_every: int = 4
    heads: int = 6

    def __post_init__(self) -> None:
        if wrong := [m for m in self.features if m < 1]:
            raise ValueError(f"features={wrong[0]} must be at least 1")
        if list(self.features) != sorted(set(self.features)) or len(self.features) < 2:
            raise ValueError("a slope needs at least two numbers of features, each once and in rising order; fix features")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds} must be at least 2, or no band can be given")


QUICK = FeatureMapStudyConfig(features=(16, 32, 64), most_weighted=32, seeds=2, pairs=32, tokens=64, heads=2)
