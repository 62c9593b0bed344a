"""The memory of a linear layer: the sum over old keys, the sinks and the window."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class LinearState:
    """
    All that a linear layer remembers of one batch of sequences; its size does not depend on their length.

    Attributes:
        state: (B, G, M, d + 1) float32, sum of features times (value, 1); (B, G, M, d) without normalization.
        window_k: (B, G, S + W, d), keys of the S sinks, then of the last W tokens.
        window_v: (B, G, S + W, d), their values.
        window_rank: (B, W), how many real tokens came before each of the last W, -1 for padding; out of date once `settled`.
        sink_filled: (B, S) bool, which sinks hold a token.
        tokens: (B,), real tokens seen.
        seen: tokens seen, padding included.
        unpadded: no token is known to have been padding.
        settled: all sinks are filled, and the window holds real tokens only, none of which will become a sink.
    """

    state: Tensor
    window_k: Tensor
    window_v: Tensor
    window_rank: Tensor
    sink_filled: Tensor
    tokens: Tensor
    seen: int = 0
    unpadded: bool = True
    settled: bool = False

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, features: int, window: int, sinks: int, sums: bool) -> "LinearState":
        """The state before the first token, for keys and values like k, v (B, T, G, d)."""
        B, _, G, d = k.shape
        return cls(
            state=k.new_zeros(B, G, features, d + sums, dtype=torch.float32),
            window_k=k.new_zeros(B, G, sinks + window, d),
            window_v=v.new_zeros(B, G, sinks + window, d),
            window_rank=k.new_full((B, window), -1, dtype=torch.long),
            sink_filled=k.new_zeros(B, sinks, dtype=torch.bool),
            tokens=k.new_zeros(B, dtype=torch.long),
            settled=window == 0,
        )

    def ranks(self) -> Tensor:
        """`window_rank`, brought up to date."""
        if not self.settled:
            return self.window_rank
        W = self.window_rank.shape[1]
        return self.tokens[:, None] + torch.arange(-W, 0, device=self.tokens.device)

    def settle(self, sinks: int) -> "LinearState":
        """Set `settled`; where the number of tokens decides it, the device is not asked."""
        if not self.settled and self.unpadded:
            self.settled = self.seen >= self.window_rank.shape[1] + sinks
        elif not self.settled and not torch.compiler.is_compiling():
            self.settled = bool((self.window_rank >= sinks).all()) and bool(self.sink_filled.all())
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
