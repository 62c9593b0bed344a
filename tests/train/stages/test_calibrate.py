"""The closed-form start, against loops over keys and cases whose answer is known."""

import math

import pytest
import torch

from dijiang.modeling import DiJiangConfig
from dijiang.modeling.feature_maps import build_feature_map
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention
from dijiang.train.stages import calibrate
from dijiang.train.stages.calibrate import calibrate_layer, linear_log_sum, softmax_log_sum

HEADS, GROUPS, DIM = 4, 2, 8


def make_config(**settings) -> DiJiangConfig:
    shape = {"hidden_size": 32, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 1}
    return DiJiangConfig(**shape | {"attention_window": 5, "attention_sinks": 2} | settings)


def make_layer(seed: int = 0, **settings) -> DiJiangLinearAttention:
    """A layer whose added parameters have moved from their start."""
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
def test_softmax_log_sum_equals_loops(monkeypatch, window, sinks, at_once):
    monkeypatch.setattr(calibrate, "QUERIES_AT_ONCE", at_once)
    layer = make_layer(attention_window=window, attention_sinks=sinks)
    q, k = make_qk(19)
    found = softmax_log_sum(layer, q, k)
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
    with torch.no_grad():
        found = linear_log_sum(layer, q, k)
        phi_q, scaled_k = layer.feature_map_q(q * DIM**-0.25), k * DIM**-0.25
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
@pytest.mark.parametrize("feature_map", ["wdcf", "ldcf", "wpff"])
def test_a_centered_map_is_the_map_of_centered_inputs(feature_map, pairs, activation):
    config = make_config(feature_map=feature_map, feature_pairs=pairs, feature_activation=activation, feature_dim=11)
    x = make_qk(30)[0]
    mean = x.mean((0, 1))
    centered, plain = (build_feature_map(config, HEADS, 3) for _ in range(2))
    centered.center(mean)
    with torch.no_grad():
        assert (centered(x) - plain(x - mean)).abs().max() < 1e-5 * plain(x - mean).max()
        assert (centered(x) - plain(x)).abs().max() > 0.01


@pytest.mark.parametrize("feature_map", ["pff", "prf", "hedgehog", "elu", "relu", "cosformer"])
def test_maps_without_weights_are_not_centered(feature_map):
    layer_map = build_feature_map(make_config(feature_map=feature_map), HEADS, 3)
    before = {name: tensor.clone() for name, tensor in layer_map.state_dict().items()}
    layer_map.center(torch.ones(HEADS, DIM))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer_map.state_dict().items())


def softmax_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What causal softmax attention gives, (B, T, H, d)."""
    q, k, v = (x.float().transpose(1, 2).repeat_interleave(HEADS // x.shape[2], dim=1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def calibrated(layer: DiJiangLinearAttention, q: torch.Tensor, k: torch.Tensor, offset: float = 0.0) -> float | None:
    """Calibrate with random values, towards their softmax attention."""
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(3)).to(k.dtype)
    return calibrate_layer(layer, q, k, v, softmax_output(q, k, v), offset)


def test_key_scale_takes_the_mean_query_over():
    """exp(m_q.k) up to the constant exp(m_q.m_k), m_q the mean over the query heads that share the key head."""
    layer = make_layer()
    q, k = make_qk(40)
    calibrated(layer, q, k)
    for g in range(GROUPS):
        mean_q = q[:, :, 2 * g : 2 * g + 2].mean((0, 1, 2)) * DIM**-0.25
        key = k[1, 7, g] * DIM**-0.25
        expected = mean_q @ (key - k[:, :, g].mean((0, 1)) * DIM**-0.25)
        found = layer.key_scale((k * DIM**-0.25)[1:, 7:8])[0, 0, g]
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_maps_are_centered_on_the_mean_query_and_key():
    layer, plain = make_layer(), make_layer()
    q, k = make_qk(40)
    calibrated(layer, q, k)
    with torch.no_grad():
        for part, x in (("feature_map_q", q * DIM**-0.25), ("feature_map_k", k * DIM**-0.25)):
            centered, fresh = getattr(layer, part), getattr(plain, part)
            fresh.T.copy_(centered.T)
            fresh.log_D.zero_()
            assert (centered(x) - fresh(x - x.mean((0, 1)))).abs().max() < 1e-5


def same_keys(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loud queries, and per key/value head one key all along."""
    generator = torch.Generator().manual_seed(2)
    q = 10 * torch.randn(1, T, HEADS, DIM, generator=generator)
    return q, torch.randn(1, 1, GROUPS, DIM, generator=generator).expand(1, T, GROUPS, DIM)


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_a_linear_scale_is_recovered(offset):
    """
    With a flat map and one key k0, log(sum exp(q.k0)) - log(n / M) = q.k0 + log M, where the M features of one row sum to 1:
    so w is k0, scaled, and b is log M, less what the branch is to start below that.
    """
    layer = DiJiangLinearAttention(make_config(), layer_idx=0)
    with torch.no_grad():
        layer.feature_map_q.T.zero_()
        layer.feature_map_k.T.zero_()
    q, k = same_keys(400)
    assert calibrated(layer, q, k, offset) == pytest.approx(1.0, abs=1e-4)
    scaled_key = (k[0, 0] * DIM**-0.25).repeat_interleave(2, dim=0)
    assert (layer.branch_scale.weight - scaled_key).abs().max() < 0.01 * scaled_key.abs().max()
    assert (layer.branch_scale.bias - (math.log(layer.feature_map_q.size) - offset)).abs().max() < 0.02


def test_the_fit_is_the_least_squares_solution_of_another_library():
    """On text-like inputs: the coefficients that scipy finds, and the R^2 by its definition."""
    from scipy.linalg import lstsq

    layer = make_layer()
    q, k = make_qk(120)
    fit = calibrated(layer, q, k)
    scaled = q * DIM**-0.25
    with torch.no_grad():
        gap = (softmax_log_sum(layer, q, k) - linear_log_sum(layer, q, k))[:, 7:]
    shares = []
    for h in range(HEADS):
        x = torch.cat((scaled[:, 7:, h], torch.ones(2, 113, 1)), dim=-1).flatten(0, 1).numpy()
        y = gap[:, :, h].flatten().numpy()
        solution = lstsq(x, y)[0]
        shares.append(1 - ((y - x @ solution) ** 2).mean() / y.var())
        found = torch.cat((layer.branch_scale.weight[h], layer.branch_scale.bias[h : h + 1])).detach().numpy()
        assert abs(found - solution).max() < 0.02 * abs(solution).max()  # ours has a small ridge
    assert fit == pytest.approx(sum(shares) / HEADS, abs=0.01) and 0.3 < fit < 1


@pytest.mark.parametrize(("feature_map", "window"), [("wdcf", 5), ("ldcf", 5), ("wpff", 5), ("wdcf", 0)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_multiple_of_T_is_the_best_of_those_tried(monkeypatch, feature_map, window, scale):
    settings = {"feature_map": feature_map, "attention_window": window, "attention_sinks": min(window, 2)}
    q, k = (scale * x for x in make_qk(60))
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(3))
    target, start = softmax_output(q, k, v), make_layer(**settings).feature_map_q.T.detach()

    def tried(*multiples: float) -> tuple[float, float, float | None]:
        """(error, multiple that was taken, fit) with these multiples to choose from."""
        monkeypatch.setattr(calibrate, "T_SCALES", multiples)
        layer = make_layer(**settings)
        fit = calibrate_layer(layer, q, k, v, target, offset=0.5)
        with torch.no_grad():
            error = (layer.attend(q, k, v)[0] - target).square().mean().item()
        return error, (layer.feature_map_q.T / start).mean().item(), fit

    one_by_one = [tried(multiple) for multiple in (1.0, 2.0, 4.0)]
    assert [multiple for _, multiple, _ in one_by_one] == pytest.approx([1.0, 2.0, 4.0])
    assert tried(1.0, 2.0, 4.0) == pytest.approx(min(one_by_one, key=lambda found: found[0]))
    assert tried(4.0, 2.0, 1.0) == pytest.approx(min(one_by_one, key=lambda found: found[0]))


def test_different_inputs_want_different_multiples_of_T():
    """Else nothing is gained by trying."""
    multiples = set()
    for scale in (0.3, 1.0, 3.0):
        layer = make_layer(feature_dim=32)
        start = layer.feature_map_q.T.clone()
        calibrated(layer, *(scale * x for x in make_qk(80)))
        multiples.add(round((layer.feature_map_q.T / start).mean().item()))
    assert len(multiples) > 1


def test_calibration_brings_the_branches_into_one_unit():
    """The far keys' weight by the linear branch, exp(c(q)) phi(q).sum phi(k), is near the softmax's, and is not before."""
    layer = make_layer(branch_scale_init=0.0)
    q, k = make_qk(200)
    scaled = q * DIM**-0.25

    def error() -> float:
        with torch.no_grad():
            ours = layer.branch_scale(scaled) + linear_log_sum(layer, scaled, k)
        return (ours - softmax_log_sum(layer, q, k))[:, 7:].abs().mean().item()

    before = error()
    calibrated(layer, q, k)
    assert error() < 0.5 < 2.0 < before


def test_the_offset_lowers_the_log_scale_of_the_linear_branch():
    fitted, lowered = make_layer(), make_layer()
    q, k = same_keys(60)  # every multiple of T does the same on them
    calibrated(fitted, q, k, 0.0)
    calibrated(lowered, q, k, 1.5)
    assert torch.allclose(fitted.branch_scale.bias - 1.5, lowered.branch_scale.bias, atol=1e-5)
    assert torch.allclose(fitted.branch_scale.weight, lowered.branch_scale.weight, atol=1e-5)


def test_only_the_map_and_the_scales_are_set():
    layer = make_layer(decay="learned")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    calibrated(layer, *make_qk(40), offset=1.0)
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    maps = {f"feature_map_{side}.{name}" for side in "qk" for name in ("T", "log_D")}
    scales = {"key_scale.weight", "key_scale.bias", "branch_scale.weight", "branch_scale.bias"}
    assert scales <= changed <= scales | maps and {"feature_map_q.log_D", "feature_map_k.log_D"} <= changed
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu", "relu", "cosformer"])
def test_maps_without_T_keep_their_weights(feature_map):
    layer = make_layer(feature_map=feature_map)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert calibrated(layer, *make_qk(40)) is not None
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"key_scale.weight", "key_scale.bias", "branch_scale.weight", "branch_scale.bias"}


def test_half_precision_inputs_are_summed_in_float32():
    q, k = (x.bfloat16() for x in make_qk(60))
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    target = softmax_output(q, k, v)
    one, other = make_layer(), make_layer()
    fit = calibrate_layer(one, q, k, v, target, 0.0)
    assert fit == pytest.approx(calibrate_layer(other, q.float(), k.float(), v.float(), target, 0.0), rel=1e-6)
    for part in ("feature_map_q", "feature_map_k", "key_scale", "branch_scale"):
        for name, tensor in getattr(one, part).state_dict().items():
            assert torch.allclose(tensor, getattr(other, part).state_dict()[name], rtol=1e-5, atol=1e-5), f"{part}.{name}"


def test_without_a_window_there_is_no_scale_to_fit():
    layer = make_layer(attention_window=0, attention_sinks=0)
    before = layer.feature_map_q.log_D.clone()
    assert calibrated(layer, *make_qk(4)) is None
    assert not torch.equal(layer.feature_map_q.log_D, before) and layer.branch_scale is None


def test_blocks_too_short_for_the_window():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"^blocks of 13 tokens are too short for a window of 5; use longer blocks$"):
        calibrated(layer, *make_qk(13))
    assert calibrated(layer, *make_qk(14)) is not None


@pytest.mark.parametrize("window", [0, 5])
def test_inputs_that_are_not_finite(window):
    q, k = make_qk(20)
    q[0, 3, 0, 0] = torch.nan
    message = r"^layer 0 gives no finite numbers on the text; check the checkpoint, or try dtype=float32$"
    with pytest.raises(ValueError, match=message):
        calibrated(make_layer(attention_window=window, attention_sinks=min(window, 2)), q, k)
