"""Attention maps against transformers' own, against what the layers do to values, and against formulas written out."""

import json
import math

import numpy as np
import pytest
import torch
from dijiang_testing.model_checks import rows
from transformers import AutoModelForCausalLM

from dijiang.convert import load_source
from dijiang.evaluate.feature_map_study.inputs import capture
from dijiang.evaluate.quality.ablations import linear_only, window_only
from dijiang.evaluate.quality.attention_maps import (
    attention_map,
    effective_context,
    map_distance,
    mean_over_rows,
    measure_maps,
    pack_map,
    performer_map,
    relative_weights,
    unpack_map,
    visible,
)
from dijiang.modeling import DiJiangConfig
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention

B, T, H, G, D = 2, 37, 6, 2, 8  # T is a multiple of neither the head size nor any window below


def linear_layer(seed: int = 0, **settings) -> DiJiangLinearAttention:
    """A layer whose parameters have moved away from their start, its linear branch loud."""
    settings = {"head_dim": D, "feature_dim": 11, "attention_window": 5, "attention_sinks": 2} | settings
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": H, "num_key_value_heads": G}
    torch.manual_seed(seed)
    layer = DiJiangLinearAttention(DiJiangConfig(**sizes, branch_scale_init=0.5, **settings), 0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "feature_map" in name or "scale" in name or "decay" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return layer


def queries_and_keys(seed: int, d: int = D, scale: float = 1.0, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(B, tokens, H, d, seed=seed, scale=scale), rows(B, tokens, G, d, seed=seed + 1, scale=scale)


def softmax_map(q, k, seen: np.ndarray) -> np.ndarray:
    """Softmax over the keys in `seen` (T, T), (B, H, T, T), head by head in float64."""
    q, k = q.double().numpy(), k.double().numpy()
    found = np.zeros((q.shape[0], q.shape[2], *seen.shape))
    for b, h in np.ndindex(found.shape[:2]):
        weights = np.where(seen, np.exp(q[b, :, h] @ k[b, :, h * k.shape[2] // q.shape[2]].T / math.sqrt(q.shape[3])), 0.0)
        found[b, h] = weights / weights.sum(1, keepdims=True)
    return found


def seen_by(tokens: int, window: int, sinks: int = 0) -> np.ndarray:
    return np.array([[j <= i and (i - j < window or j < sinks) for j in range(tokens)] for i in range(tokens)])


# --- maps of softmax layers ---


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 7}),
    ],
)
def test_the_teachers_maps_are_those_of_transformers(family, settings, make_source, tokens):
    folder, _ = make_source(family, seed=3, **settings)
    source = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = source(tokens(23), output_attentions=True).attentions
    model, _ = load_source(folder)
    captured = capture(model, tokens(23))
    assert len(captured) == len(expected) == 2
    for layer, (q, k, _), theirs in zip(model.model.layers, captured, expected, strict=True):
        found = attention_map(layer.self_attn, q, k)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)
        assert (found[theirs == 0.0] == 0.0).all()
    beyond = attention_map(model.model.layers[0].self_attn, *captured[0][:2])[..., 10, :4]
    assert (beyond == 0.0).all() == (family == "mistral")


# --- maps of linear layers ---

LAYERS = {
    "wdcf": {},
    "wdcf without sinks": {"attention_sinks": 0},
    "wdcf without window": {"attention_window": 0, "attention_sinks": 0},
    "exponential": {"feature_map": "wpff", "feature_activation": "exp", "key_scale": False},
    "relu": {"feature_map": "relu", "feature_pairs": False, "attention_window": 4},
    "cosformer": {"feature_map": "cosformer", "feature_dim": D, "feature_pairs": False},
    "identity": {"feature_map": "identity", "feature_dim": D, "normalize": False, "attention_window": 0, "attention_sinks": 0},
    "learned decay": {"decay": "learned"},
    "decay without window": {"decay": "retnet", "attention_window": 0, "attention_sinks": 0},
    "the C kernel": {"head_dim": 16, "feature_dim": 16},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_linear_layers_map_times_values_is_what_it_attends(name):
    for seed in (0, 1):
        layer = linear_layer(seed, **LAYERS[name])
        d = layer.head_dim
        q, k = queries_and_keys(seed, d)
        v = rows(B, T, G, d, seed=seed + 7)
        weights = attention_map(layer, q, k)
        assert weights.shape == (B, H, T, T) and not weights.requires_grad
        expected = layer.attend(q, k, v)[0].detach()
        found = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(H // G, dim=2))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (weights.triu(1) < 1e-30).all()  # exp of the C code ends at exp(-87)
        if layer.normalize:
            assert (weights >= 0.0).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wdcf without window", "identity", "decay without window"])
def test_without_a_window_the_map_is_the_formula(name):
    layer = linear_layer(2, **LAYERS[name])
    q, k = queries_and_keys(5)
    with torch.no_grad():
        phi_q, phi_k = layer.feature_map_q(q, None, layer.feature_scale), layer.key_features(k)
        rate = torch.zeros(G) if layer.decay is None else layer.decay()
    found = attention_map(layer, q, k)
    for b, h in np.ndindex(B, H):
        g = h * G // H
        weights = (phi_q[b, :, h].double() @ phi_k[b, :, g].double().T).tril()
        age = torch.arange(T)[:, None] - torch.arange(T)
        weights = weights * (rate[g].double() * age.clamp_min(0)).exp()
        expected = weights / weights.sum(-1, keepdim=True) if layer.normalize else weights
        torch.testing.assert_close(found[b, h].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sinks", [0, 2])
def test_without_the_linear_branch_the_map_is_softmax_on_window_and_sinks(sinks):
    layer = linear_layer(3, attention_sinks=sinks)
    q, k = queries_and_keys(8)
    with window_only(layer):
        found = attention_map(layer, q, k).numpy()
    seen = seen_by(T, 5, sinks)
    assert (found[..., ~seen] == 0.0).all()
    np.testing.assert_allclose(found, softmax_map(q, k, seen), rtol=1e-4, atol=1e-6)
    assert (attention_map(layer, q, k).numpy()[..., ~seen & seen_by(T, T)] > 0.0).all()  # the branch is back


def test_the_linear_branch_alone_is_a_layer_without_window():
    layer, without = linear_layer(4), linear_layer(4, attention_window=0, attention_sinks=0)
    without.load_state_dict(layer.state_dict(), strict=False)
    q, k = queries_and_keys(9)
    with linear_only(layer):
        assert torch.equal(attention_map(layer, q, k), attention_map(without, q, k))
    assert (attention_map(layer, q, k) - attention_map(without, q, k)).abs().max() > 0.01


# --- the Performer ---


def performer_error(q, k, features: int, seeds: range) -> float:
    exact = softmax_map(q, k, seen_by(q.shape[1], q.shape[1]))
    found = [performer_map(q, k, features=features, seed=seed).numpy() - exact for seed in seeds]
    return float(np.sqrt(np.mean(np.square(found))))


def test_the_performer_tends_to_softmax():
    q, k = queries_and_keys(10, scale=0.4, tokens=11)
    few, many = (performer_error(q, k, features, range(8)) for features in (128, 128 * 64))
    assert many < 0.003 and 6.5 < few / many < 9.5  # 1 / sqrt(m) makes it 8


def test_the_performers_map_is_causal_and_its_heads_are_independent():
    q, k = queries_and_keys(11)
    q, k = q[:, :, :1].expand(-1, -1, H, -1), k[:, :, :1].expand(-1, -1, G, -1)
    weights = performer_map(q, k, features=9, seed=1)
    assert weights.shape == (B, H, T, T) and weights.dtype == torch.float32 and (weights.triu(1) == 0.0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T), rtol=0, atol=1e-5)
    assert all((weights[:, h] - weights[:, 0]).abs().max() > 0.01 for h in range(1, H))
    assert torch.equal(weights, performer_map(q, k, features=9, seed=1))
    assert not torch.equal(weights, performer_map(q, k, features=9, seed=2))


def test_the_performer_is_its_formula_where_float32_has_no_such_numbers():
    """Its only head's weights against sums of exponentials of logarithms, for exponents of hundreds."""
    q, k = (x[:1, :, :1] for x in queries_and_keys(12, scale=25.0, tokens=9))
    found = performer_map(q, k, features=5, seed=3)[0, 0].numpy()
    W = torch.randn(5, D, generator=torch.Generator().manual_seed(3)).double().numpy()
    x, y = (part[0, :, 0].double().numpy() * D**-0.25 for part in (q, k))
    log_q, log_k = (part @ W.T - np.square(part).sum(1, keepdims=True) / 2 for part in (x, y))
    assert log_k.max() - log_k.min() > 200
    log_kernel = np.logaddexp.reduce(log_q[:, None] + log_k[None], axis=-1)
    for i in range(9):
        expected = np.exp(log_kernel[i, : i + 1] - np.logaddexp.reduce(log_kernel[i, : i + 1]))
        np.testing.assert_allclose(found[i, : i + 1], expected, rtol=1e-3, atol=1e-4)


# --- numbers ---


def random_map(seed: int, tokens: int = 23) -> torch.Tensor:
    """(B, 3, tokens, tokens), random causal rows that sum to one."""
    rng = np.random.default_rng(seed)
    weights = np.tril(rng.random((B, 3, tokens, tokens)) ** 8)
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()


def test_distance_is_total_variation():
    first, second = random_map(0), random_map(1)
    assert (map_distance(first, first) == 0.0).all()
    own, before = torch.eye(12).expand(B, 3, 12, 12), torch.eye(12).roll(1, 0).expand(B, 3, 12, 12)
    torch.testing.assert_close(map_distance(own, before), torch.ones(3))
    # the largest difference that any set of keys can show
    largest = (first - second).clamp_min(0).sum(-1).mean((0, 2))
    torch.testing.assert_close(map_distance(first, second), largest, rtol=1e-4, atol=1e-6)
    half = torch.eye(12).add(torch.eye(12).roll(1, 0)).expand(B, 3, 12, 12) / 2
    torch.testing.assert_close(map_distance(own, half), torch.full((3,), 0.5))


def test_rows_are_compared_by_their_proportions():
    weights = random_map(2)
    factors = torch.rand(B, 3, 23, 1, generator=torch.Generator().manual_seed(0)) * 9 + 0.1
    torch.testing.assert_close(relative_weights(weights * factors), weights)
    signs = torch.tensor([1.0, -1.0]).repeat(12)[:23]
    torch.testing.assert_close(relative_weights(weights * factors * signs), weights * signs)
    assert (relative_weights(torch.zeros(1, 1, 2, 2)) == 0.0).all()
    assert map_distance(weights, relative_weights(-weights)) == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("tokens", [40, 41])
def test_effective_context_of_maps_made_by_hand(tokens):
    def context(weights: np.ndarray) -> float:
        return effective_context(torch.from_numpy(weights).float().expand(B, 1, tokens, tokens)).item()

    rest = np.arange(tokens // 4, tokens) + 1  # keys that the rows after the warm-up see
    assert context(np.eye(tokens)) == 1
    for window, expected in ((2, 2), (7, 7), (10, 9), (20, 18)):  # of ten equal keys, nine hold 90 %
        band = seen_by(tokens, window) / seen_by(tokens, window).sum(1, keepdims=True)
        assert context(band) == expected
    first = np.zeros((tokens, tokens))
    first[:, 0] = 1.0
    assert context(first) == np.median(rest)
    assert context(0.05 * first + 0.95 * np.eye(tokens)) == 1
    assert context(0.5 * first + 0.5 * np.eye(tokens)) == np.median(rest)
    even = seen_by(tokens, tokens) / np.arange(1, tokens + 1)[:, None]
    assert context(even) == np.median(np.ceil(0.9 * rest - 1e-9))
    assert context(-even) == context(even)


def test_effective_context_against_a_loop():
    weights = random_map(3)
    found = []
    for h in range(3):
        reach = []
        for b in range(B):
            for i in range(23 // 4, 23):
                row = weights[b, h, i].double().numpy()
                reach.append(next(r for r in range(1, i + 2) if row[i + 1 - r : i + 1].sum() >= 0.9))
        found.append(np.median(reach))
    assert effective_context(weights).tolist() == found
    assert len(set(found)) > 1


def test_a_row_without_weight_reaches_back_to_the_start():
    assert effective_context(torch.zeros(1, 1, 9, 9)).item() == np.median(np.arange(2, 9) + 1)


def test_mean_over_rows_leaves_the_first_quarter_out():
    weights, beyond = random_map(4), torch.from_numpy(~seen_by(23, 4, 2))
    found = mean_over_rows(-weights, beyond.float())
    for h in range(3):
        pairs = [(i, j) for i in range(5, 23) for j in range(2, i + 1) if i - j >= 4]
        expected = sum(weights[:, h, i, j].sum().item() for i, j in pairs) / (18 * B)
        assert found[h].item() == pytest.approx(expected, rel=1e-4)
    assert (visible(23, 4, 2).numpy() == seen_by(23, 4, 2)).all() and (visible(23).numpy() == seen_by(23, 23)).all()


def test_packed_maps_come_back():
    weights = random_map(5)[0]
    record = json.loads(json.dumps(pack_map(weights)))
    found = unpack_map(record)
    assert found.shape == (3, 23, 23) and (found[:, *np.triu_indices(23, 1)] == 0.0).all()
    assert np.abs(found - weights.numpy()).max() <= 1 / 255
    assert np.abs(np.sqrt(found) - weights.sqrt().numpy()).max() <= 1 / 510 + 1e-6
    exact = torch.tensor([[[0.0, 1.0], [4 / 255**2, 9 / 255**2]]])
    np.testing.assert_allclose(unpack_map(pack_map(-exact)), exact.numpy(), rtol=1e-6)


# --- the measurement ---

SIDES = ("effective_context", "effective_context_past_sinks", "mean_distance", "beyond_window")


def test_measured_numbers_are_those_of_the_models_own_maps(pair, tokens):
    ids, done = tokens(25), []
    teacher, student = load_source(pair.teacher)[0], load_source(pair.checkpoint)[0]
    result = measure_maps(teacher, student, ids, keep_layers=1, keep_tokens=9, advance=done.append)
    assert result == json.loads(json.dumps(result)) and done == [1, 1]
    facts = {"tokens": 25, "rows": 2, "window": 4, "sinks": 2, "features": 16}
    assert {key: result[key] for key in facts} == facts
    source = AutoModelForCausalLM.from_pretrained(pair.teacher, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = source(ids, output_attentions=True).attentions
    assert [*result["layers"][0]["distance"]] == ["student", "performer", "window_sinks"]
    for i, measured in enumerate(result["layers"]):
        assert (measured["layer"], measured["layer_type"]) == (i, "linear_attention")
        (q, k, _), own = capture(teacher, ids)[i], capture(student, ids)[i]
        exact = theirs[i].double().numpy()
        maps = {
            "student": attention_map(student.model.layers[i].self_attn, *own[:2]).double().numpy(),
            "performer": performer_map(q, k, features=16, seed=i).double().numpy(),
            "window_sinks": softmax_map(q, k, seen_by(25, 4, 2)),
        }
        for side, weights in maps.items():
            expected = np.abs(weights - exact).sum(-1).mean((0, 2)) / 2
            np.testing.assert_allclose(measured["distance"][side], expected, atol=2e-5)
        for side, weights in (("teacher", exact), ("student", maps["student"])):
            weights = torch.from_numpy(weights)
            past_sinks = weights * (torch.arange(25) >= 2)
            expected = {
                "effective_context": effective_context(weights),
                "effective_context_past_sinks": effective_context(past_sinks / past_sinks.sum(-1, keepdim=True)),
                "mean_distance": mean_over_rows(weights, torch.arange(25)[:, None] - torch.arange(25.0)),
                "beyond_window": mean_over_rows(weights, torch.from_numpy(~seen_by(25, 4, 2))),
            }
            for name in SIDES:
                np.testing.assert_allclose(measured[name][side], expected[name], atol=2e-5, rtol=1e-4)
    assert list(result["maps"]) == ["1"] and list(result["maps"]["1"]) == ["teacher", "student", "performer"]
    kept = unpack_map(result["maps"]["1"]["teacher"])
    assert kept.shape == (4, 9, 9) and np.abs(kept - theirs[1][0, :, :9, :9].numpy()).max() <= 1 / 255


def test_a_model_is_at_no_distance_from_itself(pair, tokens):
    teacher = load_source(pair.teacher)[0]
    for measured in measure_maps(teacher, teacher, tokens(17))["layers"]:
        assert measured["distance"]["student"] == [0.0] * 4 and min(measured["distance"]["performer"]) > 0.01
        assert measured["layer_type"] == "full_attention"
        assert all(measured[name]["teacher"] == measured[name]["student"] for name in SIDES)


def test_ablations_are_measured_as_they_are(pair, tokens):
    """A first layer, whose inputs are the teacher's, is the training-free softmax without its linear branch."""
    teacher, student = load_source(pair.teacher)[0], load_source(pair.checkpoint)[0]
    with window_only(student):
        layers = measure_maps(teacher, student, tokens(25))["layers"]
    np.testing.assert_allclose(layers[0]["distance"]["student"], layers[0]["distance"]["window_sinks"], atol=2e-5)
    assert all(layer["beyond_window"]["student"] == [0.0] * 4 for layer in layers)
    with linear_only(student):
        alone = measure_maps(teacher, student, tokens(25))["layers"]
    assert all(min(layer["beyond_window"]["student"]) > 0.2 for layer in alone)


@pytest.mark.parametrize(("keep", "expected"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (9, [0, 1, 2, 3, 4, 5])])
def test_kept_layers_are_spread_over_the_depth(keep, expected, make_source, tokens):
    model, _ = load_source(make_source(num_hidden_layers=6)[0])
    assert list(measure_maps(model, model, tokens(8), keep_layers=keep)["maps"]) == [str(i) for i in expected]


def test_models_of_other_shapes_are_refused(pair, make_source, tokens, refused, tmp_path):
    other, _ = load_source(make_source(num_hidden_layers=3)[0])
    teacher, _ = load_source(pair.teacher)
    message = "^teacher and student have 3 layers of 4 heads and 2 layers of 4 heads; compare a student with the teacher that"
    refused(tmp_path, lambda: measure_maps(other, teacher, tokens(8)), message)
