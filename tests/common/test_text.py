"""Text files are read as UTF-8, what is no text is refused by name, and tokenizers are told apart."""

import copy
import hashlib

import pytest

from dijiang.common.text import read_text, read_tokens, tokenizer_fingerprint

TEXT = "the cat sat on the mat, naïve as a café\nand the rat sat\n"


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> path of a file with these bytes, or with this text in UTF-8."""

    def make(content: bytes | str, name: str = "a.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def test_text_is_read_as_utf8_without_byte_order_mark(write):
    assert read_text(write(TEXT)) == TEXT
    assert read_text(write(b"\xef\xbb\xbf" + TEXT.encode())) == TEXT
    assert read_text(write("one\r\ntwo\r\n")) == "one\r\ntwo\r\n"


@pytest.mark.parametrize("content", ["", " \n\t\r\n ", "\ufeff", "\ufeff\n"])
def test_text_that_is_empty(write, tmp_path, refused, content):
    path = write(content)
    refused(tmp_path, lambda: read_text(path), r"a\.txt is empty; give a file with text$")


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (b"\xff", 0),
        (b"abc\xe9def", 3),
        ("café ".encode() + b"\xc3", 6),  # cut in the middle of a letter
        (b"\xef\xbb\xbfabc\xff", 6),
        ("naïve".encode("latin-1"), 2),
        ("text".encode("utf-16"), 0),
    ],
)
def test_text_that_is_not_utf8_names_the_first_wrong_byte(write, tmp_path, refused, content, position):
    path = write(content)
    refused(tmp_path, lambda: read_text(path), rf"a\.txt is not UTF-8 text \(byte {position}\); convert it to UTF-8$")


def test_text_that_cannot_be_read(tmp_path, refused):
    refused(tmp_path, lambda: read_text(tmp_path / "none.txt"), r"cannot read .*none\.txt: No such file or directory$")
    refused(tmp_path, lambda: read_text(tmp_path), r"cannot read .*: Is a directory$")


def test_tokens_have_no_special_ones_and_may_be_limited(write, tokenizer):
    class Beginning:
        """Begins a text with its special token unless it is told not to."""

        def __call__(self, text, add_special_tokens=True, **settings):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [tokenizer.bos_token_id, *ids] if add_special_tokens else ids}

    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert read_tokens(Beginning(), write(TEXT)) == ids
    assert read_tokens(tokenizer, write(TEXT), 5) == ids[:5]


def test_text_longer_than_the_models_context_gives_no_warning(write, tokenizer, monkeypatch, caplog, capsys):
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    assert len(read_tokens(tokenizer, write(TEXT))) > 8
    assert capsys.readouterr() == ("", "") and not caplog.records


def test_the_latest_call_of_a_tokenizer_is_no_part_of_it(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None and tokenizer_fingerprint(tokenizer) == before
    other = copy.deepcopy(tokenizer)
    assert tokenizer_fingerprint(other) == before
    other.add_tokens("zebra")
    assert tokenizer_fingerprint(other) != before


def test_the_fingerprint_is_the_one_in_token_caches_on_disk(tokenizer):
    """Another one would have every cached text tokenized again."""
    described = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2]
    assert tokenizer_fingerprint(tokenizer) == hashlib.sha256(described.encode()).hexdigest()

    class Letters:
        def get_vocab(self):
            return {"b": 1, "a": 0}

    assert tokenizer_fingerprint(Letters()) == hashlib.sha256(b'["Letters", [["a", 0], ["b", 1]]]').hexdigest()
