"""The texts of one file: a reader for each format, and the count of records that they could not read."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dijiang.common.errors import one_line

PARQUET_ROWS = 256  # in memory at a time
BLANK = "blank text"


class BadRecords:
    """
    Records that are not text, which are refused or counted.

    Args:
        policy: `error` or `skip`.

    Attributes:
        counts: number of records (or whole files) left out, by kind.
        first: location of the first record of each kind.
    """

    def __init__(self, policy: str):
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def report(self, kind: str, where: str, cure: str, detail: str = "") -> None:
        """Count a bad record, or raise ValueError if the policy is `error`."""
        if self.policy == "error":
            raise ValueError(f"{where}: {kind}{f' ({detail})' if detail else ''}; {cure}, or set bad_records to skip")
        self.count(kind, where)

    def count(self, kind: str, where: str) -> None:
        """Count a record that is left out whatever the policy."""
        self.counts[kind] += 1
        self.first.setdefault(kind, where)

    def accepts(self, text, where: str) -> bool:
        """True if `text` is a string that is not blank; count a null or blank one, and `report` anything else."""
        if text is None or (isinstance(text, str) and not text.strip()):
            self.count(BLANK, where)
        elif not isinstance(text, str):
            self.report("text of another type", where, "a string is expected: correct it", type(text).__name__)
        elif not encodable(text):
            self.report("not UTF-8", where, "correct its \\u escapes", "half of a surrogate pair")
        else:
            return True
        return False

    def missing_column(self, column: str, columns, where: str) -> None:
        self.report("missing column", where, f"set column to one of its own: {shortened(columns)}", repr(column))


def reason(error: Exception) -> str:
    """The message of an error on one line, without the file name that some hold."""
    return one_line(getattr(error, "strerror", None) or error)


def encodable(text: str) -> bool:
    """True if UTF-8 can encode the text; tokenizers crash on text that it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(names) -> str:
    """At most ten of the names, in words."""
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "(it has none)"


def read_plain(file: BinaryIO, path: Path, column: str, bad: BadRecords) -> Iterator[str]:
    """The whole file as one text."""
    content = file.read()
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad.report("not UTF-8", f"{path} line {line}", "convert the file to UTF-8", f"byte {error.start} of the file")
        return
    if not text.strip():
        bad.report("empty file", str(path), "give a file with text")
    elif bad.accepts(text, str(path)):
        yield text


def read_json_lines(file: BinaryIO, path: Path, column: str, bad: BadRecords) -> Iterator[str]:
    """The text of each line, which holds a JSON object; empty lines do not count."""
    filled = False
    for number, line in enumerate(file, 1):
        where = f"{path} line {number}"
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        filled = True
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad.report("not UTF-8", where, "convert the file to UTF-8", f"byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)
            bad.report("broken JSON", where, "repair the line: each must hold one JSON object", at)
        else:
            if not isinstance(record, dict):
                bad.report("no JSON object", where, "write one object per line", f"a {type(record).__name__}")
            elif column not in record:
                bad.missing_column(column, record, where)
            elif bad.accepts(record[column], where):
                yield record[column]
    if not filled:
        bad.report("empty file", str(path), "give a file with text")


def read_parquet(path: Path, column: str, bad: BadRecords) -> Iterator[str]:
    """The text of each row, from one column."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError("reading Parquet needs pyarrow, which is missing; run: pip install pyarrow") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if column not in columns:
                bad.missing_column(column, columns, str(path))
                return
            for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
                for scalar in batch.column(0):
                    row += 1
                    where = f"{path} row {row}"
                    try:
                        text = scalar.as_py()
                    except UnicodeDecodeError:
                        bad.report("not UTF-8", where, "write the file again from UTF-8 text")
                        continue
                    if bad.accepts(text, where):
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{path} after row {row}" if row else str(path)
        bad.report("unreadable file", where, "fetch or write it again", reason(error))
        return
    if row == 0:
        bad.report("empty file", str(path), "give a file with rows")


READERS = {".txt": read_plain, ".md": read_plain, ".jsonl": read_json_lines, ".json": read_json_lines}
SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS), ".parquet")


def known_suffix(path: Path) -> str | None:
    """The one of SUFFIXES that decides how the file is read, if it has one."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, column: str, bad: BadRecords) -> Iterator[str]:
    """
    The texts of one file, in order, read lazily. Null and blank texts are left out.

    Raises:
        ValueError: on the first record that is not text, with file and line, if `bad` refuses them.
    """
    suffix = known_suffix(path)
    try:
        if suffix is None:
            bad.report("unknown suffix", str(path), f"known are {', '.join(SUFFIXES)}")
        elif path.stat().st_size == 0:
            bad.report("empty file", str(path), "give a file with text")
        elif suffix == ".parquet":
            yield from read_parquet(path, column, bad)
        else:
            with (gzip.open if suffix.endswith(".gz") else open)(path, "rb") as file:
                yield from READERS[suffix.removesuffix(".gz")](file, path, column, bad)
    except (OSError, EOFError, zlib.error) as error:
        bad.report("unreadable file", str(path), "fetch or write it again", reason(error))
