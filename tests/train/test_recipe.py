"""Recipes: what a file may say, what `--set` changes, which keys are refused, and the way back to YAML."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from dijiang.train.recipe.load import bundled_recipes, differences, dump_recipe, load_recipe, without_effect
from dijiang.train.recipe.schema import (
    AlignConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)

HEAD = "source: a/model\noutput: out\n"
DATA = "data: {train: [a.txt]}\n"
ALIGN = "align: {tokens: 4096}\n"
DISTILL = "distill: {tokens: 4096}\n"
SMALL = HEAD + DATA + ALIGN
BOTH = SMALL + DISTILL


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> path of a file with this text."""

    def make(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def complains(recipe, tmp_path, refused):
    """complains(text, message, *sets): one line, which names the recipe and goes on with `message`, a pattern."""

    def check(text: str, message: str, *sets: str) -> None:
        path = recipe(text)
        refused(tmp_path, lambda: load_recipe(path, sets), rf"^recipe \S*recipe\.yaml: {message}")

    return check


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
    found = load_recipe(recipe(text))
    assert found == expected and type(found.align.clip) is float and type(found.align.betas) is tuple


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
    found = load_recipe(recipe(HEAD + DATA + f"align: {{trains: attention, weight_decay: {text}}}\n")).align.weight_decay
    assert found == value and type(found) is float


@pytest.mark.parametrize(
    ("line", "said"),
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
def test_values_of_a_wrong_type(complains, line, said):
    complains(HEAD + DATA + f"align:\n  {line}\n", rf"align\.{said}")


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_sections_of_a_wrong_type(complains, text, said):
    complains(text, said)


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_unknown_and_missing_keys(complains, text, said):
    complains(text, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + "align: {tokens: 9}\n", "align is given twice, again in line 5$"),
        (HEAD + DATA + "align:\n  seed: 1\n  tokens: 4096\n  seed: 1\n", r"align\.seed is given twice, again in line 7$"),
        (HEAD + "data:\n  train:\n    - path: a\n      path: b\n" + ALIGN, r"data\.train\.0\.path is given twice"),
    ],
)
def test_a_key_given_twice(complains, text, said):
    complains(text, said)


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
    ("text", "said"),
    [
        (HEAD + DATA + "align: {tokens: 64}\n", r"align: tokens=64 is less than one step"),
        (HEAD + DATA + "distill: {kl_weight: 0}\n", "distill: kl_weight and ce_weight are both 0: no loss is left$"),
        (HEAD + DATA + "distill: {lora_alpha: 8}\n", "distill: lora_alpha=8.0 needs lora_rank of at least 1$"),
        (HEAD + DATA + "distill: {trains: kernel, lora_rank: 8}\n", "distill: lora_rank=8 needs trains=attention or all"),
        (SMALL + "run: {keep_checkpoints: 1}\n", "run: keep_checkpoints=1 must be at least 2$"),
        (HEAD + "data: {train: [{path: a, weight: 0}, b]}\n" + ALIGN, r"data\.train\.0: weight=0\.0 must be greater than 0$"),
        (SMALL + "convert: {preset: best}\n", "convert: preset 'best' is unknown; choose from recommended, linear, paper$"),
        (SMALL + "convert: {dtype: int8}\n", "convert: dtype 'int8' is unknown; choose from auto, float32, "),
        (SMALL + "convert: {settings: {atention_sinks: 1}}\n", r"convert\.settings: unknown setting 'atention_sinks' \(did"),
        (SMALL + "convert: {settings: {vocab_size: 1}}\n", r"convert\.settings: unknown setting 'vocab_size'|.* is given by"),
        (SMALL + "convert: {settings: {1: 2}}\n", r"convert\.settings: unknown setting '1'"),
    ],
)
def test_values_that_make_no_sense(complains, text, said):
    complains(text, said)


# --- keys without effect ---

IDLE = [
    ("align: {attention_learning_rate: 1e-3}", "align.attention_learning_rate", "align.trains: kernel"),
    ("align: {calibrate_blocks: 0, quiet: 0.5}", "align.quiet", "align.calibrate_blocks: 0"),
    ("align: {weight_decay: 0.1}", "align.weight_decay", "align.trains: kernel"),
    ("distill: {trains: kernel, weight_decay: 0.1}", "distill.weight_decay", "distill.trains: kernel"),
    ("align: {position_range: 1024}", "align.position_range", "no room"),
    ("distill: {position_range: 1024}", "distill.position_range", "no room"),
    ("align: {}\nrun: {gradient_checkpointing: true}", "run.gradient_checkpointing", "align alone"),
    ("convert: {preset: paper}\nalign: {quiet: 0.5}", "align.quiet", "attention_window: 0"),
    ("align: {schedule: flat, final_share: 0.1}", "align.final_share", "align.schedule: flat"),
    ("distill: {schedule: flat, final_share: 0.05}", "distill.final_share", "distill.schedule: flat"),
    ("distill: {trains: kernel, lora_rank: 0}", "distill.lora_rank", "distill.trains: kernel"),
    ("distill: {trains: attention, learning_rate: 1e-4}", "distill.learning_rate", "distill.trains: attention or kernel"),
    ("distill: {trains: kernel, learning_rate: 1e-4}", "distill.learning_rate", "distill.trains: attention or kernel"),
    ("distill: {trains: kernel, attention_learning_rate: 1}", "distill.attention_learning_rate", "distill.trains: kernel"),
    (
        "distill: {trains: attention, train_embeddings: false}",
        "distill.train_embeddings",
        "distill.trains: attention or kernel",
    ),
    ("distill: {kl_weight: 0, ce_weight: 1, temperature: 2}", "distill.temperature", "distill.kl_weight: 0"),
    ("distill: {kl_weight: 0, ce_weight: 1, teacher_top_k: 0}", "distill.teacher_top_k", "distill.kl_weight: 0"),
    ("convert: {settings: {decay_spans: [4, 64]}}\nalign: {}", "convert.settings.decay_spans", "decay: none"),
    ("align: {}\nrun: {evaluate_every: 10}", "run.evaluate_every", "no data.held_out"),
    ("align: {}\nrun: {compile: true}", "run.compile", "data.respect_documents"),
    ("distill: {}\nrun: {compile: false}", "run.compile", "data.respect_documents"),
    (
        "convert: {settings: {attention_window: 0, attention_sinks: 0}}\nalign: {window_dropout: 0.5}",
        "align.window_dropout",
        "",
    ),
    ("convert: {preset: paper}\nalign: {linear_weight: 0.5}", "align.linear_weight", "attention_window: 0"),
]
USED = [
    "align: {trains: attention, attention_learning_rate: 1e-3, calibrate_blocks: 1, quiet: 1, final_share: 0.1}",
    "align: {linear_weight: 0.5, window_dropout: 0.5}",
    "convert: {preset: paper, settings: {attention_window: 3, normalize: true}}\nalign: {linear_weight: 0.5}",
    "distill: {lora_rank: 4, lora_alpha: 8, learning_rate: 1e-4, attention_learning_rate: 1e-4}",
    "distill: {trains: attention, lora_rank: 4, attention_learning_rate: 1e-4, temperature: 2, teacher_top_k: 9}",
    "distill: {train_embeddings: true, schedule: flat}",
    "distill: {trains: attention, learning_rate: null}",
]


@pytest.mark.parametrize(("text", "key", "reason"), IDLE)
def test_a_key_without_effect_is_refused(complains, text, key, reason):
    text = HEAD + DATA + text + "\n"
    complains(text, rf"{key} has no effect with .*{reason}.*; leave it out$".replace(".", r"\.").replace(r"\.*", ".*"))


@pytest.mark.parametrize("text", USED[:-1])
def test_a_key_with_effect_passes(recipe, text):
    load_recipe(recipe(HEAD + DATA + text + "\n"))


def test_a_key_without_effect_is_refused_from_the_command_line_too(complains, recipe):
    complains(BOTH, r"align\.quiet has no effect with align\.calibrate_blocks: 0", "align.quiet=1", "align.calibrate_blocks=0")
    assert load_recipe(recipe(BOTH), ["align.quiet=1", "align.calibrate_blocks=3"]).align.quiet == 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("distill: {}\nrun: {compile: true}", None),
        ("align: {}\nrun: {compile: true}", "align alone"),
        ("distill: {}\nrun: {compile: true, deepspeed: zero1}", "run.deepspeed"),
        ("distill: {}\nrun: {compile: true, gradient_checkpointing: true}", "run.gradient_checkpointing"),
    ],
)
def test_what_compilation_is_for(recipe, complains, text, reason):
    text = HEAD + "data: {train: [a.txt], respect_documents: false}\n" + text + "\n"
    if reason is None:
        assert load_recipe(recipe(text)).run.compile is True
    else:
        complains(text, f"run.compile has no effect with {reason}")


def test_the_column_of_a_folder_of_tokens(complains, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    for name in ("tokens.bin", "starts.bin", "meta.json"):
        (tmp_path / "tokens" / name).touch()
    text = HEAD + "data: {train: [{path: tokens, column: body}, b]}\nalign: {tokens: 4096}\n"
    complains(text, r"data\.train\.0\.column has no effect with a folder of tokens")


def test_source_keys_without_effect(complains, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books" / "old").mkdir(parents=True)
    (tmp_path / "books" / "old" / "one.jsonl").write_text("{}", encoding="utf-8")
    text = HEAD + "data:\n  train:\n    - {{path: '{}', {}}}\n    - other/name\nalign:\n  tokens: 4096\n"

    for path in ("books", "books/old/one.jsonl", "books/**/*.jsonl", str(tmp_path / "b*")):
        for entry in ("split: train", "subset: x"):
            key = entry.split(":")[0]
            complains(text.format(path, entry), rf"data\.train\.0\.{key} has no effect with a file or folder on disk")
    for path in ("owner/name", "books/*.parquet", "nobooks"):
        load_recipe(recipe(text.format(path, "split: test, subset: x, column: body, weight: 2")))
    for path in ("books/a.txt", "b/*.md", "b/c.TXT.gz"):
        complains(text.format(path, "column: body"), r"data\.train\.0\.column has no effect with plain text")

    single = HEAD + "data: {train: [{path: a, weight: 2}]}\n" + ALIGN
    complains(single, r"data\.train\.0\.weight has no effect with a single source")
    held_out = HEAD + "data: {train: [a], held_out: [{path: b, weight: 2}, c]}\n" + ALIGN
    complains(held_out, r"data\.held_out\.0\.weight has no effect with held-out text")
    complains(
        HEAD + "data: {train: [a], held_out_tokens: 9}\n" + ALIGN, r"data\.held_out_tokens has no effect with no data\.held"
    )
    load_recipe(recipe(HEAD + "data: {train: [a], held_out: [b], held_out_tokens: 9}\n" + ALIGN), ["run.evaluate_every=3"])


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
    found = load_recipe(recipe(SMALL), ["distill.tokens=5000", "distill.trains=attention"])
    assert found.distill == DistillConfig(tokens=5000, trains="attention") and found.stages == ["align", "distill"]
    assert load_recipe(recipe(HEAD + DATA + "align:\n"), ["align.seed=3"]).align == AlignConfig(seed=3)


@pytest.mark.parametrize(
    ("word", "said"),
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
def test_sets_that_make_no_sense(complains, word, said):
    complains(BOTH, said, word)


def test_a_key_is_set_once(complains):
    complains(BOTH, r"--set gives align\.seed twice; keep one of them$", "align.seed=1", "align.seed=2")


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


def test_without_effect_knows_defaults_too():
    plain = Recipe(source="s", output="o", data=DataConfig(train=[SourceConfig(path="a/b")]), distill=DistillConfig())
    idle = set(without_effect(plain))
    unread = {"data.held_out_tokens", "run.evaluate_every", "run.compile", "data.train.0.weight"}
    assert unread | {"convert.settings.decay_spans"} == idle


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
    def made(**distill):
        source = SourceConfig(path="o/n", weight=distill.pop("weight", 1.0))
        return Recipe(source="s", output="o", data=DataConfig(train=[source]), distill=DistillConfig(**distill))

    idle = {"trains": "attention", "learning_rate": 7.0, "weight": 3.0}
    first = made(**idle)
    assert differences(first, load_recipe(recipe(dump_recipe(first)))) == []
    assert differences(made(learning_rate=7.0), made()) == ["distill.learning_rate"]
    assert differences(first, made()) == ["distill.trains", "distill.learning_rate"]


def test_differences_ignore_whole_keys_only(recipe):
    path = recipe(BOTH)
    a = load_recipe(path)
    b = load_recipe(path, ["align.seed=1", "run.save_every=7", "distill.seed=2"])
    assert differences(a, b, ignore=["align"]) == ["distill.seed", "run.save_every"]
    assert differences(a, b, ignore=["align.se", "run", "distill.seed"]) == ["align.seed"]
