"""Results come back under the facts they were kept for, and no others."""

import pytest

from dijiang.common.result_cache import ResultCache, hash_of

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
