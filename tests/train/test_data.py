"""Text files become blocks of tokens, and what is no text is refused."""

import pytest
import torch

from dijiang.common.text import read_text
from dijiang.train import token_blocks

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


def test_blocks_hold_the_tokenizers_output(write, tokenizer):
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = token_blocks(tokenizer, [write(TEXT)], 5)
    assert blocks.dtype == torch.int64 and blocks.shape == (len(ids) // 5, 5)
    assert blocks.flatten().tolist() == ids[: len(ids) // 5 * 5]
    assert tokenizer.decode(blocks.flatten()) == TEXT[: len(tokenizer.decode(blocks.flatten()))]


@pytest.mark.parametrize("block_size", [1, 3, 7, 20])
def test_no_token_is_lost_but_the_tail(write, tokenizer, block_size):
    files = [write(TEXT, "a.txt"), write("the mat\n", "b.txt"), write(TEXT, "c.txt")]
    stream = []
    for file in files:
        stream += [*tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = token_blocks(tokenizer, files, block_size)
    kept = blocks.flatten().tolist()
    assert kept == stream[: len(kept)] and 0 <= len(stream) - len(kept) < block_size
    assert blocks.is_contiguous() and blocks.shape[1] == block_size


class Wrapped:
    """A tokenizer with its own end of text, and a beginning that it adds unless told not to."""

    def __init__(self, tokenizer, eos_token_id: int | None):
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id

    def __call__(self, text, add_special_tokens=True, **kwargs):
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [self.tokenizer.bos_token_id, *ids] if add_special_tokens else ids}


def test_files_are_joined_by_the_end_of_text_token_if_there_is_one(write, tokenizer):
    files = [write("cat", "a.txt"), write("mat", "b.txt")]
    cat, mat = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("cat", "mat"))
    eos = tokenizer.eos_token_id
    assert token_blocks(tokenizer, files, 1).flatten().tolist() == [*cat, eos, *mat, eos]
    assert token_blocks(tokenizer, files[::-1], 1).flatten().tolist() == [*mat, eos, *cat, eos]
    assert token_blocks(Wrapped(tokenizer, 0), files, 1).flatten().tolist() == [*cat, 0, *mat, 0]
    assert token_blocks(Wrapped(tokenizer, None), files, 1).flatten().tolist() == [*cat, *mat]


def test_no_beginning_of_text_token_is_slipped_in(write, tokenizer):
    assert tokenizer.bos_token_id not in token_blocks(Wrapped(tokenizer, None), [write(TEXT)], 1)


def test_text_shorter_than_one_block(write, tmp_path, tokenizer, refused):
    one, two = write("cat", "a.txt"), write("mat", "b.txt")
    found = token_blocks(tokenizer, [one, two], 1).numel()
    assert token_blocks(tokenizer, [one, two], found).shape == (1, found)
    message = rf"a\.txt, .*b\.txt: {found} tokens do not fill one block of {found + 1}; give more text or a smaller block$"
    refused(tmp_path, lambda: token_blocks(tokenizer, [one, two], found + 1), message)


def test_one_bad_file_among_good_ones(write, tmp_path, tokenizer, refused):
    good = write(TEXT)
    refused(tmp_path, lambda: token_blocks(tokenizer, [good, tmp_path / "b.txt"], 4), r"cannot read .*b\.txt")
    bad = write(b"\xff", "b.txt")
    refused(tmp_path, lambda: token_blocks(tokenizer, [good, bad], 4), r"b\.txt is not UTF-8")
    refused(tmp_path, lambda: token_blocks(tokenizer, [], 4), r"^no data files given; name at least one text file$")


def test_text_longer_than_the_models_context_gives_no_warning(write, tokenizer, monkeypatch, caplog, capsys):
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    assert token_blocks(tokenizer, [write(TEXT)], 12).shape[1] == 12
    assert capsys.readouterr() == ("", "") and not caplog.records
