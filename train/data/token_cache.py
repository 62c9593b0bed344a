"""Tokenized text on disk: each source is tokenized once and then mapped into memory."""

import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dijiang.common.outputs import new_folder
from dijiang.common.progress import TokenizeProgress
from dijiang.common.result_cache import cache_folder
from dijiang.common.text import tokenizer_fingerprint

from ..recipe.schema import DataConfig, SourceConfig
from .sources import Documents, is_token_folder, public_source

FORMAT = 1  # raised when the content of the files changes, so that older ones are not read
BATCH_CHARACTERS = 1_000_000  # tokenized at a time
BATCH_TEXTS = 1_000
PIECE_CHARACTERS = 1_000_000  # of a longer document at a time
STALE_SECONDS = 24 * 3600
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
WORD_END = re.compile(r"(?<=\S)(?= \S)")


class TokenFile:
    """
    The tokens of one source, one document after another, in a folder that `tokenize` wrote.

    Attributes:
        folder: the folder.
        skipped: number of records that were left out, by kind.
        fingerprint: hash of the text, the tokenizer and the settings.
        tokenizer: `tokenizer_fingerprint` of the tokenizer; None in folders of older versions, which did not record it.
        tokens: (len(self),) uint16 or uint32, mapped into memory.
        starts: (documents,) int64, ascending: where each document starts in `tokens`; mapped too.

    Raises:
        OSError, ValueError, KeyError: if the folder does not hold what it should.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.skipped = meta["skipped"]
        self.fingerprint = meta["fingerprint"]
        self.tokenizer = meta.get("tokenizer")
        # memmap raises ValueError if the file is too short for the shape
        self.tokens = np.memmap(folder / "tokens.bin", mode="r", dtype=meta["dtype"], shape=(meta["tokens"],))
        self.starts = np.memmap(folder / "starts.bin", mode="r", dtype="<i8", shape=(meta["documents"],))

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):  # a worker process maps the files itself, because pickling a map would copy all tokens
        return TokenFile, (self.folder,)


def tokenize(source: SourceConfig, data: DataConfig, tokenizer, *, tokens_needed: int | None, progress: bool) -> TokenFile:
    """
    The tokens of all documents of a source, each followed by the tokenizer's end-of-text token if it has one. They are read
    from the cache folder, or written to it first; several processes may do so at once. A source that is a folder of tokens is
    used as it is.

    Args:
        source: the text.
        data: the cache folder, what to do about bad records, and whether to stop at `tokens_needed`.
        tokenizer: a transformers tokenizer.
        tokens_needed: with `data.streaming`, the document that completes this number of tokens is the last; None: read all.
        progress: whether to report progress on stderr.

    Raises:
        ValueError: if there is no text, the source cannot be read, its tokens are another tokenizer's, or the cache folder
            cannot be written.
    """
    if is_token_folder(source.path):
        return tokenized_source(Path(source.path).expanduser(), tokenizer)
    documents = Documents(source, data.bad_records)
    limit = tokens_needed if data.streaming else None
    fingerprint = tokenizer_fingerprint(tokenizer)
    parts = [FORMAT, documents.fingerprint(), fingerprint, tokenizer.eos_token_id, data.bad_records, limit]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    cache = cache_folder("tokens") if data.cache is None else Path(data.cache).expanduser()
    folder = cache / key
    if (cached := existing(folder)) is not None:
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_stale(cache)
        shutil.rmtree(folder, ignore_errors=True)  # it is damaged, or `existing` would have returned it
        with new_folder(folder) as draft, TokenizeProgress(public_source(source.path), limit, shown=progress) as bar:
            write_tokens(draft, documents, tokenizer, limit=limit, fingerprint=key, advance=bar.update)
            if skipped := documents.describe_skipped():
                bar.line(skipped)
    except (OSError, ValueError) as error:
        if (cached := existing(folder)) is not None:  # another process was faster, and its tokens are the same
            return cached
        if isinstance(error, ValueError):
            raise
        reason = error.strerror or error
        raise ValueError(f"cannot write tokens to {cache} ({reason}); make room or set cache to another folder") from error
    return TokenFile(folder)


def tokenized_source(folder: Path, tokenizer) -> TokenFile:
    """The tokens in `folder`, which the user named as a source; ValueError if they are damaged or not those of `tokenizer`."""
    try:
        file = TokenFile(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a whole folder of tokens ({error}); write it again from its text") from None
    if file.tokenizer != tokenizer_fingerprint(tokenizer):
        whose = "does not say by which tokenizer" if file.tokenizer is None else "is of another tokenizer than the model's"
        raise ValueError(f"{folder} {whose}; tokenize its text with the model's, or name the text")
    if not len(file) or not len(file.starts):
        raise ValueError(f"{folder} holds no tokens; name another source")
    return file


def existing(folder: Path) -> TokenFile | None:
    """The tokens in a folder; None if they are missing or damaged."""
    try:
        return TokenFile(folder)
    except (OSError, ValueError, KeyError):
        return None


def remove_stale(cache: Path) -> None:
    """Remove drafts that killed processes left behind; younger ones may still be written to."""
    for folder in (*cache.glob(".*.partial"), *cache.glob("*.tmp-*")):  # the latter are those of older versions
        try:
            latest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # another process has removed it meanwhile
            continue
        if latest < time.time() - STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def write_tokens(
    folder: Path,
    documents: Documents,
    tokenizer,
    *,
    limit: int | None,
    fingerprint: str,
    advance: Callable[[int, int], None] = lambda tokens, documents: None,
) -> None:
    """
    Write tokens.bin, starts.bin and, last, meta.json into `folder`. The document that completes `limit` tokens is the last;
    `advance` is called with the tokens and documents written so far. ValueError if there is no text.
    """
    highest = max(*tokenizer.get_vocab().values(), tokenizer.eos_token_id or 0)
    dtype = np.dtype("<u2" if highest < 2**16 else "<u4")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    done = start = document_count = 0
    without_tokens: Counter[str] = Counter()
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "starts.bin", "wb") as starts:
        for ids, complete in tokenized_pieces(documents, tokenizer):
            tokens.write(np.array(ids, dtype).tobytes())
            done += len(ids)
            if complete and done > start:
                tokens.write(np.array(end, dtype).tobytes())
                done += len(end)
                starts.write(np.array(start, "<i8").tobytes())
                document_count += 1
                start = done
            elif complete:
                without_tokens["text without tokens"] += 1
            advance(done, document_count)
            if complete and limit is not None and done >= limit:
                break
    if not done:
        skipped = documents.describe_skipped()
        raise ValueError(f"{documents.source.path} holds no text{f'; {skipped}' if skipped else ''}")
    meta = {
        "source": documents.source.path,
        "fingerprint": fingerprint,
        "tokens": done,
        "documents": document_count,
        "dtype": dtype.str,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "skipped": documents.skipped | without_tokens,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def tokenized_pieces(documents: Documents, tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each piece of each document, and whether the piece is the last of its document."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in documents:
        for piece in pieces(text):
            batch.append(piece)
            characters += len(piece[0])
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
                yield from tokenized_batch(batch, tokenizer)
                batch = []
                characters = 0
    if batch:
        yield from tokenized_batch(batch, tokenizer)


def tokenized_batch(batch: list[tuple[str, bool]], tokenizer) -> Iterator[tuple[list[int], bool]]:
    # verbose, it would warn about texts longer than the context of the model, but they are cut into blocks later
    ids = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
    return zip(ids, (complete for _, complete in batch), strict=True)


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """
    Cut a long document into pieces of bounded size, each with whether it is the last. Cuts are where a line or a word ends,
    because byte-level tokenizers form no token across these.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        middle = start + PIECE_CHARACTERS // 2
        match = LINE_END.search(text, middle, end) or WORD_END.search(text, middle, end)
        cut = match.end() if match else end
        yield text[start:cut], False
        start = cut
    yield text[start:], True
