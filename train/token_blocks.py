"""Text files to blocks of tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dijiang.common.text import read_tokens


def token_blocks(tokenizer, files: Sequence[str | Path], block_size: int) -> torch.Tensor:
    """
    Tokenise text files, one after another, and cut them into blocks; the last incomplete block is dropped.

    Args:
        tokenizer: a transformers tokenizer; its end-of-text token, if any, separates the files.
        files: paths of UTF-8 text files.
        block_size: tokens per block.

    Returns:
        (blocks, block_size) int64.

    Raises:
        ValueError: on an unreadable, empty or non-UTF-8 file, or if all files together do not fill one block.
    """
    if not files:
        raise ValueError("no data files given; name at least one text file")
    tokens: list[int] = []
    for path in files:
        tokens += read_tokens(tokenizer, path)
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    if len(tokens) < block_size:
        names = ", ".join(str(path) for path in files)
        raise ValueError(
            f"{names}: {len(tokens)} tokens do not fill one block of {block_size}; give more text or a smaller block"
        )
    return torch.tensor(tokens[: len(tokens) // block_size * block_size]).view(-1, block_size)
