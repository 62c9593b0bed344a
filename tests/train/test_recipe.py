"""Recipes: every shipped one loads, and no key of a wrong name or type passes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dijiang.train import AlignConfig, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("*.yaml"))
ALIGN = next(path for path in RECIPES if path.name == "align.yaml")


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> path of a file with this text."""

    def make(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_recipe(path, AlignConfig)
    assert content and dataclasses.asdict(config) == dataclasses.asdict(AlignConfig()) | content


def test_align_recipe_spells_out_the_defaults():
    assert load_recipe(ALIGN, AlignConfig) == AlignConfig()
    keys = list(yaml.safe_load(ALIGN.read_text(encoding="utf-8")))
    assert keys == [field.name for field in dataclasses.fields(AlignConfig)]


def test_align_recipe_comments_every_key():
    for line in ALIGN.read_text(encoding="utf-8").splitlines()[1:]:
        assert re.fullmatch(r"\w+: \S+ +# .+", line), line


def test_overrides_win_unless_they_are_none(recipe):
    path = recipe("tokens: 4096\nseed: 3\nquiet: 1.5\n")
    config = load_recipe(path, AlignConfig, tokens=8192, seed=None, dtype="float32", learning_rate=None)
    assert config == AlignConfig(tokens=8192, seed=3, quiet=1.5, dtype="float32")
    assert load_recipe(path, AlignConfig, seed=0).seed == 0


def test_overrides_are_judged_with_the_file(recipe):
    path = recipe("tokens: 64\nblock_size: 64\n")
    with pytest.raises(ValueError, match=r"tokens=64 is less than one step of 128 \(batch_size \* block_size\)"):
        load_recipe(path, AlignConfig, batch_size=2)
    with pytest.raises(ValueError, match="tokens=64 is less than one step of 1024"):
        load_recipe(recipe("tokens: 64\n"), AlignConfig)
    assert load_recipe(recipe("tokens: 64\n"), AlignConfig, block_size=32).tokens_per_step == 32


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), ("0.5", 0.5), ("1e-3", 1e-3), ("1.0e-3", 1e-3), ("5E-2", 5e-2)],  # YAML 1.1 takes 1e-3 for a word
)
def test_floats_in_every_spelling(recipe, text, value):
    found = load_recipe(recipe(f"learning_rate: {text}"), AlignConfig).learning_rate
    assert found == value and type(found) is float


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tokens: true", r"tokens is True, expected a value of type int"),
        ("seed: no", r"seed is False, expected a value of type int"),
        ("tokens: 1e5", r"tokens is '1e5', expected a value of type int"),
        ("tokens: 4096.0", r"tokens is 4096\.0, expected a value of type int"),
        ("tokens: many", r"tokens is 'many', expected a value of type int"),
        ("tokens:", r"tokens is None, expected a value of type int"),
        ("block_size: [64]", r"block_size is \[64\], expected a value of type int"),
        ("learning_rate: true", r"learning_rate is True, expected a value of type float"),
        ("learning_rate: fast", r"learning_rate is 'fast', expected a value of type float"),
        ("learning_rate: {peak: 1}", r"learning_rate is \{'peak': 1\}, expected a value of type float"),
        ("dtype: 32", r"dtype is 32, expected a value of type str"),
    ],
)
def test_values_of_a_wrong_type(recipe, tmp_path, refused, line, said):
    path = recipe(line)
    refused(tmp_path, lambda: load_recipe(path, AlignConfig), rf"^recipe .*recipe\.yaml: {said}$")


def test_unknown_keys(recipe, tmp_path, refused):
    path = recipe("tokens: 4096\nlr: 1.0\nblocksize: 3\n7: 8\n")
    known = ", ".join(field.name for field in dataclasses.fields(AlignConfig))
    message = rf"^recipe .*recipe\.yaml has unknown keys 7, blocksize, lr; known are {known}$"
    refused(tmp_path, lambda: load_recipe(path, AlignConfig), message)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- tokens\n", "tokens\n", "42\n"])
def test_what_is_no_mapping(recipe, tmp_path, refused, text):
    path = recipe(text)
    refused(tmp_path, lambda: load_recipe(path, AlignConfig), r"^recipe .*recipe\.yaml must be a mapping of keys to values$")


@pytest.mark.parametrize(
    "text", ["tokens: [1\n", "tokens: 1\n  seed: 2\n", "a: b: c\n", "tokens: !!python/object:os.system 1\n"]
)
def test_what_is_no_yaml(recipe, tmp_path, refused, text):
    path = recipe(text)
    refused(tmp_path, lambda: load_recipe(path, AlignConfig), r"^recipe .*recipe\.yaml is not valid YAML: .+")


def test_files_that_cannot_be_read(recipe, tmp_path, refused):
    missing = tmp_path / "none.yaml"
    refused(
        tmp_path, lambda: load_recipe(missing, AlignConfig), r"^cannot read recipe .*none\.yaml: No such file or directory$"
    )
    refused(tmp_path, lambda: load_recipe(tmp_path, AlignConfig), r"^cannot read recipe .*: Is a directory$")
    (tmp_path / "latin.yaml").write_bytes("dtype: é".encode("latin-1"))
    refused(
        tmp_path, lambda: load_recipe(tmp_path / "latin.yaml", AlignConfig), r"latin\.yaml is not valid YAML: 'utf-8' codec"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be greater than 0"),
        ({"block_size": -1}, "block_size=-1 must be greater than 0"),
        ({"batch_size": 0}, "batch_size=0 must be greater than 0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be greater than 0"),
        ({"calibration_blocks": -1}, "calibration_blocks=-1 must not be negative"),
        ({"quiet": -0.5}, r"quiet=-0\.5 must not be negative"),
        ({"quiet": float("nan")}, "quiet=nan must not be negative"),
        ({"tokens": 0}, r"tokens=0 is less than one step of 1024 \(batch_size \* block_size\)"),
        ({"tokens": 99, "block_size": 50, "batch_size": 2}, r"tokens=99 is less than one step of 100"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; choose auto, float32 or bfloat16"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AlignConfig(**settings)


def test_settings_at_their_limits():
    config = AlignConfig(tokens=100, block_size=50, batch_size=2, quiet=0.0, calibration_blocks=0)
    assert config.tokens_per_step == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tokens = 1
