"""The token blocks that tell a pruning method what layers see."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from dijiang.common.perplexity import windows
from dijiang.common.text import read_tokens


def calibration_blocks(tokenizer, texts: Sequence[Path], *, samples: int, length: int, seed: int) -> torch.Tensor:
    """
    Stretches of text at random places, each within one file, files taken by their length. They overlap only where the text has
    fewer tokens than they need.

    Args:
        texts: UTF-8 files.
        samples: N; length: tokens T of each.

    Returns:
        Token ids (N, T).

    Raises:
        ValueError: if a file cannot be read, or none has `length` tokens.
    """
    files = [torch.tensor(read_tokens(tokenizer, path)) for path in texts]
    long_enough = [tokens for tokens in files if len(tokens) >= length]
    if not long_enough:
        longest = max(map(len, files))
        raise ValueError(
            f"the calibration text has at most {longest} tokens in one file, less than one block of {length}; give more text "
            "or a smaller length"
        )
    generator = torch.Generator().manual_seed(seed)
    slots = [len(tokens) // length for tokens in long_enough]
    if sum(slots) >= samples:  # a random shift in each file, then blocks side by side, so that none overlap
        shifts = [int(torch.randint(len(tokens) % length + 1, (), generator=generator)) for tokens in long_enough]
        places = [(file, shift + i * length) for file, shift in enumerate(shifts) for i in range(slots[file])]
        chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:samples].tolist()]
    else:
        starts = torch.tensor([len(tokens) - length + 1 for tokens in long_enough])
        drawn = torch.randint(int(starts.sum()), (samples,), generator=generator)
        ends = starts.cumsum(0)
        which = torch.bucketize(drawn, ends, right=True)
        chosen = [(int(file), int(place - (ends - starts)[file])) for file, place in zip(which, drawn, strict=True)]
    return torch.stack([long_enough[file][start : start + length] for file, start in chosen])


def held_out_windows(tokenizer, text: Path, *, tokens: int, length: int) -> list[torch.Tensor]:
    """
    The first `tokens` tokens of a text, cut into windows of `length` as `dijiang evaluate` cuts it; the last may be shorter.

    Raises:
        ValueError: if it cannot be read or has less than one window.
    """
    ids = torch.tensor(read_tokens(tokenizer, text, tokens))
    if len(ids) < length:
        raise ValueError(f"held-out text {text.name} has {len(ids)} tokens, not one window of {length}; give more text")
    return [window for window, _ in windows(ids, length, stride=length)]


def hash_of_blocks(blocks: Sequence[torch.Tensor]) -> str:
    """SHA-256 of the token ids of blocks or windows, their number and their length, which the last may lack."""
    shape = (len(blocks), len(blocks[0]))
    return hashlib.sha256(f"{shape}".encode() + torch.cat(tuple(blocks)).long().numpy().tobytes()).hexdigest()
