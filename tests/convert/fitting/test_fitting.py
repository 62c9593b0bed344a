"""The memory's fit: labels against the removal of tokens, spreading against brute force, scores that find what matters."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import rows, tiny_config, tiny_model

from dijiang.common.recall import RecallSample
from dijiang.convert.fitting.fit import SIZES, FitSettings, error_curves, fit_memory, lost_by_slots
from dijiang.convert.fitting.labels import removal_labels, sampled_queries
from dijiang.convert.fitting.layer_weights import layer_weights
from dijiang.convert.fitting.score_fit import fit_scores
from dijiang.convert.fitting.slots import hull_gains, interpolate, spread_slots
from dijiang.convert.memories import with_memories
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.linear_attention_layer import linear_layers


def text_row(ids: torch.Tensor, answers=()) -> RecallSample:
    return RecallSample(input_ids=ids, answers=list(answers), depths=[0.0] * len(answers), chance=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_label_is_the_change_of_the_output_when_a_token_is_taken_out(seed):
    """Taking token j out moves the output by p (o - v) / (1 - p); the label leaves the last factor out."""
    T, W, S = 26, 5, 2
    q, k, v = (rows(1, T, heads, 8, seed=seed + i) for i, heads in enumerate((6, 2, 2)))
    o_proj = rows(20, 48, seed=seed + 9)
    queries = sampled_queries(T, [(3, 5)], window=W, every=3)
    assert queries.tolist() == sorted({2, 3, *range(W, T, 3)})
    labels, count = removal_labels(Projections(q, k, v, k), o_proj, queries, window=W, sinks=S, scaling=8**-0.5)
    expected, seen = torch.zeros(2, T), torch.zeros(T)
    for i, j in product(queries.tolist(), range(S, T)):
        if i - j < W:
            continue
        seen[j] += 1
        for h in range(6):
            scores = k[0, : i + 1, h // 3] @ q[0, i, h] * 8**-0.5
            weights = scores.softmax(0)
            without = scores.clone()
            without[j] = -torch.inf
            change = (weights - without.softmax(0)) @ v[0, : i + 1, h // 3] * (1 - weights[j])
            expected[h // 3, j] += (o_proj[:, 8 * h : 8 * h + 8] @ change).square().sum() / 3
    expected = (expected / seen.clamp(min=1)).sqrt()
    assert torch.equal(count, seen)
    torch.testing.assert_close(labels, expected, rtol=1e-4, atol=1e-5)


def test_scores_find_the_tokens_that_matter_although_they_are_rare():
    """One in fifty tokens has a label a hundred times the others', told by a direction of its value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3000, 16, generator=generator)
    rare = torch.rand(3000, generator=generator) < 0.02
    x[:, rare, 5] += 6.0
    y = torch.where(rare, 100.0, 1.0) * torch.rand(3, 3000, generator=generator)
    weights = fit_scores(x, y, torch.ones(3000), width=8, steps=200, batch=256)
    hidden = F.gelu(torch.einsum("nts,nws->ntw", x, weights.W_1) + weights.b_1.unsqueeze(1))
    scores = torch.einsum("ntw,nw->nt", hidden, weights.w_2)
    for head in range(3):
        best = scores[head].topk(int(rare.sum())).indices
        assert rare[best].float().mean() > 0.9
    again = fit_scores(x, y, torch.ones(3000), width=8, steps=200, batch=256)
    assert torch.equal(weights.W_1, again.W_1)


@pytest.mark.parametrize("seed", range(5))
def test_spreading_by_gain_is_the_best_spread_of_convex_curves(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, 4, 6, 8)
    curves = {}
    for head in range(3):
        gains = torch.rand(3, generator=generator).sort(descending=True).values.cumsum(0).tolist()
        curves[(0, head)] = [4.0, *(4.0 - gain for gain in gains)]
    slots = spread_slots(curves, sizes, 14, step=2, least=2)
    assert sum(slots.values()) == 14

    def error(numbers):
        return sum(interpolate(n, sizes, curve) for n, curve in zip(numbers, curves.values(), strict=True))

    best = min((x for x in product(sizes, repeat=3) if sum(x) == 14), key=error)
    assert error(slots.values()) == pytest.approx(error(best))


def test_spreading_looks_past_a_flat_piece_and_refuses_what_does_not_fit():
    assert hull_gains([3.0, 3.0, 0.0, 0.0]) == [1.5, 1.5, 0.0]
    assert interpolate(5, (2, 4, 8), (3.0, 1.0, 2.0)) == 1.0  # noise does not make a curve rise
    with pytest.raises(ValueError, match="100 slots cannot be spread over 1 heads with 2 to 8 each"):
        spread_slots({(0, 0): [1.0, 0.5]}, (2, 8), 100, step=2, least=2)


def test_layer_weights_are_the_gradients_of_a_known_model():
    """A layer whose output projection is zero costs nothing; weights have mean 1."""
    model = tiny_model(layer_types=["full_attention"] * 2, num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    weights = layer_weights(model, torch.arange(40))
    assert weights[0] == 0.0 and weights[1] == pytest.approx(2.0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def teacher_and_student():
    """A softmax model with heads that look far, and its weights in layers with a window of five tokens."""
    torch.manual_seed(0)
    teacher = tiny_model(layer_types=["full_attention"] * 2, attention_window=5, attention_sinks=2, branch_scale_init=-1e4)
    return teacher.requires_grad_(False), with_memories(teacher, layer_types="linear_attention")


@pytest.mark.parametrize("kept", [[], [1]])
@torch.no_grad()
def test_what_a_head_loses_is_what_the_layer_itself_is_off_by(kept):
    """Against the layer's own attention with as many slots, its part of the output projection, and the exact whole output."""
    settings = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "attention_window": 5}
    layer = tiny_model(**settings, attention_memory=1, memory_score="learned", full_heads=[kept, []]).model.layers[0].self_attn
    torch.nn.init.normal_(layer.memory_score.w_2)
    torch.nn.init.zeros_(layer.branch_scale.weight)
    torch.nn.init.constant_(layer.branch_scale.bias, -1e4)
    projected = Projections(*(rows(1, 90, heads, 8, seed=i) for i, heads in enumerate((6, 3, 3, 3))))
    queries, sizes = torch.tensor([3, 20, 47, 88]), (1, 4, 30)
    o_proj = layer.o_proj.weight
    errors = lost_by_slots(layer, projected, o_proj, queries, sizes)
    assert layer.slots == (1,) * (3 - len(kept)) and errors.shape == (3, 3 - len(kept))
    q, k, v = (x.transpose(1, 2) for x in projected[:3])
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[0, queries]
    whole = (exact.flatten(1) @ o_proj.T).square().sum(-1).mean()
    own_q, own_k, own_v, own_raw_k = (layer.take_linear_heads(x) for x in projected)
    for n, size in enumerate(sizes):
        layer.slots = (size,) * len(layer.linear_heads)
        o, _ = layer.attend(own_q, own_k, own_v, raw_k=own_raw_k)
        for i, head in enumerate(layer.linear_heads):
            off = o[0, queries, 2 * i : 2 * i + 2] - exact[:, 2 * head : 2 * head + 2]
            change = off.flatten(1) @ o_proj[:, 16 * head : 16 * head + 16].T
            torch.testing.assert_close(errors[n, i], change.square().sum(-1).mean() / whole, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_rows_count_the_same_in_the_errors_of_heads(teacher_and_student):
    teacher, student = teacher_and_student
    model = with_memories(student, attention_memory=1, memory_score="random")
    generator = torch.Generator().manual_seed(1)
    text, asked = (
        text_row(torch.randint(0, 97, (n,), generator=generator), a) for n, a in ((300, ()), (90, [(80, 84), (87, 88)]))
    )

    def curve(*rows_):
        return torch.tensor(list(error_curves(model, teacher, rows_, [1.0, 2.0], lambda done: None).values()))

    torch.testing.assert_close(curve(text, asked), curve(text) + curve(asked))


@torch.no_grad()
def test_errors_fall_with_slots_to_nothing(teacher_and_student):
    teacher, student = teacher_and_student
    model = with_memories(student, attention_memory=1, memory_score="random")
    row = text_row(torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1)))
    curves = error_curves(model, teacher, [row], [1.0, 2.0], lambda done: None)
    for errors in curves.values():
        assert len(errors) == len(SIZES) and errors[0] > 1e-3 and errors[-1] < 1e-9  # 512 slots hold all 300 tokens
        assert errors[0] > errors[2] > errors[3]
    assert all(layer.slots == (1, 1) for layer in linear_layers(model).values())


def test_fitted_memory_is_nearer_to_the_teacher_than_random_slots(teacher_and_student):
    teacher, student = teacher_and_student
    generator = torch.Generator().manual_seed(2)
    rows_ = [text_row(torch.randint(0, 97, (400,), generator=generator), [(390, 393)] if i == 1 else ()) for i in range(3)]
    settings = FitSettings(slots=48, least_slots=32, steps=120, width=8)
    fitted = fit_memory(student, teacher, rows_, settings, progress=False)
    model = fitted.with_slots(settings)
    slots = model.config.attention_memory
    assert sum(map(sum, slots)) == 4 * 48 and min(map(min, slots)) >= 32
    assert fitted.facts["tokens"] == 1200 and fitted.facts["seconds"]["all"] > 0
    ids = torch.randint(0, 97, (1, 350), generator=generator)
    with torch.no_grad():
        expected = teacher(ids).logits
        off = lambda m: (m(ids).logits - expected).square().mean().item()  # noqa: E731
        random = with_memories(model, memory_score="random")
        assert off(model) < 0.9 * off(random) < 0.9 * off(student)
    large = fitted.with_slots(FitSettings(slots=48, large_heads=((0, 1),), large_slots=400))
    assert large.config.attention_memory[0][1] == 400 and sum(map(sum, large.config.attention_memory)) == 400 + 3 * 48
    kept = fitted.with_slots(settings, [[1], []])
    assert kept.config.full_heads == [[1], []] and sum(map(sum, kept.config.attention_memory)) == 3 * 48


def test_what_cannot_be_fitted_is_refused_in_one_line(teacher_and_student):
    teacher, student = teacher_and_student
    with pytest.raises(ValueError, match="no text of 15 tokens or more, three windows"):
        fit_memory(student, teacher, [text_row(torch.arange(10))], progress=False)
    no_window = with_memories(student, attention_window=0, attention_sinks=0)
    with pytest.raises(ValueError, match="needs a window"):
        fit_memory(no_window, teacher, [text_row(torch.arange(90))], progress=False)
    assert tiny_config().attention_memory == 0
