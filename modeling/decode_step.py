"""The weights of a linear layer that the fused decoding steps read (decode_step_native.py, decode_step_triton.py)."""

from typing import NamedTuple

from torch import Tensor

from .exponential_maps import Factors


class StepWeights(NamedTuple):
    """
    Tensors and settings of a linear layer whose feature maps are exponentials of one matrix.

    Attributes:
        map_q: factors of the queries' feature map.
        map_k: factors of the keys' feature map.
        key_scale: weight (G, d) and bias (G,) of a key's log-weight, or None.
        branch_scale: weight (H, d) and bias (H,) of the linear branch's log-scale, or None.
        log_rate: (G,), logarithms of the rates of decay, or None.
        rows: m, the rows of a feature map's matrix.
        pairs: whether the features of -x follow those of x, so that there are M = 2 m of them instead of m.
        softmax: whether features are a softmax, else exponentials.
        sinks: S.
        window: W.
        normalize: whether outputs are divided by the sum of the weights.
        feature_scale: factor on queries and keys before their maps.
        scaling: factor on q.k in the window.
        key_limit: bound of a key's log-weight.
    """

    map_q: Factors
    map_k: Factors
    key_scale: tuple[Tensor, Tensor] | None
    branch_scale: tuple[Tensor, Tensor] | None
    log_rate: Tensor | None
    rows: int
    pairs: bool
    softmax: bool
    sinks: int
    window: int
    normalize: bool
    feature_scale: float
    scaling: float
    key_limit: float

    @property
    def features(self) -> int:
        """M."""
        return 2 * self.rows if self.pairs else self.rows

    def tensors(self) -> list[Tensor | None]:
        """All eleven weights in the order of the fields, None for those that the layer has not."""
        absent = (None, None)
        return [*self.map_q, *self.map_k, *(self.key_scale or absent), *(self.branch_scale or absent), self.log_rate]
