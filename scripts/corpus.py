"""The corpus: held-out pages, training documents without repeated paragraphs, and the tokens of both."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from prose import MIN_PAGE, held_out

HELD_TOKENS = 60_000  # stored of a held-out source; its other pages are in no set
MAX_CHARACTERS = {"anarchism": 12_000_000, "others": 5_000_000}  # of a source
MAX_DOCUMENT = 50_000  # characters; longer pages are cut between paragraphs, so that the sources mix
MIN_LETTERS = 0.65  # share of a paragraph's characters
MIN_COMMON_WORDS = 0.12  # share of a paragraph's words; in English prose it is 0.3 to 0.4
COMMON_WORDS = frozenset(
    "the of and to a in is that for it as with be on this by are or not can if an from you at was which will have has we he "
    "his they but all one when use used".split()
)
WORD = re.compile(r"[^\W\d_]+")
NOT_WORD = re.compile(r"\W+")
CLEAN = str.maketrans(dict.fromkeys("\u00ad\u00b6\uf0c1\ufffd", ""))  # marks of page tools and of undecodable bytes


@dataclass(kw_only=True, slots=True)
class Source:
    """
    Text of one package.

    Attributes:
        name: of the package.
        pages: path and text, one paragraph a line.
        held: name of the held-out source that one in ten of its pages goes to; empty if none is held out.
        facts: entries of its row in the table: version, license and so on.
    """

    name: str
    pages: list[tuple[str, str]]
    held: str = ""
    facts: dict = field(default_factory=dict)


def fingerprint(paragraph: str) -> bytes:
    """Hash of a paragraph that ignores case, punctuation and spaces."""
    return hashlib.blake2b(NOT_WORD.sub("", paragraph.casefold()).encode(), digest_size=12).digest()


def is_english_prose(paragraph: str) -> bool:
    letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ")
    words = WORD.findall(paragraph.lower())
    common = sum(word in COMMON_WORDS for word in words)
    return letters >= MIN_LETTERS * len(paragraph) and common >= MIN_COMMON_WORDS * max(len(words), 1)


def held_pages(source: Source) -> list[str]:
    """Texts of the held-out pages, as the readers returned them."""
    return [text for path, text in source.pages if source.held and held_out(PurePosixPath(path).name)]


def training_documents(sources: list[Source], also_held: Iterable[str] = ()) -> Iterator[tuple[str, str, str]]:
    """
    Source name, page and text of each training document: English prose without paragraphs that are held out or in an earlier
    document.

    Args:
        sources: in order; a paragraph stays in the first source that has it.
        also_held: held-out texts in addition to the sources' own.
    """
    seen = {fingerprint(line) for text in also_held for line in text.split("\n")}
    for source in sources:
        seen |= {fingerprint(line) for text in held_pages(source) for line in text.split("\n")}
    for source in sources:
        for path, text in source.pages:
            if source.held and held_out(PurePosixPath(path).name):
                continue
            paragraphs = []
            for line in text.translate(CLEAN).split("\n"):
                if is_english_prose(line) and (mark := fingerprint(line)) not in seen:
                    seen.add(mark)
                    paragraphs.append(line)
            for number, document in enumerate(cut(paragraphs)):
                if len(document) > MIN_PAGE:
                    yield source.name, f"{path}#{number}", document


def cut(paragraphs: list[str]) -> Iterator[str]:
    """Documents of at most about `MAX_DOCUMENT` characters."""
    document = []
    size = 0
    for paragraph in paragraphs:
        if document and size + len(paragraph) > MAX_DOCUMENT:
            yield "\n".join(document)
            document = []
            size = 0
        document.append(paragraph)
        size += len(paragraph) + 1
    if document:
        yield "\n".join(document)


def shuffled(documents: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """
    Source and text of each document in the order of a hash of their names, so that any beginning is a mixture.

    Documents of a source beyond `MAX_CHARACTERS` are left out, so that no source dominates the mixture.
    """
    keyed = [(hashlib.sha256(f"{source}/{page}".encode()).digest(), source, text) for source, page, text in documents]
    taken: Counter[str] = Counter()
    mixture = []
    for _, source, text in sorted(keyed):
        if taken[source] < MAX_CHARACTERS.get(source, MAX_CHARACTERS["others"]):
            taken[source] += len(text)
            mixture.append((source, text))
    return mixture


class Texts(list[str]):
    """Documents in the form that `dijiang.train.data.token_cache.write_tokens` takes."""

    skipped: dict[str, int] = {}

    def __init__(self, name: str, texts: Iterable[str]):
        super().__init__(texts)
        self.source = SimpleNamespace(path=name)  # the name of the source in meta.json

    def describe_skipped(self) -> None:
        """Nothing is skipped."""


def write_token_folder(folder: Path, texts: list[str], tokenizer, *, limit: int | None = None) -> list[int]:
    """
    Tokenize documents into a folder of the training's token cache, and return the number of tokens of each document. The
    document that completes `limit` tokens is the last one.
    """
    import numpy as np

    from dijiang.train.data.token_cache import TokenFile, write_tokens

    folder.mkdir(parents=True, exist_ok=True)
    name = "/".join(folder.parts[folder.parts.index("corpus") :]) if "corpus" in folder.parts else folder.name
    write_tokens(folder, Texts(name, texts), tokenizer, limit=limit, fingerprint="")
    set_fingerprint(folder)
    file = TokenFile(folder)
    return np.diff([*file.starts, len(file)]).tolist()


def set_fingerprint(folder: Path) -> None:
    """Write a hash of the tokens into meta.json."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    content = hashlib.sha256()
    for name in ("tokens.bin", "starts.bin"):
        content.update((folder / name).read_bytes())
    meta["fingerprint"] = content.hexdigest()[:32]
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
