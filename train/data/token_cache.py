"""Tokenised text on disk: each source is tokenised once and then read without being loaded."""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dijiang.common.progress import TokenizeProgress

from ..recipe.schema import DataConfig, SourceConfig
from .sources import Documents, is_token_folder, public_source

FORMAT = 1  # raised when what the files hold changes, so that older ones are not taken
BATCH_CHARACTERS = 1_000_000  # tokenised at a time
BATCH_TEXTS = 1_000
PIECE_CHARACTERS = 1_000_000  # of a longer document at a time
STALE_SECONDS = 24 * 3600
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
WORD_END = re.compile(r"(?<=\S)(?= \S)")


class TokenFile:
    """
    The tokens of one source, one document after another, in a folder that `tokenise` wrote.

    Attributes:
        tokens: (len(self),) uint16 or uint32, not loaded but mapped into memory.
        starts: (documents,) int64, ascending: where each document starts in `tokens`; mapped too.
        skipped: records that were left out, by kind.
        fingerprint: of the text, the tokenizer and how it was used.
        tokenizer: `tokenizer_hash` of the tokenizer; None in folders of older versions, which did not note it.

    Raises:
        OSError, ValueError, KeyError: if the folder does not hold what it should.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder, self.skipped, self.fingerprint = folder, meta["skipped"], meta["fingerprint"]
        self.tokenizer = meta.get("tokenizer")
        # a shape that the file is too short for is an error of memmap's
        self.tokens = np.memmap(folder / "tokens.bin", mode="r", dtype=meta["dtype"], shape=(meta["tokens"],))
        self.starts = np.memmap(folder / "starts.bin", mode="r", dtype="<i8", shape=(meta["documents"],))

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):  # a worker process maps the files itself; pickling a map would copy all tokens
        return TokenFile, (self.folder,)


def tokenise(
    source: SourceConfig, data: DataConfig, tokenizer, *, tokens_needed: int | None, progress: bool = True
) -> TokenFile:
    """
    The tokens of all documents of a source, each followed by the tokenizer's end-of-text token if it has one. They are taken
    from the cache folder if they are there, else put there; several processes may do so at once. A source that is a folder of
    tokens is taken as it is.

    Args:
        source: of the text.
        data: says where the cache is, what to do about bad records, and whether to stop at `tokens_needed`.
        tokenizer: a transformers tokenizer.
        tokens_needed: with `data.streaming`, the document that completes so many is the last; None: read all.
        progress: tell on stderr how far it is.

    Raises:
        ValueError: if there is no text, the source cannot be read, its tokens are another tokenizer's, or the cache folder
            cannot be written.
    """
    if is_token_folder(source.path):
        return tokenised_source(Path(source.path).expanduser(), tokenizer)
    documents = Documents(source, data.bad_records)
    limit = tokens_needed if data.streaming else None
    parts = [FORMAT, documents.fingerprint(), tokenizer_hash(tokenizer), tokenizer.eos_token_id, data.bad_records, limit]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    cache = cache_folder(data)
    folder = cache / key
    if (found := existing(folder)) is not None:
        return found
    temporary = cache / f"{key}.tmp-{uuid.uuid4().hex[:12]}"
    try:
        temporary.mkdir(parents=True)
        remove_stale(cache)
        with TokenizeProgress(public_source(source.path), limit, shown=progress) as bar:
            write_tokens(temporary, documents, tokenizer, limit=limit, fingerprint=key, bar=bar)
            if left_out := documents.describe_skipped():
                bar.say(left_out)
        return publish(temporary, folder)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write tokens to {cache} ({reason}); make room or set cache to another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was published


def tokenised_source(folder: Path, tokenizer) -> TokenFile:
    """
    The tokens in `folder`, which the user named as a source.

    Raises:
        ValueError: if they are damaged, or not those of `tokenizer`.
    """
    try:
        file = TokenFile(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a whole folder of tokens ({error}); write it again from its text") from None
    if file.tokenizer != tokenizer_hash(tokenizer):
        whose = "does not say by which tokenizer" if file.tokenizer is None else "is of another tokenizer than the model's"
        raise ValueError(f"{folder} {whose}; tokenise its text with the model's, or name the text")
    if not len(file) or not len(file.starts):
        raise ValueError(f"{folder} holds no tokens; name another source")
    return file


def cache_folder(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dijiang" / "tokens"


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str().split('"added_tokens"', 1)[-1]  # before that: truncation and padding of the latest call
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(content.encode()).hexdigest()


def existing(folder: Path) -> TokenFile | None:
    """The tokens in a folder; None if they are missing or damaged."""
    try:
        return TokenFile(folder)
    except (OSError, ValueError, KeyError):
        return None


def publish(temporary: Path, folder: Path) -> TokenFile:
    """Give a finished folder its name. If another process was first, its tokens, which are the same, are used."""
    try:
        temporary.rename(folder)
    except OSError:
        if (found := existing(folder)) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or `existing` would have given it
        temporary.rename(folder)
    return TokenFile(folder)


def remove_stale(cache: Path) -> None:
    """Remove what processes that were killed left behind; younger folders may still be written to."""
    for folder in cache.glob("*.tmp-*"):
        try:
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # another process was faster
            continue
        if latest < time.time() - STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def write_tokens(folder: Path, documents: Documents, tokenizer, *, limit: int | None, fingerprint: str, bar) -> None:
    """Write tokens.bin, starts.bin and, last, meta.json into `folder`."""
    highest = max(*tokenizer.get_vocab().values(), tokenizer.eos_token_id or 0)
    dtype = np.dtype("<u2" if highest < 2**16 else "<u4")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    done = start = n_documents = 0
    without_tokens: Counter[str] = Counter()
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "starts.bin", "wb") as starts:
        for ids, complete in tokenised_pieces(documents, tokenizer):
            tokens.write(np.array(ids, dtype).tobytes())
            done += len(ids)
            if complete and done > start:
                tokens.write(np.array(end, dtype).tobytes())
                done += len(end)
                starts.write(np.array(start, "<i8").tobytes())
                n_documents += 1
                start = done
            elif complete:
                without_tokens["text without tokens"] += 1
            bar.update(done, n_documents)
            if complete and limit is not None and done >= limit:
                break
    if not done:
        left_out = documents.describe_skipped()
        raise ValueError(f"{documents.source.path} holds no text{f'; {left_out}' if left_out else ''}")
    meta = {
        "source": documents.source.path,
        "fingerprint": fingerprint,
        "tokens": done,
        "documents": n_documents,
        "dtype": dtype.str,
        "tokenizer": tokenizer_hash(tokenizer),
        "skipped": documents.skipped | without_tokens,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def tokenised_pieces(documents: Documents, tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each piece of each document, and whether the document is complete with it."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in documents:
        for piece in pieces(text):
            batch.append(piece)
            characters += len(piece[0])
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
                yield from tokenised_batch(batch, tokenizer)
                batch, characters = [], 0
    if batch:
        yield from tokenised_batch(batch, tokenizer)


def tokenised_batch(batch: list[tuple[str, bool]], tokenizer) -> Iterator[tuple[list[int], bool]]:
    # the library would warn about texts longer than the model's context, which is what blocks are for
    ids = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
    return zip(ids, (complete for _, complete in batch), strict=True)


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """
    Cut a long document to pieces of bounded size, each with whether it is the last. The cut is where a line or a word ends:
    byte-level tokenizers never tokenise across it.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        near, far = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
        match = LINE_END.search(text, near, far) or WORD_END.search(text, near, far)
        cut = match.end() if match else far
        yield text[start:cut], False
        start = cut
    yield text[start:], True
