"""The documents of a source, which is files on disk or a data set on the Hugging Face hub."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dijiang.checkpoint.provenance import public_name
from dijiang.common.errors import one_line
from dijiang.common.library_calls import call_named

from ..recipe.schema import DataConfig, SourceConfig
from .readers import SUFFIXES, BadRecords, known_suffix, read_file, shortened

TOKEN_FILES = ("tokens.bin", "starts.bin", "meta.json")  # files of a folder of text that is already tokenized
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_SECONDS = 10.0  # time limit of the question for the revision


def is_token_folder(path: str) -> bool:
    """True if a source's path is a folder of tokens, as token_cache.py writes them."""
    here = Path(path).expanduser()
    return all((here / name).is_file() for name in TOKEN_FILES)


def local_files(path: str) -> list[Path] | None:
    """
    The files of a source, in order; None if its path is the name of a hub data set.

    A folder stands for all files below it that have a known suffix and are not hidden, a folder of tokens for the file that
    holds the tokens.

    Raises:
        ValueError: if there is no such file.
    """
    here = Path(path).expanduser()
    if is_token_folder(path):
        files = [here / TOKEN_FILES[0]]
    elif here.is_dir():
        files = [
            file
            for file in here.rglob("*")
            if known_suffix(file) and file.is_file() and not any(part[0] == "." for part in file.relative_to(here).parts)
        ]
        if not files:
            raise ValueError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}; name a folder with text")
    elif here.exists():
        files = [here]
    elif glob.has_magic(path):
        files = [Path(name) for name in glob.glob(str(here), recursive=True) if Path(name).is_file()]
        if not files:
            raise ValueError(f"{path} matches no file; correct it (** stands for any folders)")
    elif HUB_NAME.fullmatch(path) and not known_suffix(here):
        return None
    else:
        raise ValueError(f"{path}: no such file or folder; correct the path")
    return sorted(files, key=lambda file: file.parts)


def public_source(path: str) -> str:
    """The name of a source without folders of this machine: a hub name, the end of a path, or the pattern of a glob."""
    parts = Path(path).parts
    pattern = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    if not pattern or Path(path).expanduser().exists():
        return public_name(path)
    return "/".join(part for part in parts[max(pattern[0] - 1, 0) :] if part not in ("/", "~"))


def refuse_leaks(data: DataConfig) -> None:
    """Raise ValueError if a file, or a split of a hub data set, is both trained on and held out."""
    trained = {identity: name for source in data.train for identity, name in identities(source)}
    for source in data.held_out:
        for identity, name in identities(source):
            if identity in trained:
                same = "" if trained[identity] == name else f" (as {trained[identity]})"
                raise ValueError(f"{name} is held out and also trained on{same}; take it out of one of the two")


def identities(source: SourceConfig) -> list[tuple[tuple, str]]:
    """An identity of each file of a source, the same for all links to it, and the name of the file."""
    files = local_files(source.path)
    if files is None:
        return [((source.path, source.subset, source.split), f"split {source.split} of {source.path}")]
    stats = [(file.stat(), str(file)) for file in files]
    return [((stat.st_dev, stat.st_ino), name) for stat, name in stats]


def hub_rows(source: SourceConfig, revision: str | None) -> Iterator[dict]:
    """
    The rows of a hub data set, as they arrive. A data set that cannot be read to its end is a ValueError and never a bad
    record, because the rest of the text would be lost.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("reading from the hub needs datasets, which is missing; run: pip install datasets") from None
    name = source.path if source.subset is None else f"{source.path} (subset {source.subset})"
    number = 0
    try:
        options = {"split": source.split, "streaming": True, "revision": revision}
        rows = call_named(datasets.load_dataset, source.path, source.subset, **options)
        if source.column in (rows.column_names or []):
            rows = rows.select_columns([source.column])
        for number, row in enumerate(rows, 1):  # noqa: B007
            yield row
    except Exception as error:  # many libraries take part, each with errors of its own
        if number:
            raise ValueError(f"reading {name} from the hub broke off after row {number}: {one_line(error)}") from error
        raise ValueError(
            f"{name} is neither a file, folder or glob here, nor did the hub give its split {source.split}: {one_line(error)}"
        ) from error


class Documents:
    """
    The documents of a source, as strings, read lazily; every pass starts again. One document is a whole text file, or the text
    column of one JSON line or row. Null and blank texts are left out.

    Args:
        source: the files or hub data set.
        bad_records: `error` or `skip`: what to do about a record that cannot be read.

    Attributes:
        bad: the records that the latest pass left out.

    Raises:
        ValueError: if the source has no files; while reading, if the hub does not have the data set or its column, and with
            `error` on the first bad record.
    """

    def __init__(self, source: SourceConfig, bad_records: str):
        self.source = source
        self.policy = bad_records
        self.files = local_files(source.path)
        self.bad = BadRecords(bad_records)

    def __iter__(self) -> Iterator[str]:
        bad = self.bad = BadRecords(self.policy)
        if self.files is None:
            yield from self.hub_texts(bad)
        else:
            for file in self.files:
                yield from read_file(file, self.source.column, bad)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of records that the latest pass has left out, by kind."""
        return dict(self.bad.counts)

    def describe_skipped(self) -> str | None:
        """`skipped` in words, with the location of the first record of each kind; None if nothing was left out."""
        if not self.bad.counts:
            return None
        kinds = [f"{count:,} {kind} (first: {self.bad.first[kind]})" for kind, count in self.bad.counts.most_common()]
        return f"left out of {self.source.path}: {', '.join(kinds)}"

    def fingerprint(self) -> str:
        """SHA-256 of everything that the documents depend on: names, sizes and times of files, or the data set's revision."""
        if self.files is None:
            content: list = [self.source.path, self.source.subset, self.source.split, self.revision]
        else:
            stats = [(file.resolve(), file.stat()) for file in self.files]
            content = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
        return hashlib.sha256(json.dumps([self.source.column, content]).encode()).hexdigest()

    @cached_property
    def revision(self) -> str | None:
        """Commit of the hub data set; None if the hub does not answer."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.source.path, timeout=HUB_SECONDS).sha
        except (TypeError, AttributeError):  # an incompatible version of the client, not a failure of the hub
            raise
        except Exception:  # reading the data set will tell the reason
            return None

    def hub_texts(self, bad: BadRecords) -> Iterator[str]:
        column = self.source.column
        for number, row in enumerate(hub_rows(self.source, self.revision), 1):
            where = f"{self.source.path} split {self.source.split} row {number}"
            if column not in row:  # no row will have it
                columns = shortened(row)
                raise ValueError(f"{where}: missing column {column!r}; set column to one of its own: {columns}")
            if bad.accepts(row[column], where):
                yield row[column]
