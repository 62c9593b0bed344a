"""Recipes: what a file may say, what `--set` changes, and the way back to YAML."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import yaml
from dijiang_testing.recipes import ALIGN, BOTH, DATA, HEAD, SMALL, USED

from dijiang.train.recipe.load import bundled_recipes, differences, dump_recipe, load_recipe
from dijiang.train.recipe.schema import (
    AlignConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)


def test_every_kind_of_value(recipe):
    text = HEAD + (
        "data:\n  train:\n    - a.txt\n    - {path: owner/name, weight: 3, subset: s, split: test, column: body}\n"
        "  streaming: true\n"
        "convert: {dtype: bfloat16, settings: {decay: retnet, feature_seed: 3, branch_scale_init: -1e3}}\n"
        "align: {tokens: 1_000_000, betas: [0.9, 1e-1], kernel_learning_rate: 1e-2, clip: 1, start_block_size: null}\n"
        "run: {deepspeed: zero2, report_to: [tensorboard, wandb]}\n"
    )
    sources = [
        SourceConfig(path="a.txt"),
        SourceConfig(path="owner/name", weight=3.0, subset="s", split="test", column="body"),
    ]
    expected = Recipe(
        source="a/model",
        output="out",
        data=DataConfig(train=sources, streaming=True),
        convert=ConvertConfig(settings={"decay": "retnet", "feature_seed": 3, "branch_scale_init": -1000.0}, dtype="bfloat16"),
        align=AlignConfig(tokens=1_000_000, betas=(0.9, 0.1), kernel_learning_rate=0.01, clip=1.0),
        run=RunConfig(deepspeed="zero2", report_to=["tensorboard", "wandb"]),
    )
    loaded = load_recipe(recipe(text))
    assert loaded == expected and type(loaded.align.clip) is float and type(loaded.align.betas) is tuple


def test_defaults_are_those_of_the_dataclasses(recipe):
    expected = Recipe(
        source="a/model",
        output="out",
        data=DataConfig(train=[SourceConfig(path="a.txt")]),
        align=AlignConfig(tokens=4096),
        distill=DistillConfig(tokens=4096),
    )
    assert load_recipe(recipe(BOTH)) == expected
    empty = load_recipe(recipe(HEAD + DATA + "align: {}\ndistill:\n"))
    assert empty.align == AlignConfig() and empty.distill is None


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("0.5", 0.5), ("1e-3", 1e-3), ("1.0e-3", 1e-3), ("5E-2", 5e-2), ("+2e1", 20.0)]
)
def test_numbers_in_every_spelling(recipe, text, value):
    weight_decay = load_recipe(
        recipe(HEAD + DATA + f"align: {{trains: attention, weight_decay: {text}}}\n")
    ).align.weight_decay
    assert weight_decay == value and type(weight_decay) is float


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokens: true", "tokens is True, expected a whole number$"),
        ("seed: no", "seed is False, expected a whole number$"),
        ("tokens: 1e5", "tokens is '1e5', expected a whole number$"),
        ("tokens: 4096.0", r"tokens is 4096\.0, expected a whole number$"),
        ("tokens:", "tokens is None, expected a whole number$"),
        ("block_size: [64]", r"block_size is \[64\], expected a whole number$"),
        ("clip: true", "clip is True, expected a number$"),
        ("clip: fast", "clip is 'fast', expected a number$"),
        ("clip: infinity", "clip is 'infinity', expected a number$"),
        ("clip: .inf", "clip is inf, expected a finite number$"),
        ("clip: .nan", "clip is nan, expected a finite number$"),
        ("clip: {peak: 1}", r"clip is \{'peak': 1\}, expected a number$"),
        ("betas: 0.9", r"betas is 0\.9, expected a list of 2 numbers$"),
        ("betas: [0.9]", r"betas is \[0\.9\], expected a list of 2 numbers$"),
        ("betas: [0.9, x]", "betas.1 is 'x', expected a number$"),
        ("schedule: linear", "schedule is 'linear'; choose cosine or flat$"),
        ("trains: [kernel]", r"trains is \['kernel'\]; choose kernel or attention$"),
    ],
)
def test_values_of_a_wrong_type(complains, line, message):
    complains(HEAD + DATA + f"align:\n  {line}\n", rf"align\.{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "data: a.txt\n" + ALIGN, "data is 'a.txt', expected a mapping of keys to values$"),
        (HEAD + "data:\n" + ALIGN, "data is None, expected a mapping of keys to values$"),
        (HEAD + "data: {train: a.txt}\n" + ALIGN, r"data\.train is 'a.txt', expected a list such as \[a, b\]$"),
        (HEAD + "data: {train: [3]}\n" + ALIGN, r"data\.train\.0 is 3, expected a mapping of keys to values$"),
        (HEAD + "data: {train: [{path: 3}]}\n" + ALIGN, r"data\.train\.0\.path is 3, expected a word"),
        (SMALL + "run: {deepspeed: 2}\n", r"run\.deepspeed is 2, expected a word"),
        (SMALL + "run: {gradient_checkpointing: 1}\n", r"run\.gradient_checkpointing is 1, expected true or false$"),
        (SMALL + "convert: {settings: [a]}\n", r"convert\.settings is \['a'\], expected a mapping"),
        (SMALL + "convert: []\n", r"convert is \[\], expected a mapping of keys to values$"),
    ],
)
def test_sections_of_a_wrong_type(complains, text, message):
    complains(text, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "7: 8\n", "unknown key 7; known are source, output, data, "),
        (SMALL + "sorce: x\n", r"unknown key sorce \(did you mean source\?\)$"),
        (SMALL + "tokens: 3\n", "unknown key tokens; tokens belongs to align and distill$"),
        (HEAD + DATA + "align: {blocksize: 3}\n", r"unknown key align\.blocksize \(did you mean align\.block_size\?\)$"),
        (HEAD + DATA + "align: {temperature: 2}\n", r"unknown key align\.temperature; temperature belongs to distill$"),
        (HEAD + DATA + "align: {micro_batch_size: 2}\n", r"unknown key align\.micro_batch_size; .* belongs to run$"),
        (HEAD + DATA + "align: {lr: 2}\n", r"unknown key align\.lr; known are tokens, block_size, "),
        (HEAD + "data: {train: [{path: a, wieght: 2}]}\n", r"unknown key data\.train\.0\.wieght \(did you mean "),
        (HEAD + "data: {train: [a], weight: 2}\n", r"unknown key data\.weight; weight belongs to data\.train$"),
        (HEAD + ALIGN, "data is missing$"),
        ("output: x\n" + DATA + ALIGN, "source is missing$"),
        (HEAD + "data: {}\n" + ALIGN, r"data\.train is missing$"),
        (HEAD + "data: {train: [{weight: 1}]}\n", r"data\.train\.0\.path is missing$"),
        (HEAD + DATA, "it names no stage; add align, distill or both$"),
    ],
)
def test_unknown_and_missing_keys(complains, text, message):
    complains(text, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "align: {tokens: 9}\n", "align is given twice, again in line 5$"),
        (HEAD + DATA + "align:\n  seed: 1\n  tokens: 4096\n  seed: 1\n", r"align\.seed is given twice, again in line 7$"),
        (HEAD + "data:\n  train:\n    - path: a\n      path: b\n" + ALIGN, r"data\.train\.0\.path is given twice"),
    ],
)
def test_a_key_given_twice(complains, text, message):
    complains(text, message)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- tokens\n", "tokens\n", "42\n"])
def test_what_is_no_mapping(complains, text):
    complains(text, "it must be a mapping of keys to values$")


@pytest.mark.parametrize(
    "text",
    [
        "align: [1\n",
        "align: 1\n  seed: 2\n",
        "a: b: c\n",
        "align: !!python/object:os.system 1\n",
        "? [a]\n: 1\n",
        "a: 1\n---\nb: 2\n",
        "align: *nobody\n",
    ],
)
def test_what_is_no_yaml(complains, text):
    complains(text, "it is not valid YAML: .+")


def test_an_anchor_that_holds_itself_is_no_endless_loop(complains):
    complains(SMALL + "run: &r {report_to: *r}\n", r"run\.report_to is \{.*\}, expected a list such as")


def test_files_that_cannot_be_read(tmp_path, refused):
    refused(tmp_path, lambda: load_recipe(tmp_path), "^cannot read recipe .*: Is a directory$")
    (tmp_path / "latin.yaml").write_bytes("source: é".encode("latin-1"))
    refused(tmp_path, lambda: load_recipe(tmp_path / "latin.yaml"), r"latin\.yaml: it is not valid YAML: 'utf-8' codec")
    missing = tmp_path / "none.yaml"
    refused(tmp_path, lambda: load_recipe(missing), r"^recipe .*none\.yaml is neither a file nor a bundled recipe such as ")


def test_bundled_recipes_go_by_name(tmp_path, refused, monkeypatch):
    name = "pythia-410m"
    assert load_recipe(name) == load_recipe(Path(str(bundled_recipes()[name])))
    refused(tmp_path, lambda: load_recipe("pythia-400m"), r"^recipe pythia-400m is neither .* such as pythia-410m")
    (tmp_path / name).write_text(SMALL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # a file of that name comes first
    assert load_recipe(name).source == "a/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "convert: {preset: best}\n", "convert: preset 'best' is unknown; choose from recommended, linear, paper$"),
        (SMALL + "convert: {dtype: int8}\n", "convert: dtype 'int8' is unknown; choose from auto, float32, "),
        (SMALL + "convert: {settings: {atention_sinks: 1}}\n", r"convert\.settings: unknown setting 'atention_sinks' \(did"),
        (SMALL + "convert: {settings: {vocab_size: 1}}\n", r"convert\.settings: vocab_size is given by the source model"),
        (SMALL + "convert: {settings: {1: 2}}\n", r"convert\.settings: unknown setting '1'"),
    ],
)
def test_conversions_that_make_no_sense(complains, text, message):
    complains(text, message)


# --- --set ---


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["align.tokens=20000"], {"align": {"tokens": 20000}}),
        (["align.kernel_learning_rate = 1e-3"], {"align": {"kernel_learning_rate": 1e-3}}),
        (["data.train=[a.txt, b.txt]"], {"data": {"train": [SourceConfig(path="a.txt"), SourceConfig(path="b.txt")]}}),
        (["data.train=[a, b]", "data.train.1.weight=2"], None),
        (["data.train.0=b.txt"], {"data": {"train": [SourceConfig(path="b.txt")]}}),
        (["source=x=y"], {"source": "x=y"}),
        (["distill=null"], {"distill": None}),
        (["distill="], {"distill": None}),
        (["convert.settings.decay=retnet"], {"convert": {"settings": {"decay": "retnet"}}}),
        (["run.report_to=[]"], {"run": {"report_to": []}}),
    ],
)
def test_sets(recipe, sets, expected):
    path = recipe(BOTH)
    if expected is None:
        expected = {"data": {"train": [SourceConfig(path="a"), SourceConfig(path="b", weight=2.0)]}}
    plain = load_recipe(path)
    changed = {
        name: dataclasses.replace(getattr(plain, name), **value) if isinstance(value, dict) else value
        for name, value in expected.items()
    }
    assert load_recipe(path, sets) == dataclasses.replace(plain, **changed)


def test_sets_may_add_a_stage(recipe):
    loaded = load_recipe(recipe(SMALL), ["distill.tokens=5000", "distill.trains=attention"])
    assert loaded.distill == DistillConfig(tokens=5000, trains="attention") and loaded.stages == ["align", "distill"]
    assert load_recipe(recipe(HEAD + DATA + "align:\n"), ["align.seed=3"]).align == AlignConfig(seed=3)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("align.tokens", r"--set 'align\.tokens' is not KEY=VALUE; write for example align\.tokens=20000$"),
        ("=3", "--set '=3' is not KEY=VALUE"),
        ("align..tokens=3", "--set .* is not KEY=VALUE"),
        ("data.train=[a, b", "--set .*: it is not valid YAML: .*; quote it, or write lists as"),
        ("align={a: 1, a: 2}", "--set .*: a is given twice"),
        ("data.train.1.weight=2", r"--set .*: data\.train has the entries 0 to 0, not 1$"),
        ("data.train.first=2", r"--set .*: data\.train has the entries 0 to 0, not first$"),
        ("source.tokens=2", "--set .*: source is 'a/model', which holds no keys$"),
        ("align.tokens=many", r"align\.tokens is 'many', expected a whole number$"),
        ("algin.tokens=3", r"unknown key algin \(did you mean align\?\)$"),
        ("align.tokens=3", "align: tokens=3 is less than one step"),
        ("data=null", "data is None, expected a mapping"),
        ("run=null", "run is None, expected a mapping"),
    ],
)
def test_sets_that_make_no_sense(complains, word, message):
    complains(BOTH, message, word)


def test_a_key_is_set_once(complains):
    complains(BOTH, r"--set gives align\.seed twice; keep one of them$", "align.seed=1", "align.seed=2")


def test_a_former_name_still_works(recipe, complains):
    path = recipe(HEAD + DATA + "align: {tokens: 4096, quiet: 0.25}\n")
    with pytest.warns(FutureWarning, match=r"^align\.quiet is now called align\.branch_scale_offset"):
        assert load_recipe(path).align.branch_scale_offset == 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe(path, stored=True).align.branch_scale_offset == 0.25
    message = r"align\.quiet is the former name of align\.branch_scale_offset; keep the latter$"
    complains(BOTH, message, "align.quiet=1", "align.branch_scale_offset=1")


# --- back to YAML, and comparison ---


@pytest.mark.parametrize("text", USED)
def test_dumps_load_back(recipe, text):
    first = load_recipe(recipe(HEAD + DATA + text.replace(", learning_rate: null", "") + "\n"))
    dumped = dump_recipe(first)
    assert load_recipe(recipe(dumped)) == first
    written = yaml.safe_load(dumped)
    for section in first.stages:  # defaults are spelt out, so that later versions read the same
        assert written[section].keys() >= {"block_size", "warmup_share", "seed", "kernel_learning_rate"}


def test_dumps_keep_settings_and_sources(recipe):
    text = HEAD + (
        "data: {train: [a.txt, {path: o/n, weight: 0.1, subset: é}], held_out: [h]}\n"
        "convert: {settings: {feature_dim: null, branch_scale_init: 1e-7}}\nalign: {betas: [0.8, 1e-5]}\n"
    )
    first = load_recipe(recipe(text))
    again = load_recipe(recipe(dump_recipe(first)))
    assert again == first and again.convert.settings == {"feature_dim": None, "branch_scale_init": 1e-7}


@pytest.mark.parametrize("name", ["pythia-70m", "smollm2-135m-linear", "llama2-7b"])
def test_bundled_recipes_survive_a_dump(recipe, name):
    first = load_recipe(name)
    assert load_recipe(recipe(dump_recipe(first))) == first


def test_a_stored_recipe_may_hold_keys_without_effect(recipe, complains):
    text = HEAD + "data: {train: [{path: a.txt, weight: 2}]}\n" + ALIGN
    complains(text, r"data\.train\.0\.weight has no effect")
    stored = load_recipe(recipe(text), stored=True)
    assert differences(stored, load_recipe(recipe(text.replace(", weight: 2", "")))) == []
    with pytest.raises(ValueError, match="unknown"):
        load_recipe(recipe(text.replace("weight", "weigth")), stored=True)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([], []),
        (["align.seed=1"], ["align.seed"]),
        (["run.save_every=7", "output=elsewhere", "data.cache=c"], []),
        (["align.betas=[0.9, 0.99]"], ["align.betas"]),
        (["data.train.0.path=b.txt", "source=x"], ["source", "data.train.0.path"]),
        (["data.train=[a.txt, b.txt]"], ["data.train"]),
        (["distill=null"], ["distill"]),
        (["convert.settings.decay=retnet"], ["convert.settings.decay"]),
    ],
)
def test_differences(recipe, sets, expected):
    path = recipe(BOTH)
    a, b = load_recipe(path), load_recipe(path, sets)
    assert differences(a, b) == differences(b, a) == expected


def test_what_has_no_effect_makes_no_difference(recipe):
    def recipe_with(**distill):
        source = SourceConfig(path="o/n", weight=distill.pop("weight", 1.0))
        return Recipe(source="s", output="o", data=DataConfig(train=[source]), distill=DistillConfig(**distill))

    idle = {"trains": "attention", "learning_rate": 7.0, "weight": 3.0}
    first = recipe_with(**idle)
    assert differences(first, load_recipe(recipe(dump_recipe(first)))) == []
    assert differences(recipe_with(learning_rate=7.0), recipe_with()) == ["distill.learning_rate"]
    assert differences(first, recipe_with()) == ["distill.trains", "distill.learning_rate"]


def test_differences_ignore_whole_keys_only(recipe):
    path = recipe(BOTH)
    a = load_recipe(path)
    b = load_recipe(path, ["align.seed=1", "run.save_every=7", "distill.seed=2"])
    assert differences(a, b, ignore=["align"]) == ["distill.seed", "run.save_every"]
    assert differences(a, b, ignore=["align.se", "run", "distill.seed"]) == ["align.seed"]
