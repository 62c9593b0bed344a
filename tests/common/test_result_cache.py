"""Results come back under the facts they were kept for, and no others; code is known by its fingerprint."""

import pytest

from dijiang.common.result_cache import ResultCache, code_fingerprint, hash_of

FACTS = {"kind": "perplexity", "settings": {"length": 8, "hash": "ab"}, "model": {"weights": {"model.safetensors": "cd"}}}


@pytest.fixture
def cache(tmp_path):
    return ResultCache(tmp_path / "deep" / "cache")


def test_a_result_comes_back(cache):
    result = {"totals": [0.1, 2.0], "weights": [1.0, 3.0]}
    assert cache.get(FACTS) is None and not cache.folder.exists()
    cache.put(FACTS, result)
    assert cache.get(dict(reversed(FACTS.items()))) == result  # whatever the order of keys
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "other", [FACTS | {"kind": "recall"}, FACTS | {"settings": {"length": 9, "hash": "ab"}}, FACTS | {"x": 1}]
)
def test_other_facts_do_not_get_it(cache, other):
    cache.put(FACTS, {"totals": []})
    assert cache.get(other) is None


@pytest.mark.parametrize("content", ["", '{"result": {"totals": [1', "[]", "\xff"])
def test_a_broken_file_counts_as_none(cache, content):
    cache.put(FACTS, {"totals": []})
    cache.path(FACTS).write_bytes(content.encode("latin-1"))
    assert cache.get(FACTS) is None
    cache.put(FACTS, {"totals": [1]})
    assert cache.get(FACTS) == {"totals": [1]}


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache .*file is a file; choose a folder"):
        ResultCache(tmp_path / "file")


def test_parts_do_not_run_together():
    assert hash_of(b"ab", b"c") != hash_of(b"a", b"bc") != hash_of(b"abc")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an importable package `measured_code` with a module and a sub-package."""
    folder = tmp_path / "measured_code"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "one.py", "inner/__init__.py", "inner/two.py"):
        (folder / name).write_text(f"a = '{name}'", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("changed", ["one.py", "inner/two.py", "__init__.py"])
def test_any_changed_file_changes_the_fingerprint(package, changed):
    before = code_fingerprint("measured_code")
    assert code_fingerprint("measured_code") == before
    (package / changed).write_text("a = 2", encoding="utf-8")
    assert code_fingerprint("measured_code") != before


def test_new_and_renamed_files_change_the_fingerprint(package):
    before = code_fingerprint("measured_code")
    (package / "one.py").rename(package / "other.py")
    renamed = code_fingerprint("measured_code")
    (package / "three.py").touch()
    assert len({before, renamed, code_fingerprint("measured_code")}) == 3


def test_files_that_are_no_code_of_the_packages_change_nothing(package):
    before = code_fingerprint("measured_code.one", "measured_code.inner")
    (package / "notes.txt").write_text("b", encoding="utf-8")
    (package / "__init__.py").write_text("b = 1", encoding="utf-8")
    assert code_fingerprint("measured_code.one", "measured_code.inner") == before
    (package / "one.py").write_text("b = 1", encoding="utf-8")
    assert code_fingerprint("measured_code.one", "measured_code.inner") != before
