"""The closed-form start, against loops over keys and cases whose answer is known."""

import math

import pytest
import torch

from dijiang.modeling import DiJiangConfig
from dijiang.modeling.feature_maps import build_feature_map
from dijiang.modeling.linear_layer import DiJiangLinearAttention
from dijiang.train import calibrate
from dijiang.train.calibrate import calibrate_layer, far_log_sum, linear_log_sum

HEADS, GROUPS, DIM = 4, 2, 8


def make_config(**settings) -> DiJiangConfig:
    shape = {"hidden_size": 32, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 1}
    return DiJiangConfig(**shape | {"attention_window": 5, "attention_sinks": 2} | settings)


def make_layer(seed: int = 0, **settings) -> DiJiangLinearAttention:
    """A layer whose kernel parameters have moved from their start."""
    layer = DiJiangLinearAttention(make_config(**settings), layer_idx=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (layer.feature_map_q, layer.feature_map_k, layer.key_scale):
            for parameter in part.parameters() if part is not None else ():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def make_qk(T: int, B: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with a mean of their own in every head, as pretrained models have."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, T, heads, DIM, generator=generator) for heads in (HEADS, GROUPS))
    return q + torch.randn(HEADS, DIM, generator=generator), k + torch.randn(GROUPS, DIM, generator=generator)


def far_keys(query: int, window: int, sinks: int) -> list[int]:
    return [key for key in range(query + 1) if key <= query - window and key >= sinks]


WINDOWS = [(5, 2), (3, 0), (1, 4), (7, 7)]


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
@pytest.mark.parametrize("at_once", [4, 256])
def test_far_log_sum_equals_loops(monkeypatch, window, sinks, at_once):
    monkeypatch.setattr(calibrate, "QUERIES_AT_ONCE", at_once)
    layer = make_layer(attention_window=window, attention_sinks=sinks)
    q, k = make_qk(19)
    found = far_log_sum(layer, q, k)
    assert found.shape == (2, 19, HEADS)
    for b in range(2):
        for t in range(19):
            for h in range(HEADS):
                scores = [(q[b, t, h] @ k[b, j, h // 2]).item() / math.sqrt(DIM) for j in far_keys(t, window, sinks)]
                expected = math.log(sum(map(math.exp, scores))) if scores else -math.inf
                assert found[b, t, h].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("decay", ["none", "retnet"])
@pytest.mark.parametrize("feature_map", ["wdcf", "hedgehog"])
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_linear_log_sum_equals_loops(window, sinks, feature_map, decay):
    layer = make_layer(attention_window=window, attention_sinks=sinks, feature_map=feature_map, decay=decay)
    q, k = make_qk(19)
    q = q * DIM**-0.25
    with torch.no_grad():
        found = linear_log_sum(layer, q, k)
        phi_q, scaled_k = layer.feature_map_q(q), k * DIM**-0.25
        phi_k, log_weight = layer.feature_map_k(scaled_k), layer.key_scale(scaled_k)
        log_decay = torch.zeros(GROUPS) if decay == "none" else layer.decay()
    assert found.shape == (2, 19, HEADS)
    for b in range(2):
        for t in range(19):
            for h in range(HEADS):
                g, keys = h // 2, far_keys(t, window, sinks)
                terms = [
                    (phi_q[b, t, h] @ phi_k[b, j, g]).item() * math.exp(log_weight[b, j, g] + (t - window - j) * log_decay[g])
                    for j in keys
                ]
                if terms:
                    assert found[b, t, h].item() == pytest.approx(math.log(sum(terms)), abs=2e-5)
                else:
                    assert found[b, t, h] < math.log(1e-29)


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("feature_map", ["wdcf", "wpff"])
def test_a_centred_map_is_the_map_of_centred_inputs(feature_map, pairs, activation):
    config = make_config(feature_map=feature_map, feature_pairs=pairs, feature_activation=activation, feature_dim=11)
    x = make_qk(30)[0]
    mean = x.mean((0, 1))
    centred, plain = (build_feature_map(config, HEADS, 3) for _ in range(2))
    centred.center(mean)
    with torch.no_grad():
        assert (centred(x) - plain(x - mean)).abs().max() < 1e-5 * plain(x - mean).max()
        assert (centred(x) - plain(x)).abs().max() > 0.01


@pytest.mark.parametrize("feature_map", ["pff", "prf", "hedgehog", "elu"])
def test_maps_without_weights_are_not_centred(feature_map):
    layer_map = build_feature_map(make_config(feature_map=feature_map), HEADS, 3)
    before = {name: tensor.clone() for name, tensor in layer_map.state_dict().items()}
    layer_map.center(torch.ones(HEADS, DIM))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer_map.state_dict().items())


def test_key_scale_takes_the_mean_query_over():
    """exp(m_q.k) up to the constant exp(m_q.m_k), m_q the mean over the query heads that share the key head."""
    layer = make_layer()
    q, k = make_qk(40)
    calibrate_layer(layer, q, k, quiet=0.0)
    for g in range(GROUPS):
        mean_q = q[:, :, 2 * g : 2 * g + 2].mean((0, 1, 2)) * DIM**-0.25
        key = k[1, 7, g] * DIM**-0.25
        expected = mean_q @ (key - k[:, :, g].mean((0, 1)) * DIM**-0.25)
        found = layer.key_scale((k * DIM**-0.25)[1:, 7:8])[0, 0, g]
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def same_keys(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loud queries, and per key/value head one key all along."""
    generator = torch.Generator().manual_seed(2)
    q = 10 * torch.randn(1, T, HEADS, DIM, generator=generator)
    return q, torch.randn(1, 1, GROUPS, DIM, generator=generator).expand(1, T, GROUPS, DIM)


@pytest.mark.parametrize("quiet", [0.0, 2.0])
def test_a_linear_scale_is_recovered(quiet):
    """
    With a flat map and one key k0, log(sum exp(q.k0)) - log(n / M) = q.k0 + log M, where the M features of one row sum to 1:
    so w is k0, scaled, and b is log M, less what the branch is to start below that.
    """
    layer = DiJiangLinearAttention(make_config(), layer_idx=0)
    with torch.no_grad():
        layer.feature_map_q.T.zero_()
        layer.feature_map_k.T.zero_()
    q, k = same_keys(400)
    fit = calibrate_layer(layer, q, k, quiet)
    assert fit == pytest.approx(1.0, abs=1e-4)
    wanted = (k[0, 0] * DIM**-0.25).repeat_interleave(2, dim=0)
    assert (layer.branch_scale.weight - wanted).abs().max() < 0.01 * wanted.abs().max()
    assert (layer.branch_scale.bias - (math.log(layer.feature_map_q.size) - quiet)).abs().max() < 0.02


def test_the_fit_is_the_least_squares_solution_of_another_library():
    """On text-like inputs: the coefficients that scipy finds, and the R^2 by its definition."""
    from scipy.linalg import lstsq

    layer = make_layer()
    q, k = make_qk(120)
    fit = calibrate_layer(layer, q, k, quiet=0.0)
    scaled = q * DIM**-0.25
    with torch.no_grad():
        gap = (far_log_sum(layer, q, k) - linear_log_sum(layer, scaled, k))[:, 7:]
    shares = []
    for h in range(HEADS):
        x = torch.cat((scaled[:, 7:, h], torch.ones(2, 113, 1)), dim=-1).flatten(0, 1).numpy()
        y = gap[:, :, h].flatten().numpy()
        solution = lstsq(x, y)[0]
        shares.append(1 - ((y - x @ solution) ** 2).mean() / y.var())
        found = torch.cat((layer.branch_scale.weight[h], layer.branch_scale.bias[h : h + 1])).detach().numpy()
        assert abs(found - solution).max() < 0.02 * abs(solution).max()  # ours has a small ridge
    assert fit == pytest.approx(sum(shares) / HEADS, abs=0.01) and 0.3 < fit < 1


def test_calibration_brings_the_branches_into_one_unit():
    """The far keys' weight by the linear branch, exp(c(q)) phi(q).sum phi(k), is near the softmax's, and is not before."""
    layer = make_layer(branch_scale_init=0.0)
    q, k = make_qk(200)
    scaled = q * DIM**-0.25

    def error() -> float:
        with torch.no_grad():
            ours = layer.branch_scale(scaled) + linear_log_sum(layer, scaled, k)
        return (ours - far_log_sum(layer, q, k))[:, 7:].abs().mean().item()

    before = error()
    calibrate_layer(layer, q, k, quiet=0.0)
    assert error() < 0.5 < 2.0 < before


def test_only_the_map_and_the_scales_are_set():
    layer = make_layer(decay="learned")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    calibrate_layer(layer, *make_qk(40), quiet=1.0)
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    maps = {"feature_map_q.log_D", "feature_map_k.log_D"}
    assert changed == maps | {"key_scale.weight", "key_scale.bias", "branch_scale.weight", "branch_scale.bias"}
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_half_precision_inputs_are_summed_in_float32():
    q, k = (x.bfloat16() for x in make_qk(60))
    one, other = make_layer(), make_layer()
    assert calibrate_layer(one, q, k, 0.0) == pytest.approx(calibrate_layer(other, q.float(), k.float(), 0.0), rel=1e-6)
    for part in ("feature_map_q", "feature_map_k", "key_scale", "branch_scale"):
        for name, tensor in getattr(one, part).state_dict().items():
            assert torch.allclose(tensor, getattr(other, part).state_dict()[name], rtol=1e-5, atol=1e-5), f"{part}.{name}"


def test_without_a_window_there_is_no_scale_to_fit():
    layer = make_layer(attention_window=0, attention_sinks=0)
    before = layer.feature_map_q.log_D.clone()
    assert calibrate_layer(layer, *make_qk(4), quiet=1.0) is None
    assert not torch.equal(layer.feature_map_q.log_D, before) and layer.branch_scale is None


def test_blocks_too_short_for_the_window():
    layer = make_layer()
    with pytest.raises(ValueError, match="^blocks of 13 tokens are too short for a window of 5; use longer blocks$"):
        calibrate_layer(layer, *make_qk(13), quiet=1.0)
    assert calibrate_layer(layer, *make_qk(14), quiet=1.0) is not None
