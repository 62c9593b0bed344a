"""What a linear layer remembers: the sum over old keys, the sinks, the window and the exact memory."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# the score of an empty slot of the exact memory, and of a token that does not compete for one (padding, sinks)
EMPTY = -torch.inf


class StateSizes(NamedTuple):
    """
    Sizes of a layer's state.

    Attributes:
        features: M of the feature map.
        window: W.
        sinks: S.
        sums: whether the state also sums the weights.
        slots: slots of the exact memory, one number per key/value head.
        carry: numbers per head that the memory's score has to remember.
    """

    features: int
    window: int
    sinks: int
    sums: bool
    slots: tuple[int, ...] = ()
    carry: int = 0


@dataclass
class LinearState:
    """
    All that a linear layer remembers of one batch of sequences; its size does not depend on their length.

    Attributes:
        state: (B, G, M, d + 1) float32, sum of features times (value, 1); (B, G, M, d) without a sum of weights.
        window_k: (B, G, S + W, d), keys of the S sinks, then of the last W tokens.
        window_v: (B, G, S + W, d), their values.
        window_rank: (B, W), how many real tokens came before each of the last W, -1 for padding; out of date once `settled`.
        sink_filled: (B, S) bool, which sinks hold a token.
        memory_k: (B, M, d), keys in the M slots of the exact memory, those of the first head first, of one head in any order.
        memory_v: (B, M, d), their values.
        memory_score: (B, M) float32, their scores, `EMPTY` for an empty slot.
        memory_rank: (B, M) int32, how many real tokens came before each, -1 for an empty slot.
        window_score: (B, G, W) float32, what is known so far of the scores of the window's tokens; (B, G, 0) without memory.
        score_carry: (B, G, x) float32, what the score has to remember besides; mostly (B, G, 0).
        tokens: (B,), real tokens seen.
        seen: tokens seen, padding included.
        unpadded: no token is known to have been padding.
        settled: all sinks are filled, and the window holds real tokens only, none of which will become a sink.
        full: settled, and every slot of the memory holds a token.
    """

    state: Tensor
    window_k: Tensor
    window_v: Tensor
    window_rank: Tensor
    sink_filled: Tensor
    memory_k: Tensor
    memory_v: Tensor
    memory_score: Tensor
    memory_rank: Tensor
    window_score: Tensor
    score_carry: Tensor
    tokens: Tensor
    seen: int = 0
    unpadded: bool = True
    settled: bool = False
    full: bool = False

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, sizes: "StateSizes") -> "LinearState":
        """The state before the first token, for keys and values like k, v (B, T, G, d)."""
        B, _, G, d = k.shape
        window, sinks, M = sizes.window, sizes.sinks, sum(sizes.slots)
        return cls(
            state=k.new_zeros(B, G, sizes.features, d + sizes.sums, dtype=torch.float32),
            window_k=k.new_zeros(B, G, sinks + window, d),
            window_v=v.new_zeros(B, G, sinks + window, d),
            window_rank=k.new_full((B, window), -1, dtype=torch.long),
            sink_filled=k.new_zeros(B, sinks, dtype=torch.bool),
            memory_k=k.new_zeros(B, M, d),
            memory_v=v.new_zeros(B, M, d),
            memory_score=k.new_full((B, M), EMPTY, dtype=torch.float32),
            memory_rank=k.new_full((B, M), -1, dtype=torch.int32),
            window_score=k.new_zeros(B, G, window if M else 0, dtype=torch.float32),
            score_carry=k.new_zeros(B, G, sizes.carry if M else 0, dtype=torch.float32),
            tokens=k.new_zeros(B, dtype=torch.long),
            settled=window == 0,
            full=window == 0,
        )

    def ranks(self) -> Tensor:
        """`window_rank`, brought up to date."""
        if not self.settled:
            return self.window_rank
        W = self.window_rank.shape[1]
        return self.tokens[:, None] + torch.arange(-W, 0, device=self.tokens.device)

    def settle(self, sinks: int, slots: int) -> "LinearState":
        """Set `settled` and `full`; where the number of tokens decides it, the device is not asked."""
        filled = self.window_rank.shape[1] + sinks
        if not self.settled and self.unpadded:
            self.settled = self.seen >= filled
        elif not self.settled and not torch.compiler.is_compiling():
            self.settled = bool((self.window_rank >= sinks).all()) and bool(self.sink_filled.all())
        if not self.settled or self.full:
            return self
        if not slots or self.unpadded:
            self.full = not slots or self.seen >= filled + slots
        elif not torch.compiler.is_compiling():
            self.full = bool((self.memory_rank >= 0).all())
        return self

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LinearState":
        """The same state with `fn` applied to every tensor (select rows, move, detach)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: fn(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **mapped)

    def compact(self) -> "LinearState":
        """The same state, with copies of tensors that are views of longer ones and would keep those alive."""
        if torch.compiler.is_compiling():  # the compiler knows no storages
            return self.map(torch.clone)
        return self.map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state."""
        return [x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)]
