"""All methods on a tiny student: what they return, and whether they find a head that matters."""

import json
from dataclasses import replace

import pytest
import torch
from dijiang_testing.model_checks import assert_close

from dijiang.convert.selection import METHODS, Selection, SelectionJob, full_heads_of, heads_within, select_heads
from dijiang.convert.selection.attention_scores import mean_projections, rotated
from dijiang.convert.selection.gates import head_gates
from dijiang.convert.selection.job import recall
from dijiang.modeling.decoder_modules import rotate

OPTIONS = {"gates": {"steps": 4}, "induction": {"length": 12, "rows": 2}, "content_free": {"length": 40}}


@pytest.fixture
def job(student, random_samples, tokens):
    """Two heads of four to be kept, by four samples and two blocks of text."""
    samples = random_samples(4)
    return SelectionJob(
        model=student, samples=samples, held_aside=samples[:1], text=tokens(30), heads=2, seed=3, progress=False
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_head_is_ranked_once_and_again_the_same(job, method):
    first, again = (select_heads(job, method, **OPTIONS.get(method, {})) for _ in range(2))
    assert sorted(first.order) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert first.seconds > 0 and first.settings["heads"] == 2 and first.method == method
    assert all(isinstance(x, float) for row in first.scores for x in row)
    assert Selection.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert all("attend" not in vars(layer.self_attn) for layer in job.model.model.layers)


@pytest.fixture
def planted(student, teacher, random_samples):
    """A job whose samples ask for what the teacher says, and whose teacher hears one head of the second layer alone."""
    with torch.no_grad():
        for model in (student, teacher):
            for i, layer in enumerate(model.model.layers):
                weight = layer.self_attn.o_proj.weight.view(32, 4, 8)  # hidden, query head, head size
                loud = weight[:, 2:].clone() if i == 1 else None
                weight.mul_(1e-3)
                if loud is not None:
                    weight[:, 2:] = 3 * loud
        samples = random_samples(6, length=30)
        for sample in samples:
            for start, end in sample.answers:
                said = teacher(input_ids=sample.input_ids[None, :start], use_cache=False).logits[0, -1].argmax(-1)
                sample.input_ids[start:end] = said
    return SelectionJob(model=student, samples=samples, held_aside=samples, heads=1, progress=False)


@pytest.mark.parametrize("method", ["greedy", "gates", "teacher_gradient"])
def test_a_planted_head_is_found(planted, method):
    selection = select_heads(planted, method, **({"lr": 0.1, "steps": 60} if method == "gates" else {}))
    assert selection.order[0] == (1, 1)
    if method == "greedy":
        (step,) = selection.steps
        assert step["heads"] == [[1, 1]] and step["recall"] == 1.0 > step["recall_before"]


def test_the_best_whole_layer_is_found(planted):
    assert {layer for layer, _ in select_heads(planted, "layers").order[:2]} == {1}


def test_greedy_looks_at_the_next_samples_around_the_list(job, monkeypatch):
    asked = []
    original = type(job.model).forward

    def forward(self, input_ids, **kwargs):
        asked.append(input_ids[0, 0].item())
        return original(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(job.model), "forward", forward)
    select_heads(replace(job, held_aside=(), heads=3), "greedy", per_step=3)
    firsts = [sample.input_ids[0].item() for sample in job.samples]
    assert asked == [firsts[i % 4] for i in range(9)]


def test_recall_is_the_share_of_answers_that_greedy_decoding_writes(student, random_samples, tokens):
    (sample,) = random_samples(1)
    said = student(input_ids=sample.input_ids[None], use_cache=False).logits[0].argmax(-1)
    sample.input_ids[-1] = said[-2]
    right = float(sample.input_ids[-2] == said[-3])
    assert recall(student, torch.zeros(2, 2), [sample]) == (1 + right) / 2


def test_uniform_layers_are_evenly_spaced(job):
    order = select_heads(replace(job, heads=2), "uniform").order
    assert order[:2] == [(1, 0), (1, 1)]


def test_random_orders_depend_on_the_seed(job):
    orders = {tuple(select_heads(replace(job, seed=seed), "random").order) for seed in range(8)}
    assert len(orders) > 3


def test_mean_projections_are_those_of_all_tokens(student, tokens):
    text, seen = tokens(20), []
    layer = student.model.layers[1].self_attn
    handle = layer.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        means = mean_projections(student, text)
    handle.remove()
    assert len(seen) == 2 and set(means) == {(i, name) for i in range(2) for name in ("q_proj", "k_proj")}
    assert_close(means[1, "k_proj"], torch.cat(seen).mean((0, 1)), "mean key")


def test_rotated_is_the_models_own_rotation(student, tokens):
    x = torch.randn(1, 9, 3, 8)
    cos, sin = student.model.rotary_emb(x, torch.arange(9)[None])
    assert_close(rotated(x[0], cos[0], sin[0]), rotate(x, cos, sin)[0], "rotated")


def test_induction_finds_attention_to_the_token_after_the_first_occurrence(student, monkeypatch):
    """One head is given keys and queries that meet where the key's token follows the query's first occurrence."""
    from dijiang.convert.selection import attention_scores

    def fake(model, watch):
        class Watching:
            def __enter__(self):
                T, place = 16, torch.arange(16) % 8
                for i in range(2):
                    k = torch.zeros(1, T, 2, 8)
                    k[0, :, 1] = 40 * torch.eye(8)[(place - 1) % 8]  # found by the token before
                    q = torch.eye(8)[place][None, :, None].expand(1, T, 4, 8)
                    watch(i, q, k if i == 1 else 0 * k)

            def __exit__(self, *exception):
                pass

        return Watching()

    monkeypatch.setattr(attention_scores, "watched", fake)
    job = SelectionJob(model=student, heads=1, progress=False)
    selection = select_heads(job, "induction", length=8, rows=1)
    assert selection.order[0] == (1, 1) and selection.scores[1][1] > 0.4 > 0.2 > selection.scores[0][0]


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({}, "best", "no selection method is called best; choose from greedy, gates"),
        ({"heads": 0}, "greedy", "heads=0, and the model's linear layers have 4 key/value heads; choose 1 to 4"),
        ({"heads": 5}, "random", "heads=5"),
        ({"samples": ()}, "greedy", "greedy selects heads by samples of recall, and there are none"),
        ({"samples": ()}, "gates", "gates selects heads by samples"),
        ({"text": None}, "perplexity", "perplexity selects heads by a text, and there is none"),
        ({"text": None}, "content_free", "content_free selects heads by a text"),
    ],
)
def test_what_is_missing_or_unknown_is_refused(job, change, method, message):
    with pytest.raises(ValueError, match=message):
        select_heads(replace(job, **change), method)


def test_heads_of_a_selection_and_of_a_budget(job):
    selection = replace(select_heads(job, "random"), order=[(1, 1), (0, 1), (1, 0), (0, 0)])
    assert [full_heads_of(selection, k) for k in (0, 1, 3)] == [[[], []], [[], [1]], [[1], [0, 1]]]
    with pytest.raises(ValueError, match="5 heads cannot be kept of 4"):
        full_heads_of(selection, 5)
    config = job.model.config  # heads of 8 numbers: 32 bytes a token in bfloat16
    assert [heads_within(budget, config, 2) for budget in (0, 31, 32, 95.5, 10_000)] == [0, 0, 1, 2, 4]
    assert heads_within(128, config, 4) == 2
    with pytest.raises(ValueError, match="negative"):
        heads_within(-1, config, 2)


def test_full_heads_are_what_open_gates_compute(job, tokens):
    """The gates of the kept heads at 1 and the rest at 0: what a model with these `full_heads` is to compute."""
    selection = select_heads(job, "random")
    kept = [(i, g) for i, heads in enumerate(full_heads_of(selection, 2)) for g in heads]
    assert sorted(selection.order[:2]) == kept
    with torch.no_grad(), head_gates(job.model, job.gates(kept=kept)):
        assert torch.isfinite(job.model(input_ids=tokens(30), use_cache=False).logits).all()
