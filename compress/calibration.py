"""Token blocks from text: calibration sequences for pruning, and held-out windows to measure on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from dijiang.common.perplexity import windows
from dijiang.common.text import read_tokens


def calibration_blocks(tokenizer, texts: Sequence[Path], *, samples: int, length: int, seed: int) -> torch.Tensor:
    """
    Draw sequences at random positions, each within one file, and files in proportion to their length. They overlap only if the
    text has fewer tokens than they need.

    Args:
        tokenizer: of the model.
        texts: UTF-8 files.
        samples: number of sequences N.
        length: tokens T of each.
        seed: of the draw.

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
    if sum(slots) >= samples:  # consecutive blocks after a random shift in each file do not overlap
        shifts = [int(torch.randint(len(tokens) % length + 1, (), generator=generator)) for tokens in long_enough]
        starts = [(file, shift + i * length) for file, shift in enumerate(shifts) for i in range(slots[file])]
        chosen = [starts[i] for i in torch.randperm(len(starts), generator=generator)[:samples].tolist()]
    else:
        counts = torch.tensor([len(tokens) - length + 1 for tokens in long_enough])
        drawn = torch.randint(int(counts.sum()), (samples,), generator=generator)
        ends = counts.cumsum(0)
        files_drawn = torch.bucketize(drawn, ends, right=True)
        chosen = [(int(file), int(index - (ends - counts)[file])) for file, index in zip(files_drawn, drawn, strict=True)]
    return torch.stack([long_enough[file][start : start + length] for file, start in chosen])


def held_out_windows(tokenizer, text: Path, *, tokens: int, length: int) -> list[torch.Tensor]:
    """
    Cut the first `tokens` tokens of a text into windows of `length`, as `dijiang evaluate` does; the last may be shorter.

    Raises:
        ValueError: if it cannot be read or has less than one window.
    """
    ids = torch.tensor(read_tokens(tokenizer, text, tokens))
    if len(ids) < length:
        raise ValueError(f"held-out text {text.name} has {len(ids)} tokens, not one window of {length}; give more text")
    return [window for window, _ in windows(ids, length, stride=length)]


def hash_of_blocks(blocks: Sequence[torch.Tensor]) -> str:
    """SHA-256 of blocks or windows: their number, the length of the first, and all token ids."""
    shape = (len(blocks), len(blocks[0]))
    return hashlib.sha256(f"{shape}".encode() + torch.cat(tuple(blocks)).long().numpy().tobytes()).hexdigest()
