import gzip
import json
import subprocess
import zipfile
from pathlib import Path

import corpus
import corpus_packages
import prose
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from dijiang.train.data.token_cache import TokenFile


def sentence(number: int) -> str:
    return f"This is paragraph number {number}, and it is long enough to be taken for prose, of which there is no more to say."


def page(*numbers: int) -> str:
    return "\n".join(sentence(number) for number in numbers)


def name_where(wanted: bool) -> str:
    return next(name for number in range(100) if prose.held_out(name := f"page{number}.html") is wanted)


HELD, KEPT = name_where(True), name_where(False)


def training(*sources, also_held=()):
    return list(corpus.training_documents(list(sources), also_held))


def test_paragraphs_are_taken_once_over_all_sources():
    first = corpus.Source(name="a", pages=[("x", page(*range(10)))])
    louder = page(*range(5, 20)).replace("paragraph number", "PARAGRAPH  number")
    second = corpus.Source(name="b", pages=[("y", louder), ("z", page(*range(10, 20)))])
    documents = training(first, second)
    lines = [line for _, _, text in documents for line in text.split("\n")]
    assert len(lines) == 20
    assert [source for source, _, _ in documents] == ["a", "b"]  # the page of which nothing is left is gone


def test_no_held_out_paragraph_is_in_training_whichever_source_comes_first():
    plain = corpus.Source(name="a", pages=[("x", page(*range(20)))])
    split = corpus.Source(name="b", held="b", pages=[(HELD, page(*range(6, 15))), (KEPT, page(*range(14, 30)))])
    also = page(3, 29)
    for order in ([plain, split], [split, plain]):
        lines = {line for _, _, text in training(*order, also_held=[also]) for line in text.split("\n")}
        assert lines == {sentence(n) for n in (0, 1, 2, 4, 5, *range(15, 29))}
    assert corpus.held_pages(split) == [page(*range(6, 15))]
    assert corpus.held_pages(plain) == []


def test_what_is_no_english_prose_is_left_out():
    german = (
        "Dies ist ein Absatz, der lang genug wäre, um genommen zu werden, wenn er nicht in einer anderen Sprache stünde. " * 5
    )
    numbers = "0x1f 0x2e 17.4 18.2 99.1 " * 40
    assert training(corpus.Source(name="a", pages=[("x", f"{german}\n{numbers}\n{page(*range(8))}")]))[0][2] == page(*range(8))


def test_long_pages_are_cut_between_paragraphs():
    numbers = range(3 * corpus.MAX_DOCUMENT // len(sentence(100)))
    documents = training(corpus.Source(name="a", pages=[("x", page(*numbers))]))
    assert len(documents) == 4 or len(documents) == 3
    assert all(len(text) <= corpus.MAX_DOCUMENT for _, _, text in documents)
    assert "\n".join(text for _, _, text in documents) == page(*numbers)


def test_any_beginning_of_the_corpus_is_a_mixture():
    documents = [(source, str(number), "text") for source in "ab" for number in range(200)]
    mixed = corpus.shuffled(documents)
    assert mixed == corpus.shuffled(reversed(documents))
    assert 10 < sum(source == "a" for source, _ in mixed[:40]) < 30


def test_token_folders_are_the_training_s_and_the_same_twice(tmp_path):
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([page(*range(9))], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")
    texts = [page(1, 2), page(3), page(4, 5, 6)]
    counts = corpus.write_token_folder(tmp_path / "1/corpus/held/x", texts, tokenizer)
    corpus.write_token_folder(tmp_path / "2/corpus/held/x", texts, tokenizer)
    for name in ("tokens.bin", "starts.bin", "meta.json"):
        assert (tmp_path / "1/corpus/held/x" / name).read_bytes() == (tmp_path / "2/corpus/held/x" / name).read_bytes()
    file = TokenFile(tmp_path / "1/corpus/held/x")
    assert file.tokens.dtype == "uint16" and sum(counts) == len(file)
    ends = [*file.starts[1:], len(file)]
    for text, start, end in zip(texts, file.starts, ends, strict=True):
        assert file.tokens[end - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(file.tokens[start : end - 1]) == text
    assert len(corpus.write_token_folder(tmp_path / "short", texts, tokenizer, limit=counts[0] + 1)) == 2
    assert str(tmp_path) not in (tmp_path / "1/corpus/held/x/meta.json").read_text()


READ = {  # reader: (what a page holds, what must not be read, the page)
    "page.html": (
        sentence(1),
        "secret",
        f"<head>{sentence(8)} secret</head><p>{sentence(1)}</p><pre>{sentence(2)} secret</pre>",
    ),
    "page.page": (sentence(1), "secret", f"<page><p>{sentence(1)}</p><screen>{sentence(2)} secret</screen></page>"),
    "page.md.gz": (sentence(1), "](", f"# Title\n\n{sentence(1)} [a link](http://x)\n"),
    "page.pod": (
        sentence(1),
        "secret",
        f"=head1 A\n\n{sentence(1)}\n\n    {sentence(2)} secret\n\n=cut\n\n{sentence(3)} secret\n",
    ),
    "page.7": (sentence(1), "secret", f".TH A 7\n.SH B\n{sentence(1)}\n.PP\n.nf\n{sentence(2)} secret\n.fi\n"),
    "page.txt": (sentence(1), "secret", f"{sentence(3)}\n\n{sentence(1)}\n\n        {sentence(2)} secret\n"),
    "page.cfg": (sentence(1), "secret", f'[message]\nid="{sentence(2)} secret"\nmessage= _ "{sentence(1)}"\n'),
    "page.json": (sentence(1), "secret", json.dumps({"a": [{"documentation": f"<p>{sentence(1)}</p>", "b": "secret"}]})),
}


@pytest.mark.parametrize("name", READ)
def test_readers_take_the_prose_and_leave_code(name):
    wanted, unwanted, text = READ[name]
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    read = prose.READERS[prose.suffix(name)](prose.decoded(content, name))
    assert wanted in read and unwanted not in read


def test_roff_fonts_and_escapes_are_taken_off():
    text = ".PP\nThe\n.BR read (2)\nsystem call \\fIdoes\\fP what its manual page says \\- and one reads all of it.\n"
    assert prose.from_roff(text).startswith("The read(2) system call does what its manual page says - and one reads")


def package(name="thing", patterns=corpus_packages.DEFAULT_PATTERNS, **fields):
    return corpus_packages.Package(
        **{"kind": "wheel", "name": name, "version": "1", "sha256": "-", "held": "", "patterns": patterns} | fields
    )


def test_pages_of_a_wheel_by_language_and_licence(tmp_path):
    path = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("doc/a.html", "doc/fr/b.html", "doc/c.de.html", "doc/genindex.html", "doc/en/d.html"):
            archive.writestr(name, f"<p>{'</p><p>'.join(sentence(n) for n in range(9))}</p>")
        archive.writestr("thing-1.dist-info/METADATA", "Name: thing\nLicense-Expression: MIT\n")
    pages, licence = corpus_packages.read_package(package(), path)
    assert [name for name, _ in pages] == ["doc/a.html", "doc/en/d.html"]
    assert corpus_packages.license_names(licence) == "MIT"


def test_a_package_is_kept_to_its_limit_by_the_same_pages(tmp_path, monkeypatch):
    path = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.html", f"<p>{'</p><p>'.join(sentence(number * 10 + n) for n in range(9))}</p>")
    monkeypatch.setattr(corpus_packages, "MAX_CHARACTERS", 5_000)
    pages, _ = corpus_packages.read_package(package(), path)
    assert 3 < len(pages) < 8 and pages == corpus_packages.read_package(package(), path)[0]


def test_a_version_that_is_gone_and_a_file_that_changed_are_one_line(tmp_path, monkeypatch):
    wanted = package(kind="deb", version="1.0", sha256="0" * 64)
    gone = subprocess.CompletedProcess([], 100, "", "E: Version '1.0' for 'thing' was not found\n")
    monkeypatch.setattr(corpus_packages.subprocess, "run", lambda *arguments, **options: gone)
    with pytest.raises(
        ValueError, match=r"thing 1\.0 cannot be downloaded; if that version is no longer offered.*pin.*not found"
    ):
        corpus_packages.fetch(wanted, tmp_path)

    def another(*arguments, cwd, **options):
        (cwd / "thing_1.0_all.deb").write_bytes(b"another build")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(corpus_packages.subprocess, "run", another)
    with pytest.raises(ValueError, match=r"thing_1\.0_all\.deb has SHA-256 .*, and the list says 0000000000000000"):
        corpus_packages.fetch(wanted, tmp_path)
    assert not list(tmp_path.iterdir())  # it is not taken the next time


def test_the_list_is_read_and_written_without_change(tmp_path):
    listed = Path(corpus_packages.__file__).parent / "gpu" / "packages.tsv"
    packages = corpus_packages.read_list(listed)
    copy = tmp_path / "packages.tsv"
    copy.write_bytes(listed.read_bytes())
    corpus_packages.write_list(copy, packages)
    assert copy.read_bytes() == listed.read_bytes()
    assert all(len(package.sha256) == 64 and package.version != "-" for package in packages)
    copy.write_text("deb only-a-name\n")
    with pytest.raises(ValueError, match=r"packages\.tsv, line 1: expected kind"):
        corpus_packages.read_list(copy)


def test_licenses():
    text = "Files: *\nLicense: GPL-2+\n\nFiles: doc/*\nLicense: GFDL-1.3+\n\nLicense: GPL-2+\n text\n"
    assert corpus_packages.license_names(text) == "GPL-2+, GFDL-1.3+"
    assert corpus_packages.license_names("may be used under the GNU General\nPublic License") == "GPL"
