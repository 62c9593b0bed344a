"""
The cache: constant-size states for linear layers, with keys and values of every token for their kept heads; transformers' own
growing or sliding layers for softmax ones.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .configuration_dijiang import DiJiangConfig
from .linear_state import LinearState


class GrowingRows:
    """
    Rows of every token (B, heads, tokens, d). A prompt is kept as it is; what follows goes into spare rows, an eighth of the
    length and at least `SPARE`, so that long sequences are seldom copied.
    """

    SPARE = 64

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, x: Tensor) -> Tensor:
        """Add rows x (B, heads, T, d); return all rows."""
        start, self.length = self.length, self.length + x.shape[2]
        if self.buffer is None:
            # a view of what all heads share would keep that alive
            self.buffer = x if torch.compiler.is_compiling() else x.clone(memory_format=torch.contiguous_format)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling() or self.buffer.is_inference() > x.is_inference():
            # what a backward pass may ask for, or inference mode has closed, is not written to
            self.buffer = torch.cat((self.buffer[:, :, :start], x), dim=2)
        else:
            if self.buffer.shape[2] < self.length:
                rows = self.buffer[:, :, :start]
                capacity = self.length + max(self.SPARE, self.length // 8)
                self.buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])
                self.buffer[:, :, :start] = rows
            self.buffer[:, :, start : self.length] = x
        return self.buffer[:, :, : self.length]

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to the rows."""
        if self.buffer is not None:
            self.buffer = fn(self.buffer[:, :, : self.length])


class LinearStateLayer(CacheLayerMixin):
    """
    The `LinearState` of one linear layer, and keys and values of every token for its kept heads. It cannot forget single
    tokens, so `crop` is refused.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False
    state: LinearState | None
    seen: int

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a linear layer's cache takes update_state(state, tokens), not keys and values")

    def update_state(self, state: LinearState, tokens: int) -> None:
        """Replace the state by the one after `tokens` more tokens."""
        self.state = state.compact()
        self.seen += tokens
        self.is_initialized = True

    def update_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, kept heads, T, d) of new tokens; return those of all tokens."""
        return self.kept_k.append(k), self.kept_v.append(v)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.9

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a linear-attention state cannot be cropped: tokens already in it cannot be taken out")

    def reset(self) -> None:
        self.state = None
        self.kept_k, self.kept_v = GrowingRows(), GrowingRows()
        self.seen = 0
        self.is_initialized = False

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(fn)
        self.kept_k.map(fn)
        self.kept_v.map(fn)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer holds."""
        kept = [rows.buffer for rows in (self.kept_k, self.kept_v) if rows.buffer is not None]
        return kept + ([] if self.state is None else self.state.tensors())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))


class DiJiangCache(Cache):
    """One cache layer per decoder layer, by `config.attention_types`."""

    def __init__(self, config: DiJiangConfig):
        layers: list[Any] = []
        for layer_type in config.attention_types:
            if layer_type == "linear_attention":
                layers.append(LinearStateLayer())
            elif layer_type == "sliding_attention":
                assert config.sliding_window is not None  # the config refuses sliding layers without it
                layers.append(DynamicSlidingWindowLayer(sliding_window=config.sliding_window))
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)

    def memory_bytes(self) -> int:
        """Bytes of memory held, for all layers and sequences of the batch."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, LinearStateLayer):
                tensors += layer.tensors()
            elif isinstance(layer, CacheLayerMixin):
                tensors += [x for x in (layer.keys, layer.values) if x is not None]
        return sum(x.untyped_storage().nbytes() for x in tensors)
