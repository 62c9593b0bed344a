"""Selection of heads and the fit of slots, from checkpoint to checkpoint, on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dijiang.checkpoint.provenance import add_stage, read_provenance, write_provenance
from dijiang.convert import convert_model, load_source
from dijiang.convert.fitting.fit import SIZES
from dijiang.train.memories.config import FitConfig, SelectConfig
from dijiang.train.memories.material import Text, fit_rows, read_texts, selection_samples
from dijiang.train.memories.run import add_memories, convert_with_memories, keep_heads

SELECT = SelectConfig(heads=1, samples=2, lengths=(900,))  # a byte or two per token, so that samples are long
FIT = FitConfig(slots=20, least_slots=16, text_tokens=400, block_size=200, recall_samples=1, recall_length=900, steps=20)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The cat sat on the mat, and a rat that sat near saw it. " * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, long_pair, text):
    """A checkpoint with a kept head and slots."""
    folder = tmp_path_factory.mktemp("made") / "memories"
    return add_memories(
        long_pair.checkpoint, folder, teacher=long_pair.teacher, select=SELECT, fit=FIT, texts=[text], progress=False
    )


def test_checkpoint_has_the_memories_and_says_how_it_got_them(made, long_pair):
    model, _ = load_source(made)
    kept = model.config.full_heads
    selection = json.loads((made / "selection.json").read_text())
    assert sum(map(len, kept)) == 1
    layer, head = selection["order"][0]
    assert kept[layer] == [head] and len(selection["order"]) == 4
    assert 0.0 <= selection["steps"][0]["recall"] <= 1.0
    slots = model.config.attention_memory
    assert 3 * 16 <= sum(map(sum, slots)) <= 3 * 20
    assert slots[layer][head] == 0 and model.config.memory_score == "learned"
    stages = read_provenance(made)["stages"]
    assert [stage["stage"] for stage in stages] == ["convert", "select", "fit"]
    assert stages[1]["teacher"] == stages[2]["teacher"] == "teacher" and stages[1]["texts"] == ["text.txt"]
    assert json.loads((made / "memory_fit.json").read_text())["slots"] == slots
    # nothing of the model's own weights has changed
    before, _ = load_source(long_pair.checkpoint)
    for name, x in before.named_parameters():
        if "_proj" in name or "norm" in name or "embed" in name:
            assert torch.equal(model.get_parameter(name), x), name


def test_one_command_makes_the_same_as_three(tmp_path, made, long_pair, text):
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    options = {"select": SELECT, "fit": FIT, "texts": [text], "progress": False}
    folder = convert_with_memories(long_pair.teacher, tmp_path / "at-once", **options, **settings)
    ids = torch.randint(0, 300, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (load_source(path)[0](ids).logits for path in (folder, made))
    assert torch.equal(first, second)
    assert {path.name for path in folder.iterdir()} == {path.name for path in made.iterdir()}


def test_a_branch_starts_only_if_asked_for_and_says_how_far_it_reaches(tmp_path, made, long_pair, text, capsys):
    fit = replace(FIT, linear_branch=True)
    options = {"teacher": long_pair.teacher, "texts": [text], "progress": False}
    folder = add_memories(made, tmp_path / "started", fit=fit, **options)
    said = "dijiang: the linear branch is fitted to 400 tokens and does harm beyond; the source reads 1,024"
    assert said in capsys.readouterr().err
    before, after = (load_source(path)[0].model.layers[0].self_attn.branch_scale.bias for path in (made, folder))
    assert not torch.equal(before, after)
    assert "branch_errors" not in json.loads((made / "memory_fit.json").read_text())
    assert len(json.loads((folder / "memory_fit.json").read_text())["branch_errors"]) == 2


def test_large_slots_make_memory_constant(tmp_path, made, long_pair, text):
    fit = FitConfig(**{name: getattr(FIT, name) for name in FIT.__slots__} | {"large_slots": 50})
    folder = add_memories(made, tmp_path / "constant", teacher=long_pair.teacher, fit=fit, texts=[text], progress=False)
    kept, constant = (load_source(path)[0] for path in (made, folder))
    assert kept.config.bytes_per_token(4) > 0 and constant.config.bytes_per_token(4) == 0
    layer = next(i for i, heads in enumerate(kept.config.full_heads) if heads)
    assert constant.config.attention_memory[layer][kept.config.full_heads[layer][0]] == 50
    # until the large slots are full the head attends to everything, as the kept one does
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(constant(ids).logits, kept(ids).logits, rtol=1e-4, atol=1e-4)


def test_material_has_the_sizes_that_were_asked_for(tokenizer, text):
    tokens, names = read_texts(tokenizer, [text, text])
    assert names == ["text.txt", "text.txt"] and 2 * len(read_texts(tokenizer, [text]).tokens) == len(tokens)
    rows = fit_rows(tokenizer, tokens, FIT, 1024)
    assert [len(row.input_ids) for row in rows] == [400, 900]
    config = FitConfig(text_tokens=900, block_size=200, recall_samples=0)
    rows = fit_rows(tokenizer, tokens, config, 1024)
    assert [len(row.input_ids) for row in rows] == [400, 200, 200] and all(not row.answers for row in rows)
    # no longer than what the source was made for
    assert [len(row.input_ids) for row in fit_rows(tokenizer, tokens, config, 300)] == [300, 200, 200, 200]
    assert [len(row.input_ids) for row in fit_rows(tokenizer, tokens, config, 150)] == [150] * 6
    assert [len(row.input_ids) for row in fit_rows(tokenizer, tokens, FIT, 950)] == [400, 900]
    assert [len(row.input_ids) for row in fit_rows(tokenizer, tokens, FIT, 850)] == [400, 850]
    config = SelectConfig(samples=5, lengths=(900, 700))
    assert sorted(len(sample.input_ids) for sample in selection_samples(tokenizer, tokens, config)) == [
        700,
        700,
        900,
        900,
        900,
    ]
    with pytest.raises(ValueError, match="the text has 3 tokens and fitting reads 400 at a time; give more text"):
        fit_rows(tokenizer, tokens[:3], FIT, 1024)
    with pytest.raises(ValueError, match="no text given"):
        read_texts(tokenizer, [])


def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(
    tmp_path, made, long_pair, text, make_source, monkeypatch
):
    other, _ = make_source("llama", seed=5, num_key_value_heads=2)
    no_window = convert_model(long_pair.teacher, tmp_path / "none", "paper", progress=False)
    wide = convert_model(long_pair.teacher, tmp_path / "wide", progress=False, attention_window=100)
    softmax = convert_model(long_pair.teacher, tmp_path / "softmax", progress=False, layer_types="full_attention")
    trained = convert_model(long_pair.teacher, tmp_path / "trained", progress=False, attention_window=4)
    write_provenance(trained, add_stage(read_provenance(trained), "distill"))
    options = {"teacher": long_pair.teacher, "texts": [text], "progress": False}
    for checkpoint, changes, message in (
        (long_pair.teacher, {"select": SELECT}, "is no DiJiang checkpoint"),
        (long_pair.checkpoint, {"select": SELECT, "teacher": other}, "their weights differ"),
        (made, {"select": SELECT}, "keeps heads already"),
        (no_window, {"select": SELECT, "fit": FIT}, "needs a window"),  # before the selection begins
        (
            long_pair.checkpoint,
            {"select": SelectConfig(bytes_per_token=1)},
            "bytes_per_token=1 is less than the 64 that one head",
        ),
        (wide, {"select": SelectConfig(heads=1, lengths=(80,))}, "samples of 80 tokens show no loss with a window of 100"),
        (
            long_pair.checkpoint,
            {"select": SelectConfig(heads=1, lengths=(256, 1100))},
            "made for 1024 tokens, and samples have 1100",
        ),
        (softmax, {"select": SELECT}, "has no linear layer"),
        (softmax, {"fit": FIT}, "no head is left to hold a memory"),
        (long_pair.checkpoint, {"fit": replace(FIT, large_slots=50)}, "there are none; select some first"),
        (
            long_pair.checkpoint,
            {"select": SelectConfig(heads=1, method="content_free"), "texts": Text(torch.arange(300), ["short.txt"])},
            "content_free selects heads by a text, and there is none",
        ),
        (long_pair.checkpoint, {"fit": replace(FIT, text_tokens=10)}, "shorter than three windows of 4"),
        (
            trained,
            {"fit": replace(FIT, linear_branch=True)},
            "distill has trained the linear branch already; keep it with `linear_branch=false`",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            add_memories(checkpoint, tmp_path / "out", **options | changes)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    monkeypatch.setattr("dijiang.train.memories.run.convert_model", lambda *args, **kwargs: pytest.fail("converted first"))
    sliding, _ = make_source("mistral", name="sliding", sliding_window=8)
    for source, changes, message in (
        (long_pair.teacher, {"select": SelectConfig(heads=5)}, "heads=5 is more than the 4 key/value heads"),
        (long_pair.teacher, {"fit": replace(FIT, large_slots=50)}, "none is chosen; keep at least one"),
        (long_pair.teacher, {"fit": FIT, "texts": [tmp_path / "none.txt"]}, "cannot read .*none.txt"),
        (sliding, {"select": SELECT, "fit": FIT}, "more than the source's last sliding_window=8 tokens"),
    ):
        settings = {name: value for name, value in (options | changes).items() if name != "teacher"}
        with pytest.raises(ValueError, match=message):
            convert_with_memories(source, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    for settings, message in (
        ({"slots": 16}, "least_slots=32 is more than slots=16"),
        ({"slots": SIZES[-1] + 1}, "slots=513: slots are spread up to 512 a head"),
        ({"recall_share": 2}, "recall_share=2"),
    ):
        with pytest.raises(ValueError, match=message):
            FitConfig(**settings)


def test_recall_is_measured_aside_only_if_asked_for_and_steps_look_at_as_many_samples_as_asked_for(long_pair, text):
    model, tokenizer = load_source(long_pair.checkpoint)
    tokens = read_texts(tokenizer, [text]).tokens
    config = replace(SELECT, samples=3, per_step=1, held_aside=0)
    selection, _ = keep_heads(model, tokenizer, tokens, config, context=1024, progress=False)
    assert "recall" not in selection.steps[0] and selection.settings["per_step"] == 1


def test_stored_weights_keep_their_dtype_and_bytes_are_counted_in_it(tmp_path, long_pair, text):
    """One head of a bfloat16 checkpoint takes half of what it takes in float32."""
    settings = {"attention_window": 4, "attention_sinks": 2, "dtype": "bfloat16"}
    select = SelectConfig(bytes_per_token=2 * 8 * 2, samples=1, lengths=(900,))
    options = {"select": select, "fit": FIT, "texts": [text], "progress": False}
    folder = convert_with_memories(long_pair.teacher, tmp_path / "halves", **options, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == model.config.dtype == torch.bfloat16
    assert model.config.bytes_per_token(2) == 2 * 8 * 2 and sum(map(len, model.config.full_heads)) == 1
