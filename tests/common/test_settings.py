"""Settings from YAML, KEY=VALUE words and options; each mistake is one line that names the key."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from dijiang.common import settings
from dijiang.common.settings import describe, load_settings


@dataclass(frozen=True, kw_only=True)
class Part:
    """
    A part.

    Attributes:
        path: of it.
        weight: share, in
            two lines.
    """

    SHORTHAND: ClassVar[str] = "path"

    path: str
    weight: float = 1.0


@settings.accepts_former_names
@dataclass(frozen=True, kw_only=True)
class Whole:
    """
    A whole.

    Attributes:
        name: what it is called.
        size: how large.
        rate: how fast, 1/s.
        kind: one of two.
        files: where it is.
        pair: two numbers.
        parts: what it holds.
        limit: None for no limit.
    """

    RENAMED: ClassVar[dict[str, str]] = {"speed": "rate"}

    name: str
    size: int = 3
    rate: float = 0.5
    kind: Literal["round", "square"] = "round"
    files: tuple[Path, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    parts: list[Part] = field(default_factory=list)
    limit: int | None = 7
    area: int = field(init=False, default=0)


def load(text: str | None = None, *words: str, folder: Path | None = None, **flags) -> Whole:
    if text is None:
        return load_settings(Whole, None, words, flags)
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return load_settings(Whole, path, words, flags)


def test_file_words_flags_and_defaults_in_this_order(tmp_path):
    text = "name: a\nsize: 1\nrate: 1e-3\nparts: [x.txt, {path: y.txt, weight: 2}]\nfiles: [a.txt, b.txt]\npair: [1, 2e1]\n"
    whole = load(text, "size=2", "parts.0.weight=3", "limit=null", folder=tmp_path, kind="square")
    assert whole == Whole(
        name="a",
        size=2,
        rate=1e-3,
        kind="square",
        files=(Path("a.txt"), Path("b.txt")),
        pair=(1.0, 20.0),
        parts=[Part(path="x.txt", weight=3.0), Part(path="y.txt", weight=2.0)],
        limit=None,
    )
    path = tmp_path / "settings.yaml"
    assert load_settings(Whole, path, defaults={"name": "b", "limit": 9}) == Whole(
        **{name: getattr(load(text, folder=tmp_path), name) for name in ("name", "size", "rate", "files", "pair", "parts")},
        limit=9,
    )
    assert load(None, name="c", limit=None) == Whole(name="c", limit=None)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings(Whole, tmp_path / "empty.yaml", ["name=d"]) == Whole(name="d")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nmae=a"], r"^unknown key nmae \(did you mean name\?\)$"),
        (["qqqqq=a"], "^unknown key qqqqq; known are name, size"),
        (["area=3"], "unknown key area"),
        (["size=3"], "^name is missing$"),
        (["name=a", "size=many"], "^size is 'many', expected a whole number$"),
        (["name=a", "size=true"], "^size is True, expected a whole number$"),
        (["name=3"], r"^name is 3, expected a word \(quote it"),
        (["name=a", "rate=.inf"], "^rate is inf, expected a finite number$"),
        (["name=a", "kind=flat"], "^kind is 'flat'; choose round or square$"),
        (["name=a", "files=a.txt"], r"^files is 'a.txt', expected a list such as \[a, b\]$"),
        (["name=a", "pair=[1, 2, 3]"], r"^pair is \[1, 2, 3\], expected a list of 2 numbers$"),
        (["name=a", "parts=[{weight: 1}]"], r"^parts\.0\.path is missing$"),
        (["name=a", "parts=[{path: x, wieght: 1}]"], r"^unknown key parts\.0\.wieght \(did you mean parts\.0\.weight\?\)$"),
        (["name=a", "parts.0.weight=1"], "^parts is {'0': .*, expected a list"),
        (["parts=[x]", "parts.1.weight=1"], r"^--set 'parts\.1\.weight=1': parts has the entries 0 to 0, not 1$"),
        (["name=a", "name.b=1"], r"^--set 'name\.b=1': name is 'a', which holds no keys$"),
        (["name"], "^--set 'name' is not KEY=VALUE"),
        (["name=[a"], "^--set 'name=.a': it is not valid YAML"),
        (["name=a", "name=b"], "^--set gives name twice; keep one of them$"),
        (["name=a", "speed=1", "rate=2"], "^speed is the former name of rate; keep the latter$"),
    ],
)
def test_words_that_make_no_sense(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(None, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "name is given twice, again in line 2"),
        ("parts:\n- path: x\n  path: y\n", r"parts\.0\.path is given twice, again in line 3"),
        ("a: [", "it is not valid YAML"),
        ("- a\n", "it must be a mapping of keys to values"),
        ("sise: 3\n", r"unknown key sise \(did you mean size\?\)"),
    ],
)
def test_files_that_make_no_sense(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"settings\.yaml: {message}"):
        load(text, folder=tmp_path)


def test_numbers_are_those_of_yaml_but_none_in_base_60():
    text = "[2:4, 1:30.5, 3, -1.5, 1e-3, 0x1f, 1_000, .inf, 2001-01-01T10:00:00]"
    assert settings.parse_yaml(text)[:-1] == ["2:4", "1:30.5", 3, -1.5, "1e-3", 31, 1000, float("inf")]
    assert settings.as_number("1e-3") == 1e-3 and settings.as_number("2:4") == "2:4"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml: No such file or directory"):
        load_settings(Whole, tmp_path / "none.yaml")


def test_an_option_and_a_word_for_one_setting():
    with pytest.raises(ValueError, match="size is set twice, by --set and by its own option"):
        load(None, "name=a", "size=1", size=2)


def test_former_names_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="speed is now called rate"):
        assert load(None, "name=a", "speed=2").rate == 2.0
    with pytest.warns(FutureWarning, match="speed is now called rate"):
        assert Whole(name="a", speed=2.0).rate == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Whole(name="a", rate=2.0)


def test_settings_are_described_by_their_docstring():
    rows = describe(Whole)
    assert [name for name, *_ in rows] == ["name", "size", "rate", "kind", "files", "pair", "parts", "limit"]
    assert rows[0] == ("name", "required", "what it is called.") and rows[2] == ("rate", "0.5", "how fast, 1/s.")
    assert rows[6] == ("parts", "[]", "what it holds.") and rows[7] == ("limit", "7", "None for no limit.")
    assert describe(Part)[1] == ("weight", "1.0", "share, in two lines.")


@pytest.mark.parametrize(
    "name", ["dijiang.compress.oneshot.config:PruneConfig", "dijiang.evaluate.quality.config:EvaluationConfig"]
)
def test_every_setting_of_a_command_has_a_description(name):
    module, _, kind = name.partition(":")
    rows = describe(getattr(__import__(module, fromlist=[kind]), kind))
    assert [setting for setting, _, text in rows if not text] == []
