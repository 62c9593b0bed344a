"""
The documentation: every command and snippet runs as written, with tiny stand-ins for the files and models it names; every link
and figure exists; the site builds without warnings and fetches nothing from elsewhere.
"""

import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from dijiang_testing.doc_commands import (
    LAUNCHERS,
    ROOT,
    blocks,
    exit_code,
    run_without_package,
    shell_lines,
    titled_blocks,
    write_text,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dijiang import cli
from dijiang.convert import convert_model
from dijiang.evaluate.latency.timing import machine_limits
from dijiang.train import load_recipe
from dijiang.train.__main__ import parse_arguments

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
ROOT_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # the hook adds them to the site
WITH_COMMANDS = [name for name, page in PAGES.items() if any(words[0] == "dijiang" for words in shell_lines(page))]
TEACHER = "HuggingFaceTB/SmolLM2-135M"
STUDENT = "smollm2-recovered/distill/model"
VOCAB = 1024

STAGE = {"tokens": 1024, "block_size": 256, "start_block_size": "null"}
BUDGET = [f"{stage}.{key}={value}" for stage in ("align", "distill") for key, value in STAGE.items()]
BUDGET.append("data.held_out_tokens=1024")
FEW = (
    "lengths=[48]", "text_tokens=200", "recall_kinds=[needle]", "recall_lengths=[128]", "recall_samples=1", "windows=false",
    "controls=[]", "scores=[random]", "score_heads=[0]", "score_slots=[8]", "large_heads=[]", "reference_length=64",
)  # fmt: skip
FEW_CELLS = [word for setting in FEW for word in ("--set", setting)]
# words that are added to a command or replaced in it, so that it takes seconds, by its first words
SMALLER = {
    "recover": (
        [word for setting in BUDGET for word in ("--set", setting)],
        {f"{key}=48": f"{key}=4" for key in ("distill.batch_size", "run.micro_batch_size")},
    ),
    "benchmark kernels": (["--quick", "--model", TEACHER, "--features", "3", "--features", "8"], {}),
    "benchmark latency": (["--rounds", "1", "--phases", "decode"], {"pythia-410m": "pythia-70m", "2048": "64", "512": "32"}),
    f"convert {TEACHER} smollm2-ready": (["--heads", "1"], {}),
    "select": (["--set", "samples=1"], {"7": "1"}),
    "fit": (["--text-tokens", "1024", "--set", "block_size=512", "--set", "recall_samples=1", "--set", "steps=20"], {}),
    "benchmark recall": ([TEACHER, "--cache", "cache", "--heads", "1", "--slots", "0", *FEW_CELLS], {}),
    "prune": (["--samples", "4", "--length", "64", "--cache", "cache"], {}),
    # there is no hub here to give the tasks' data
    "evaluate": (["--quick", "--cache", "cache"], {"paper": "capitals.yaml"}),
}
SLOW = {"--shape", "run.micro_batch_size=48"}  # even small Pythias take a while, as does one more recovery


def made_smaller(words: list[str]) -> list[str]:
    line = " ".join(words)
    for start, (added, replaced) in SMALLER.items():
        if line.startswith(start):
            return [replaced.get(word, word) for word in words] + added
    return words


@pytest.fixture(scope="module")
def tokenizer():
    """A larger tokenizer than the common one, which has too few words of one token for the recall tasks."""
    words = [f"{consonant}{vowel}" * 2 for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([" ".join(["the cat sat on mat and rat", *words])] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def stand_ins(make_source, tmp_path):
    """stand_ins(page): a folder with tiny models, texts and a recipe under the names that the page uses."""

    def make(name: str) -> Path:
        make_source(name=TEACHER, vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=8192)
        make_source("gpt_neox", name="EleutherAI/pythia-160m", vocab_size=VOCAB)
        make_source("gpt_neox", name="EleutherAI/pythia-70m", vocab_size=VOCAB, num_hidden_layers=6)
        make_source(name="my-model", vocab_size=VOCAB)
        for seed, path in enumerate(("book.txt", "other.txt", "books/one.txt", "books/two.txt", "held_out.txt")):
            write_text(tmp_path / path, seed)
        recipe = yaml.safe_load((ROOT / "configs" / "recipes" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
        recipe["data"] = {"train": ["book.txt"], "held_out": ["other.txt"]}
        (tmp_path / "RECIPE").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        for path, content in titled_blocks(PAGES[name]).items():
            (tmp_path / path).write_text(content, encoding="utf-8")
        for folder in ("benchmarks/results", "docs"):
            (tmp_path / folder).mkdir(parents=True)
        if name in ("evaluation", "versions"):
            settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
            convert_model(tmp_path / TEACHER, tmp_path / STUDENT, progress=False, **settings)
        return tmp_path

    return make


@pytest.fixture
def command(monkeypatch):
    """command(words): run `dijiang ...` in this process, offline; it must succeed."""
    monkeypatch.setattr("dijiang.evaluate.latency.measure.machine_limits", partial(machine_limits, quick=True))

    def call(words: list[str]) -> None:
        assert not exit_code(words, monkeypatch), words

    return call


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_and_snippets_work_as_written(name, command, stand_ins, monkeypatch):
    folder = stand_ins(name)
    monkeypatch.chdir(folder)
    for words in shell_lines(PAGES[name]):
        if words[0] == "dijiang" and not SLOW & set(words):
            command(made_smaller(words[1:]))
    for snippet in blocks(PAGES[name], "python"):
        if re.search(r"^(import|from) dijiang", snippet, flags=re.MULTILINE):
            exec(compile(snippet, f"docs/{name}.md", "exec"), {})
        else:
            assert run_without_package(snippet, folder)


WITH_SLOW = [name for name in WITH_COMMANDS if any(SLOW & set(words) for words in shell_lines(PAGES[name]))]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW)
def test_slow_commands_work_as_written(name, command, stand_ins, monkeypatch):
    monkeypatch.chdir(stand_ins(name))
    for words in shell_lines(PAGES[name]):
        if SLOW & set(words):
            command(made_smaller(words[1:]))


def test_pages_without_commands_have_no_snippets():
    tested = {*WITH_COMMANDS, "extending"}  # extending.md has tests of its own
    assert all(not blocks(page, "python") for name, page in PAGES.items() if name not in tested)


def test_every_shell_line_is_of_a_kind_that_is_tested():
    for page in PAGES.values():
        for words in shell_lines(page):
            if words[0] == "pip":
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert words[:2] == ["pip", "install"]
                assert set(re.fullmatch(r"\.\[(.+)\]", words[2])[1].split(",")) <= extras.keys()
            elif words[0] in LAUNCHERS:
                arguments = parse_arguments(words[words.index("dijiang.train") + 1 :])
                recipe = "smollm2-135m" if arguments.recipe == "RECIPE" else arguments.recipe
                assert load_recipe(recipe, arguments.set).stages == ["align", "distill"]
            else:
                assert words[0] == "dijiang", words


def test_commands_named_in_the_text_exist():
    root = typer.main.get_command(cli.app)
    spans = [span.split() for page in PAGES.values() for span in re.findall(r"`((?:dijiang|python|make) [^`\n]+)`", page)]
    assert len(spans) > 10
    for program, *words in spans:
        if program == "python":
            assert (ROOT / words[0]).is_file() or words[:2] == ["-m", "dijiang.train"], words
            continue
        if program == "make":
            assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            continue
        command = root
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words


def test_options_named_in_the_text_exist():
    root = typer.main.get_command(cli.app)

    def options(command) -> set[str]:
        inner = getattr(command, "commands", {}).values()
        return {word for parameter in command.params for word in parameter.opts}.union(*map(options, inner))

    known = {*options(root), "--help"}
    for name, page in PAGES.items():
        assert set(re.findall(r"`(--[a-z-]+)", page)) <= known, name


def test_links_and_figures_exist():
    for name, page in PAGES.items():
        targets = re.findall(r"\]\((?!https?:)([^)]+)\)", page)
        for target in targets:
            path, _, anchor = target.partition("#")
            assert (DOCS / path).is_file(), f"{name}: {target}"
            assert not anchor or path == "api.md", f"{name}: {target}"  # the site's build checks those


def test_the_glossary_defines_each_word_once_in_alphabetical_order():
    sections = PAGES["glossary"].split("\n## ")[1:]
    words = [re.findall(r"^\| ([^|]+) \| (?!meaning|---)", section, flags=re.MULTILINE) for section in sections]
    assert len(words) == 5 and all(section == sorted(section, key=str.lower) for section in words)
    assert sum(map(len, words)) == len(set().union(*words)) > 50


# --- the site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `mkdocs build --strict` builds it, which fails on any warning."""
    folder = tmp_path_factory.mktemp("site")
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


class References(HTMLParser):
    """References of a page: what the browser fetches (`fetched`), `links`, its own `ids`, and the `styles` within it."""

    def __init__(self, html: str):
        super().__init__()
        self.fetched, self.links, self.ids, self.styles = [], [], set(), []
        self.inside = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.inside = tag
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values["href"])
        elif values.get("src"):
            self.fetched.append(values["src"])
        self.styles.append(values.get("style") or "")

    def handle_data(self, data):
        if self.inside in ("style", "script"):
            self.styles.append(data)


def test_site_has_every_page_and_leaves_the_hook_out(site):
    expected = {*PAGES, *(name.lower().removesuffix(".md") for name in ROOT_PAGES)}
    assert {path.stem for path in site.glob("*.html")} == {*expected, "404"}
    assert not list(site.rglob("*.py")) and not list(site.rglob("*.pyc"))
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = [entry for group in navigation for entries in group.values() for entry in entries]
    assert sorted(file for entry in entries for file in entry.values()) == sorted(f"{name}.md" for name in expected)


def test_reading_the_site_fetches_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        page = References(path.read_text(encoding="utf-8"))
        assert page.fetched
        for reference in page.fetched:
            assert not urlsplit(reference).netloc, f"{path.name} fetches {reference}"
        assert not [style for style in page.styles if re.search(r"url\(\s*['\"]?(https?:)?//|@import", style)]
        assert "mermaid" not in page.ids and 'class="mermaid"' not in path.read_text(encoding="utf-8")
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path.name


def test_links_of_the_site_lead_somewhere(site):
    pages = {path.name: References(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    for name, page in pages.items():
        if name == "404.html":  # its links are absolute, since it is shown at any address
            continue
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(parts.path) or name
            assert (site / target).exists(), f"{name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__top"}, f"{name} links to {link}"


def test_results_that_pages_quote_are_part_of_the_site(site):
    quoted = {target for page in PAGES.values() for target in re.findall(r"\]\(\.\./([^)]+\.json)\)", page)}
    assert len(quoted) >= 5
    for target in quoted:
        assert (site / "repository" / target).read_bytes() == (ROOT / target).read_bytes()


@pytest.mark.parametrize("room", ["modeling", "convert", "train", "evaluate", "compress"])
def test_api_reference_has_every_public_name(site, room):
    ids = References((site / "api.html").read_text(encoding="utf-8")).ids
    module = import_module(f"dijiang.{room}")
    documented = {name.rpartition(".")[2] for name in ids if name.startswith((f"dijiang.{room}.", "dijiang.common."))}
    assert set(module.__all__) <= documented, f"not in docs/api.md: {sorted(set(module.__all__) - documented)}"


# --- files that hosts and package indexes read ---


def test_the_recipe_for_recall_loads(tmp_path):
    (page,) = blocks(PAGES["recovery"], "yaml")
    (tmp_path / "recipe.yaml").write_text(f"source: a\noutput: b\n{page}", encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.recall.lengths == (512, 1024) and recipe.distill.least_memory == 0.5 and recipe.stages == ["distill"]


def test_citation_and_templates_are_valid_and_up_to_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"], citation["version"], citation["license"]) == tuple(
        project[key] for key in ("name", "version", "license")
    )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{project['version']}] - {citation['date-released']}\n" in changelog
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys(), path.name
        assert all(field["type"] in ("textarea", "dropdown") and field["attributes"]["label"] for field in form["body"])
