"""Documents come out of every format as they went in; what is no text is refused by name, or counted."""

import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dijiang.train.data.sources import Documents, local_files, public_source, refuse_leaks
from dijiang.train.recipe.schema import DataConfig, SourceConfig

TEXTS = ["the cat", "naïve café\nsecond line", "  “quoted” \U0001f600"]


def lines(texts, column="text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path of a new file below tmp_path, as text."""

    def make(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return make


def read(path, bad_records="error", **source):
    documents = Documents(SourceConfig(path=str(path), **source), bad_records)
    return list(documents), documents


def read_fails(path, message, **source):
    """Check that reading raises a ValueError whose message is one line and matches."""
    with pytest.raises(ValueError, match=message) as caught:
        read(path, **source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT", ".txt.gz", ".md.gz"])
def test_a_text_file_is_one_document(write, suffix):
    assert read(write(f"a{suffix}", "\ufeffone\r\n\r\ntwé\n".encode()))[0] == ["one\r\n\r\ntwé\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_json_lines_are_documents(write, suffix, end):
    content = b"\xef\xbb\xbf" + lines(TEXTS, "body").replace(b"\n", end) + end + b"  " + end  # empty lines do not count
    texts, documents = read(write(f"a{suffix}", content), column="body")
    assert texts == TEXTS and documents.skipped == {} and documents.describe_skipped() is None
    assert list(documents) == TEXTS


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_rows_are_documents(tmp_path, kind):
    column = pyarrow.array(TEXTS * 3)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write_parquet(tmp_path / "a.parquet", id=list(range(9)), body=column)
    assert read(tmp_path / "a.parquet", column="body")[0] == TEXTS * 3


def test_folders_and_globs(write, tmp_path, monkeypatch):
    for name in ("b/x.txt", "b/c/y.txt", "a.txt", "z.jsonl", ".hidden/n.txt", "b/.n.txt", "b/image.png"):
        write(name, lines([name]) if name.endswith("l") else name.encode())
    everything = ["a.txt", "b/c/y.txt", "b/x.txt", "z.jsonl"]
    assert read(tmp_path)[0] == read(f"{tmp_path}/")[0] == everything
    assert read(f"{tmp_path}/**/*.txt")[0] == everything[:3]
    assert read(f"{tmp_path}/b/*.txt")[0] == ["b/x.txt"]
    assert read(f"{tmp_path}/[az].*")[0] == ["a.txt", "z.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/b")[0] == everything[1:3] and read("~/b/**/*.txt")[0] == everything[1:3]
    write("odd[1].txt", b"brackets")
    assert read(tmp_path / "odd[1].txt")[0] == ["brackets"]


def test_null_and_blank_texts_are_left_out_and_counted(write, tmp_path):
    texts, documents = read(path := write("a.jsonl", lines(["one", None, " \n\t", "", "two"])))
    assert texts == ["one", "two"] and documents.skipped == {"blank text": 3}
    assert documents.describe_skipped() == f"left out of {path}: 3 blank text (first: {path} line 2)"
    list(documents)
    assert documents.skipped == {"blank text": 3}, "each pass counts from zero"
    write_parquet(tmp_path / "b.parquet", text=[None, "one", "", "two", None])
    texts, documents = read(tmp_path / "b.parquet")
    assert texts == ["one", "two"] and documents.skipped == {"blank text": 3}


GOOD = lines(["one", "two"])
BAD = {
    "cut line": (
        "a.jsonl",
        GOOD + b'{"text": "thr',
        "broken JSON",
        r"a\.jsonl line 3: broken JSON \(.*column 10\); repair",
        2,
    ),
    "broken line": ("a.json", b"{]\n" + GOOD, "broken JSON", r"a\.json line 1: broken JSON", 2),
    "too deep": ("a.jsonl", GOOD + b"[" * 100_000, "broken JSON", "line 3: broken JSON", 2),
    "long number": ("a.jsonl", GOOD + b'{"text": ' + b"9" * 5000 + b"}", "broken JSON", "line 3: broken JSON", 2),
    "list": ("a.json", b'["one", "two"]\n' + GOOD, "no JSON object", r"line 1: no JSON object \(a list\); write one", 2),
    "string": ("a.jsonl", GOOD + b'"three"\n', "no JSON object", r"line 3: no JSON object \(a str\)", 2),
    "other column": (
        "a.jsonl",
        GOOD + b'{"body": "x", "n": 1}',
        "missing column",
        r"line 3: missing column \('text'\);.*: body, n",
        2,
    ),
    "no column": ("a.jsonl", GOOD + b"{}", "missing column", r"line 3: missing column", 2),
    "number": ("a.jsonl", b'{"text": 7}\n' + GOOD, "text of another type", r"line 1: text of another type \(int\)", 2),
    "list of texts": ("a.jsonl", b'{"text": ["a"]}\n' + GOOD, "text of another type", r"\(list\)", 2),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, "not UTF-8", "line 1: not UTF-8", 2),
    "latin-1 line": ("a.jsonl", GOOD + '{"text": "café"}\n'.encode("latin-1"), "not UTF-8", r"line 3: not UTF-8 \(byte 13", 2),
    "utf-16": ("a.jsonl", '{"text": "one"}'.encode("utf-16"), "not UTF-8", r"line 1: not UTF-8 \(byte 0", 0),
    "latin-1 text": ("a.txt", b"one\ntw\xe9\n", "not UTF-8", r"a\.txt line 2: not UTF-8 \(byte 6 of the file\); convert", 0),
    "latin-1 .gz": ("a.txt.gz", b"one\ntw\xe9\n", "not UTF-8", r"a\.txt\.gz line 2: not UTF-8", 0),
    "empty": ("a.txt", b"", "empty file", r"a\.txt: empty file; give a file with text", 0),
    "white": ("a.md", b" \n\n", "empty file", r"a\.md: empty file", 0),
    "empty lines": ("a.jsonl", b"\n\n", "empty file", r"a\.jsonl: empty file", 0),
    "empty jsonl": ("a.jsonl", b"", "empty file", r"a\.jsonl: empty file", 0),
    "empty in .gz": ("a.jsonl.gz", b"", "empty file", r"a\.jsonl\.gz: empty file", 0),
    "empty parquet": ("a.parquet", b"", "empty file", r"a\.parquet: empty file", 0),
    "no parquet": ("a.parquet", b"PAR1 and so on", "unreadable file", r"a\.parquet: unreadable file \(.*\); fetch", 0),
    "suffix": ("a.csv", b"text\none\n", "unknown suffix", r"a\.csv: unknown suffix; known are \.txt.*\.parquet", 0),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_refused_by_name_or_counted(write, tmp_path, case):
    name, content, kind, message, good = BAD[case]
    path = write(f"bad/{name}", content)
    read_fails(path, message + ".*, or set bad_records to skip$")
    write("bad/z.txt", b"last")
    texts, documents = read(f"{tmp_path}/bad/*", bad_records="skip")
    assert texts == [*["one", "two"][:good], "last"]
    assert set(documents.skipped) == {kind} and f"{kind} (first: {path}" in documents.describe_skipped()


def test_cut_files(write, tmp_path):
    path = write("a.jsonl.gz", lines([os.urandom(30).hex() for _ in range(200)]))
    whole = read(path)[0]
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    read_fails(path, r"a\.jsonl\.gz: unreadable file \(.*end-of-stream")
    texts, documents = read(path, "skip")
    assert 0 < len(texts) < 200 and texts == whole[: len(texts)] and sum(documents.skipped.values()) == 1
    write("b.txt.gz", b"")
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip")
    read_fails(tmp_path / "b.txt.gz", r"b\.txt\.gz: unreadable file \(Not a gzipped file")
    write_parquet(tmp_path / "c.parquet", text=TEXTS * 50)
    content = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(content[: len(content) // 2])
    read_fails(tmp_path / "c.parquet", r"c\.parquet: unreadable file")
    (tmp_path / "c.parquet").write_bytes(content[:50] + b"\xff" * 200 + content[250:])  # the footer is whole, the pages not
    read_fails(tmp_path / "c.parquet", r"c\.parquet.*: unreadable file")


def test_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", id=[1, 2], body=["x", "y"])
    read_fails(tmp_path / "a.parquet", r"a\.parquet: missing column \('text'\); set column to one of its own: id, body")
    read_fails(tmp_path / "a.parquet", r"a\.parquet row 1: text of another type \(int\)", column="id")
    assert read(tmp_path / "a.parquet", "skip")[1].skipped == {"missing column": 1}
    write_parquet(tmp_path / "b.parquet", text=pyarrow.array([], pyarrow.string()))
    read_fails(tmp_path / "b.parquet", r"b\.parquet: empty file")
    wrong = pyarrow.StringArray.from_buffers(
        2, pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xe9b")
    )
    write_parquet(tmp_path / "c.parquet", text=wrong)
    read_fails(tmp_path / "c.parquet", r"c\.parquet row 2: not UTF-8")


@pytest.mark.parametrize("bad_records", ["error", "skip"])
def test_a_path_that_matches_nothing_is_always_refused(tmp_path, bad_records):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/image.png").write_bytes(b"x")
    for name, message in {
        "none.txt": r"none\.txt: no such file or folder",
        "none": "none: no such file or folder",
        "*.txt": r"\*\.txt matches no file",
        "empty": r"empty: no file in this folder ends in \.txt",
    }.items():
        with pytest.raises(ValueError, match=message):
            Documents(SourceConfig(path=str(tmp_path / name)), bad_records)
    with pytest.raises(ValueError, match=r"^data/none\.jsonl: no such file"):
        Documents(SourceConfig(path="data/none.jsonl"), bad_records)


def test_reading_needs_little_memory(tmp_path):
    text = "the cat sat on the mat " * 40
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for number in range(5_000):  # 5 MB
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    documents = Documents(SourceConfig(path=str(tmp_path / "a.jsonl")), "error")
    tracemalloc.start()
    assert sum(1 for _ in documents) == 5_000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_fingerprint_depends_on_what_the_documents_depend_on(write, tmp_path):
    path = write("a/a.txt", b"one")
    write("a/b.txt", b"two")

    def fingerprint(path=tmp_path / "a", **source):
        return Documents(SourceConfig(path=str(path), **source), "error").fingerprint()

    first = fingerprint()
    assert first == fingerprint() == fingerprint(f"{tmp_path}/a/*") == fingerprint(weight=3.0)
    assert len({first, fingerprint(column="body"), fingerprint(path)}) == 3
    os.utime(path, ns=(1, 1))
    touched = fingerprint()
    write("a/c.txt", b"three")
    added = fingerprint()
    (tmp_path / "a/c.txt").rename(tmp_path / "a/d.txt")
    assert len({first, touched, added, fingerprint()}) == 4


@pytest.fixture
def hub(monkeypatch):
    """hub(rows) lets the hub have the data set org/set; returns the arguments of the calls to come."""
    calls = []

    def serve(rows):
        def load_dataset(path, subset, split, streaming, revision):
            calls.append((path, subset, {"split": split, "streaming": streaming, "revision": revision}))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: type("Info", (), {"sha": "abc"}))
    return serve


def test_a_hub_data_set_is_streamed(hub):
    rows = datasets.Dataset.from_dict({"id": [0, 1, 2, 3], "body": ["one", None, "", "two"]}).to_iterable_dataset()
    calls = hub(rows)
    texts, documents = read("org/set", column="body", subset="en", split="validation")
    assert texts == ["one", "two"] and documents.skipped == {"blank text": 2}
    assert calls == [("org/set", "en", {"split": "validation", "streaming": True, "revision": "abc"})]
    assert documents.describe_skipped().endswith("(first: org/set split validation row 2)")
    read_fails("org/set", "org/set split train row 1: missing column 'text'; set column to one of its own: id, body$")
    read_fails("org/set", r"org/set split train row 1: text of another type \(int\)", column="id")
    read("org/set", "skip", column="id")
    prints = [
        Documents(SourceConfig(path="org/set", **keys), "error").fingerprint()
        for keys in ({}, {"subset": "en"}, {"split": "a"})
    ]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("bad_records", ["error", "skip"])
def test_a_hub_that_breaks_off_is_never_a_bad_record(hub, bad_records):
    def break_off(row):
        if row["text"] == "two":
            raise ConnectionError("gone\naway")
        return row

    hub(datasets.Dataset.from_dict({"text": ["one", "two"]}).to_iterable_dataset().map(break_off))
    documents = iter(Documents(SourceConfig(path="org/set"), bad_records))
    assert next(documents) == "one"
    with pytest.raises(ValueError, match=r"^reading org/set from the hub broke off after row 1: gone away$"):
        next(documents)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    for module in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(module, True)
    read_fails(
        "none/such", "^none/such is neither a file, folder or glob here, nor did the hub give its split train: Couldn't reach"
    )
    read_fails("nosuch", r"^nosuch \(subset en\) is neither a file", subset="en")
    assert local_files("org/set") is None


def test_held_out_text_that_is_trained_on(write, tmp_path):
    def check(train, held_out):
        refuse_leaks(
            DataConfig(train=[SourceConfig(**keys) for keys in train], held_out=[SourceConfig(**keys) for keys in held_out])
        )

    one, two = write("a/one.txt", b"one"), write("a/two.txt", b"two")
    os.link(one, tmp_path / "linked.txt")
    os.symlink(one, tmp_path / "symbolic.txt")
    hub = {"path": "org/set", "subset": "en"}
    check([{"path": one}, hub], [{"path": two}, hub | {"split": "test"}, {"path": "org/set"}])
    for held_out in (
        tmp_path / "a",
        f"{tmp_path}/*/o*.txt",
        f"{tmp_path}/a/../a/one.txt",
        tmp_path / "linked.txt",
        tmp_path / "symbolic.txt",
    ):
        with pytest.raises(ValueError, match=r"is held out and also trained on.*; take it out of one of the two$"):
            check([{"path": two}, {"path": one}], [{"path": str(held_out)}])
    with pytest.raises(ValueError, match=r"^split train of org/set is held out and also trained on; take"):
        check([hub], [hub | {"column": "other"}])


def test_a_record_names_no_folders_of_the_machine(write, tmp_path, monkeypatch):
    assert public_source(write("books/one.txt", b"one")) == "one.txt"
    assert public_source(str(tmp_path / "books")) == "books"
    assert public_source(f"{tmp_path}/books/**/*.txt") == "books/**/*.txt"
    assert public_source("org/set") == "org/set" and public_source("*.txt") == "*.txt" and public_source("/*.txt") == "*.txt"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert public_source("~/*.txt") == "*.txt"
