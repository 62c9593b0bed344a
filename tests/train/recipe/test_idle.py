"""Keys without effect are refused with the reason; keys with an effect pass."""

import pytest
from dijiang_testing.recipes import ALIGN, BOTH, DATA, HEAD, USED

from dijiang.train.recipe.idle import without_effect
from dijiang.train.recipe.load import load_recipe
from dijiang.train.recipe.schema import DataConfig, DistillConfig, Recipe, SourceConfig

IDLE = [
    ("align: {attention_learning_rate: 1e-3}", "align.attention_learning_rate", "align.trains: kernel"),
    ("align: {calibrate_blocks: 0, branch_scale_offset: 0.5}", "align.branch_scale_offset", "align.calibrate_blocks: 0"),
    ("align: {weight_decay: 0.1}", "align.weight_decay", "align.trains: kernel"),
    ("distill: {trains: kernel, weight_decay: 0.1}", "distill.weight_decay", "distill.trains: kernel"),
    ("align: {position_range: 1024}", "align.position_range", "sequences of that length"),
    ("distill: {position_range: 1024}", "distill.position_range", "sequences of that length"),
    ("align: {}\nrun: {gradient_checkpointing: true}", "run.gradient_checkpointing", "align alone"),
    ("convert: {preset: paper}\nalign: {branch_scale_offset: 0.5}", "align.branch_scale_offset", "attention_window: 0"),
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
        "attention_window: 0",
    ),
    ("convert: {preset: paper}\nalign: {linear_weight: 0.5}", "align.linear_weight", "attention_window: 0"),
]


@pytest.mark.parametrize(("text", "key", "reason"), IDLE)
def test_a_key_without_effect_is_refused(complains, text, key, reason):
    text = HEAD + DATA + text + "\n"
    complains(text, rf"{key} has no effect with .*{reason}.*; leave it out$".replace(".", r"\.").replace(r"\.*", ".*"))


@pytest.mark.parametrize("text", USED[:-1])
def test_a_key_with_effect_passes(recipe, text):
    load_recipe(recipe(HEAD + DATA + text + "\n"))


def test_a_key_without_effect_is_refused_from_the_command_line_too(complains, recipe):
    message = r"align\.branch_scale_offset has no effect with align\.calibrate_blocks: 0"
    complains(BOTH, message, "align.branch_scale_offset=1", "align.calibrate_blocks=0")
    loaded = load_recipe(recipe(BOTH), ["align.branch_scale_offset=1", "align.calibrate_blocks=3"])
    assert loaded.align.branch_scale_offset == 1.0


def test_a_key_without_effect_is_refused_under_its_former_name_too(complains):
    with pytest.warns(FutureWarning):
        complains(BOTH, r"align\.branch_scale_offset has no effect with", "align.quiet=1", "align.calibrate_blocks=0")


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


def test_settings_of_recall_and_memories_that_nothing_reads(complains, recipe):
    recall = HEAD + "data: {train: [a], recall: {%s}}\n"
    complains(recall % "held_out_samples: 3" + ALIGN, r"data\.recall\.held_out_samples has no effect with no data\.held_out")
    complains(recall % "answer_weight: 3" + ALIGN, r"data\.recall\.answer_weight has no effect with no distill")
    distill = HEAD + "data: {train: [a, b]}\ndistill: {tokens: 4096, %s}\n"
    complains(distill % "train_kept_heads: true", r"distill\.train_kept_heads has no effect with no select")
    complains(distill % "seed: 1" + "fit: {large_slots: 99}\n", r"fit\.large_slots has no effect with no select")
    kept = "convert: {settings: {full_heads: [[0], [1]]}}\nfit: {large_slots: 99}\n"
    assert load_recipe(recipe(distill % "seed: 1" + kept)).fit.large_slots == 99
    align = HEAD + "data: {train: [a, b]}\n" + ALIGN
    complains(align + "fit: {linear_branch: true}\n", r"fit\.linear_branch has no effect with align, which sets the branches")
    methods = "select: {method: random, per_step: 3}\n"
    complains(distill % "seed: 1" + methods, r"select\.per_step has no effect with a select\.method without steps")
    window = "convert: {preset: paper}\n"
    complains(window + distill % "least_memory: 0.5", r"distill\.least_memory has no effect with attention_window: 0")
    loaded = load_recipe(recipe(recall % "share: 0.5, kinds: [codes], lengths: [512, 1024]" + ALIGN)).data.recall
    assert (loaded.share, loaded.kinds, loaded.lengths) == (0.5, ("codes",), (512, 1024))
    complains(recall % "kinds: [poem]" + ALIGN, r"data\.recall\.kinds\.0 is 'poem'; choose passkey")
    complains(
        distill % "weight_decay: 0.1" + "select: {heads: 1}\n",
        r"distill: weight_decay=0\.1 would shrink the queries and keys of",
    )
    kept = distill % "train_kept_heads: true, weight_decay: 0.1" + "select: {heads: 1}\n"
    assert load_recipe(recipe(kept)).distill.train_kept_heads


def test_without_effect_knows_defaults_too():
    plain = Recipe(source="s", output="o", data=DataConfig(train=[SourceConfig(path="a/b")]), distill=DistillConfig())
    idle = set(without_effect(plain))
    unread = {"data.held_out_tokens", "run.evaluate_every", "run.compile", "data.train.0.weight"}
    assert unread | {"convert.settings.decay_spans", "distill.memory_temperature", "distill.train_kept_heads"} == idle
