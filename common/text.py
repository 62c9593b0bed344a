"""Text files that a user names, and the identity of the tokenizer that encodes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading text must not take the seconds that importing transformers takes
    from transformers import PreTrainedTokenizerBase


def read_text(path: str | Path) -> str:
    """
    The text of one UTF-8 file.

    Raises:
        ValueError: if it cannot be read, is empty, or is not UTF-8 (with the position of the first wrong byte).
    """
    try:
        # not utf-8-sig, which counts bytes from behind the byte-order mark
        text = Path(path).read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def read_tokens(tokenizer: PreTrainedTokenizerBase, path: str | Path, limit: int | None = None) -> list[int]:
    """The first `limit` token ids of one UTF-8 file (None: all), special tokens left out. Raises what `read_text` does."""
    # the library would warn of texts longer than the model's context
    return tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"][:limit]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # calls change only truncation and padding, which come before the added tokens
        content = backend.to_str().split('"added_tokens"', 1)[-1]
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(content.encode()).hexdigest()
