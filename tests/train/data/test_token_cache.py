"""Tokens on disk are those of the tokenizer, written once, whole or not at all."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time

import numpy as np
import pytest

from dijiang.common.text import tokenizer_fingerprint
from dijiang.train.data import token_cache
from dijiang.train.data.sources import refuse_leaks
from dijiang.train.data.token_cache import tokenize
from dijiang.train.recipe.schema import DataConfig, SourceConfig

fork = multiprocessing.get_context("fork")


class Letters:
    """A tokenizer without Rust, so that it may be forked: a letter's code, plus `shift`."""

    def __init__(self, eos_token_id=1, shift=0, before=lambda texts: None):
        self.eos_token_id, self.shift, self.before, self.calls = eos_token_id, shift, before, 0

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        assert not add_special_tokens and not verbose
        self.calls += 1
        self.before(texts)
        return {"input_ids": [[ord(letter) + self.shift for letter in text if letter != "~"] for text in texts]}

    def get_vocab(self):
        return {chr(code): code + self.shift for code in range(128)}


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return SourceConfig(path=str(path))


def words(seed, count=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices("the cat sat\non mat and rat naïve".split(" "), k=rng.randint(1, 40))) for _ in range(count)]


@pytest.fixture
def run(tmp_path):
    """run(source, tokenizer, tokens_needed=None, progress=False, **data): tokenize with the cache in tmp_path / cache."""

    def call(source, tokenizer, *, tokens_needed=None, progress=False, **data):
        config = DataConfig(**({"train": [source], "cache": str(tmp_path / "cache")} | data))
        return tokenize(source, config, tokenizer, tokens_needed=tokens_needed, progress=progress)

    return call


def documents_of(file):
    return [part.tolist() for part in np.split(file.tokens, file.starts[1:])]


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_tokenizers_one_document_after_another(run, tmp_path, tokenizer, seed):
    texts = words(seed)
    file = run(write_documents(tmp_path / "a.jsonl", [None, *texts, " "]), tokenizer)
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert documents_of(file) == expected and len(file) == sum(map(len, expected))
    assert file.starts[0] == 0 and file.starts.dtype == np.int64 and file.tokens.dtype == np.uint16
    assert isinstance(file.tokens, np.memmap) and file.skipped == {"blank text": 2}
    assert os.path.getsize(file.folder / "tokens.bin") == 2 * len(file)


@pytest.mark.parametrize(("batch", "texts_at_once", "piece"), [(1, 1, 10**6), (50, 3, 17), (10**6, 1000, 30), (7, 1000, 50)])
def test_batches_and_pieces_do_not_show(run, tmp_path, tokenizer, monkeypatch, batch, texts_at_once, piece):
    texts = [" ".join(words(seed, 12)) for seed in range(4)] + words(9, 30)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", texts_at_once)
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", piece)
    file = run(write_documents(tmp_path / "a.jsonl", texts), tokenizer)
    assert documents_of(file) == [[*tokenizer(text, add_special_tokens=False)["input_ids"], 1] for text in texts]


def test_text_without_ends_of_words_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 10)
    for text in ("x" * 35, "x" * 10, " " * 25, "ab\n\n" * 9, ""):
        parts = list(token_cache.pieces(text))
        assert "".join(part for part, _ in parts) == text and max(len(part) for part, _ in parts) <= 10
        assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize(
    ("shift", "dtype"), [(0, "uint16"), (2**16 - 128, "uint16"), (2**16 - 127, "uint32"), (200_000, "uint32")]
)
def test_width_of_the_numbers(run, tmp_path, shift, dtype):
    file = run(write_documents(tmp_path / "a.jsonl", ["a\x7f"]), Letters(shift=shift))
    assert file.tokens.dtype == dtype and file.tokens.tolist() == [97 + shift, 127 + shift, 1]


def test_end_of_text_token(run, tmp_path):
    source = write_documents(tmp_path / "a.jsonl", ["ab", "~", "c"])  # of the middle one no token is left
    for eos, expected in ((None, [[97, 98], [99]]), (0, [[97, 98, 0], [99, 0]]), (70_000, [[97, 98, 70_000], [99, 70_000]])):
        file = run(source, Letters(eos))
        assert documents_of(file) == expected and file.skipped == {"text without tokens": 1}


def test_a_second_run_reads_what_the_first_wrote(run, tmp_path):
    source, tokenizer = write_documents(tmp_path / "a.jsonl", ["ab", "c"]), Letters()
    first = run(source, tokenizer)
    again = run(SourceConfig(path=source.path, weight=7.0), tokenizer, respect_documents=False)
    assert tokenizer.calls == 1 and again.folder == first.folder and again.tokens.tolist() == first.tokens.tolist()
    copy = pickle.loads(pickle.dumps(first))
    assert copy.tokens.tolist() == first.tokens.tolist() and len(pickle.dumps(first)) < 1000


def test_what_changes_the_tokens_tokenizes_again(run, tmp_path, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", ["ab", "c"])
    folders = [run(source, Letters()).folder, run(source, Letters(None)).folder, run(source, Letters(shift=3)).folder]
    folders += [run(source, tokenizer).folder, run(source, Letters(), bad_records="skip").folder]
    folders += [run(source, Letters(), tokens_needed=needed, streaming=True).folder for needed in (2, 3)]
    assert run(source, Letters(), tokens_needed=99).folder == folders[0], "without streaming the need plays no part"
    os.utime(source.path, ns=(1, 1))
    folders.append(run(source, Letters()).folder)
    assert len(set(folders)) == len(folders)
    assert sorted((tmp_path / "cache").iterdir()) == sorted(folders)


@pytest.mark.parametrize("needed", [1, 3, 4, 50, 10**6])
def test_streaming_stops_at_the_document_that_completes_the_need(run, tmp_path, monkeypatch, needed):
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 4)
    lengths = [2, 1, 5, 3, 1, 7, 2, 8, 9, 1, 2]
    tokenizer = Letters()
    file = run(
        write_documents(tmp_path / "a.jsonl", ["x" * n for n in lengths]), tokenizer, tokens_needed=needed, streaming=True
    )
    sums = np.cumsum(np.array(lengths) + 1)
    read = min(int(np.searchsorted(sums, needed)) + 1, len(lengths))
    assert len(file.starts) == read and len(file) == sums[read - 1]
    assert tokenizer.calls == -(-read // 4)


def test_streaming_stops_at_no_piece_of_a_document(run, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 1)
    file = run(write_documents(tmp_path / "a.jsonl", ["x" * 35, "y"]), Letters(), tokens_needed=5, streaming=True)
    assert documents_of(file) == [[*[ord("x")] * 35, 1]]


def test_streaming_does_not_meet_what_lies_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 1)
    source = write_documents(tmp_path / "a.jsonl", ["abc", "def", 7])
    assert len(run(source, Letters(), tokens_needed=6, streaming=True)) == 8
    with pytest.raises(ValueError, match="line 3: text of another type"):
        run(source, Letters(), tokens_needed=9, streaming=True)


def test_no_text(run, tmp_path):
    for texts in ([None, " "], ["~"]):
        with pytest.raises(ValueError, match=r"a\.jsonl holds no text") as caught:
            run(write_documents(tmp_path / "a.jsonl", texts), Letters())
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(ValueError, match=r"b\.csv holds no text; left out of .*: 1 unknown suffix \(first: .*b\.csv\)$"):
        run(SourceConfig(path=str(tmp_path / "b.csv")), Letters(), bad_records="skip")


def test_a_bad_record_late_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 1)
    source = write_documents(tmp_path / "a.jsonl", ["ab", "c", 7, "d"])
    with pytest.raises(ValueError, match="line 3"):
        run(source, Letters())
    assert not list((tmp_path / "cache").iterdir())
    file = run(source, Letters(), bad_records="skip")
    assert documents_of(file) == [[97, 98, 1], [99, 1], [100, 1]] and file.skipped == {"text of another type": 1}
    assert run(source, Letters(), bad_records="skip").skipped == {"text of another type": 1}


@pytest.mark.parametrize("damage", ["cut", "gone", "meta", "empty"])
def test_a_damaged_folder_is_written_again(run, tmp_path, damage):
    source = write_documents(tmp_path / "a.jsonl", ["ab", "c"])
    folder = run(source, Letters()).folder
    if damage == "cut":
        os.truncate(folder / "tokens.bin", 6)
    elif damage == "gone":
        (folder / "starts.bin").unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        for path in folder.iterdir():
            path.unlink()
    file = run(source, Letters())
    assert documents_of(file) == [[97, 98, 1], [99, 1]] and list((tmp_path / "cache").iterdir()) == [folder]


def test_default_folder(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "a.jsonl", ["ab"])
    data = DataConfig(train=[source])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for cache, folder in (("", tmp_path / "home/.cache"), (str(tmp_path / "xdg"), tmp_path / "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        file = tokenize(source, data, Letters(), tokens_needed=None, progress=False)
        assert file.folder.parent == folder / "dijiang/tokens"


def test_a_cache_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    source = write_documents(tmp_path / "a.jsonl", ["ab"])
    with pytest.raises(ValueError, match=r"cannot write tokens to .*file/cache \(Not a directory\); make room or set cache"):
        run(source, Letters(), cache=str(tmp_path / "file/cache"))


def test_progress_is_plain_lines_where_there_is_no_terminal(run, tmp_path, capsys):
    source = write_documents(tmp_path / "a[b].jsonl", ["ab", None, "c"])
    run(source, Letters(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2
    assert err.startswith(f"left out of {source.path}: 1 blank text (first: {source.path} line 2)\n")
    assert "tokenize a[b].jsonl: 5 tokens, 2 documents, " in err
    run(source, Letters(), progress=True)
    run(source, Letters(None), progress=False)
    assert capsys.readouterr() == ("", "")


def race(source, data, barrier, results):
    tokenizer = Letters(before=lambda texts: barrier.wait(20) if texts[0].startswith("a") else None)
    file = tokenize(source, data, tokenizer, tokens_needed=None, progress=False)
    results.put((documents_of(file), tokenizer.calls, os.stat(file.folder / "tokens.bin").st_ino))


def test_two_processes_at_once_both_end_well(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 1)
    source = write_documents(tmp_path / "a.jsonl", ["ab", "c"])
    data = DataConfig(train=[source], cache=str(tmp_path / "cache"))
    barrier, results = fork.Barrier(2), fork.Queue()  # both have begun to write before either continues
    processes = [fork.Process(target=race, args=(source, data, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    one, two = (results.get(timeout=30) for _ in processes)
    assert one == two and one[:2] == ([[97, 98, 1], [99, 1]], 2), "the same file too: what the first may have open stays"
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def write_forever(source, data, reached):
    def wait_at_the_second(texts):
        if texts[0] == "c":
            reached.set()
            time.sleep(60)

    tokenize(source, data, Letters(before=wait_at_the_second), tokens_needed=None, progress=False)


def test_a_killed_process_leaves_a_folder_that_is_removed_in_time(run, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_TEXTS", 1)
    source = write_documents(tmp_path / "a.jsonl", ["ab", "c", "d"])
    reached = fork.Event()
    process = fork.Process(
        target=write_forever, args=(source, DataConfig(train=[source], cache=str(tmp_path / "cache")), reached)
    )
    process.start()
    assert reached.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".partial") and (left / "tokens.bin").exists()
    folder = run(source, Letters()).folder
    assert documents_of(run(source, Letters())) == [[97, 98, 1], [99, 1], [100, 1]]
    assert sorted((tmp_path / "cache").iterdir()) == sorted([left, folder]), "it might still be written to"
    former = tmp_path / "cache" / "key.tmp-0123456789ab"  # as older versions called their drafts
    shutil.copytree(left, former)
    for path in (left, *left.iterdir(), *former.iterdir(), former):
        os.utime(path, (time.time() - 90_000,) * 2)
    os.utime(left / "tokens.bin")
    second = run(source, Letters(0)).folder
    assert left.exists(), "one of its files is young"
    assert not former.exists()
    os.utime(left / "tokens.bin", (time.time() - 90_000,) * 2)
    third = run(source, Letters(None)).folder
    assert sorted((tmp_path / "cache").iterdir()) == sorted([folder, second, third])


# --- folders of tokens as sources ---


@pytest.fixture
def folder(run, tmp_path):
    """A folder of tokens that `Letters()` made, outside the cache."""
    file = run(write_documents(tmp_path / "a.jsonl", words(0)), Letters())
    shutil.copytree(file.folder, tmp_path / "tokens")
    return tmp_path / "tokens"


def test_a_folder_of_tokens_is_a_source(run, folder):
    tokenizer = Letters()
    file = run(SourceConfig(path=str(folder)), tokenizer)
    assert file.folder == folder and tokenizer.calls == 0
    assert file.tokenizer == tokenizer_fingerprint(Letters()) == json.loads((folder / "meta.json").read_text())["tokenizer"]
    assert documents_of(file)[0] == [*map(ord, words(0)[0]), 1]


def test_a_folder_of_another_tokenizer_is_refused(run, folder):
    class Others(Letters):
        pass

    with pytest.raises(ValueError, match="tokens is of another tokenizer than the model's; tokenize its text"):
        run(SourceConfig(path=str(folder)), Others())


def test_a_folder_that_does_not_name_its_tokenizer_is_no_source_but_a_cache(run, folder, tmp_path):
    cached = next((tmp_path / "cache").iterdir())
    for tokens in (folder, cached):
        meta = json.loads((tokens / "meta.json").read_text())
        del meta["tokenizer"]
        (tokens / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="tokens does not say by which tokenizer; tokenize its text"):
        run(SourceConfig(path=str(folder)), Letters())
    unused = Letters()
    assert run(SourceConfig(path=str(tmp_path / "a.jsonl")), unused).folder == cached and not unused.calls


def test_a_damaged_folder_of_tokens_is_refused(run, folder):
    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"is not a whole folder of tokens .*; write it again from its text$"):
        run(SourceConfig(path=str(folder)), Letters())


def test_a_folder_of_tokens_is_not_trained_on_and_held_out(folder):
    source = SourceConfig(path=str(folder))
    with pytest.raises(ValueError, match="is held out and also trained on"):
        refuse_leaks(DataConfig(train=[source], held_out=[source]))
