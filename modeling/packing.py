"""
Packed rows: several sequences in one row, which begin at `cu_seqlens`, the running sums of their lengths from 0 to T.

They are computed as batches of right-padded rows: sequences of similar length share a batch, so that less than half of it is
padding whatever the lengths are.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class PackedGroup:
    """
    Sequences of one packed row as a batch.

    Attributes:
        sequences: (n,), indices of the sequences in the row.
        index: (n, L), indices of their tokens in the row; any index beyond a sequence's end.
        valid: (n, L) bool, False beyond a sequence's end.
    """

    sequences: Tensor
    index: Tensor
    valid: Tensor

    def unpack(self, x: Tensor) -> Tensor:
        """(T, ...) of the packed row -> (n, L, ...)."""
        return x[self.index]

    def pack_into(self, packed: Tensor, x: Tensor) -> Tensor:
        """`packed` (T, ...) with the tokens of x (n, L, ...) written to their rows."""
        return packed.index_put((self.index[self.valid],), x[self.valid])


@torch.compiler.disable
def group_sequences(cu_seqlens: Tensor, tokens: int) -> list[PackedGroup]:
    """
    Groups of the sequences that `cu_seqlens` (N + 1,) marks in a row of `tokens`.

    Raises:
        ValueError: unless they rise from 0 to `tokens`.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 1:
        raise ValueError(f"cu_seqlens {bounds[:8]}{' ...' if len(bounds) > 8 else ''} must rise from 0 to the {tokens} tokens")
    classes: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        classes.setdefault((length - 1).bit_length(), []).append(sequence)
    groups = []
    for members in classes.values():
        member_lengths = torch.tensor([lengths[i] for i in members])
        offset = torch.arange(int(member_lengths.max()))
        valid = offset < member_lengths[:, None]
        index = torch.where(valid, torch.tensor([bounds[i] for i in members])[:, None] + offset, 0)
        tensors = (torch.tensor(members), index, valid)
        groups.append(PackedGroup(*(x.to(cu_seqlens.device) for x in tensors)))
    return groups


@torch.compiler.disable
def sequence_bounds(position_ids: Tensor, real: Tensor | None = None) -> Tensor | None:
    """
    `cu_seqlens` of all rows of position_ids (B, T) laid end to end, or None if every row is one sequence. position_ids are
    ignored where `real` (B, T) is False.
    """
    jumps = position_ids.diff(dim=-1) != 1
    if real is not None:
        # a later position after padding continues its sequence, as the answer after a padded prompt does
        last_real = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values[:, :-1]
        falls = position_ids[:, 1:] <= position_ids.gather(1, last_real.clamp_min(0))
        jumps = real[:, 1:] & torch.where(real[:, :-1], jumps, falls & (last_real >= 0))
    if not bool(jumps.any()):
        return None
    starts = torch.cat((torch.ones_like(jumps[:, :1]), jumps), dim=1).flatten().nonzero().squeeze(-1)
    return torch.cat((starts, starts.new_tensor([position_ids.numel()])))
