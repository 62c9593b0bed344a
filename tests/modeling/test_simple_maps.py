"""The maps without exponentials against NumPy, and the kernels they stand for."""

import math

import numpy
import pytest
import torch
from dijiang_testing.model_checks import assert_close, build_map, features, rows, tiny_config

SEEDS = range(3)


def relu(x: numpy.ndarray) -> numpy.ndarray:
    return numpy.maximum(x, 0.0)


def test_elu_is_one_plus_elu():
    x = rows(1, 3, 3, 8)
    assert_close(build_map("elu")(x), torch.where(x > 0, x + 1, x.exp()), "phi")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("head_dim", "feature_dim"), [(8, 8), (6, 21), (10, 3)])
def test_relu_is_a_rectified_projection(head_dim, feature_dim, seed):
    feature_map = build_map("relu", seed=seed, head_dim=head_dim, feature_dim=feature_dim)
    assert feature_map.size == feature_dim
    assert_close(feature_map.W.norm(dim=-1), torch.ones(3, feature_dim), "rows at the start")
    assert (feature_map.b == 0).all()
    with torch.no_grad():
        feature_map.W += rows(3, feature_dim, head_dim, seed=seed)
        feature_map.b += rows(3, feature_dim, seed=seed + 10)
    x = rows(2, 5, 3, head_dim, seed=seed + 20)
    W, b = feature_map.W.detach().numpy(), feature_map.b.detach().numpy()
    expected = [relu(x[:, :, h].numpy() @ W[h].T + b[h]) + 1e-3 for h in range(3)]
    assert_close(feature_map(x), torch.from_numpy(numpy.stack(expected, 2)), "phi")


def test_relu_of_hopeless_inputs_keeps_a_denominator_with_finite_gradients():
    feature_map, x = build_map("relu"), rows(1, 4, 3, 8).requires_grad_(True)
    with torch.no_grad():
        feature_map.b.fill_(-1e3)
    phi = feature_map(x)
    weights = torch.einsum("bihm,bjhm->bhij", phi, phi)
    (weights / weights.sum(-1, keepdim=True))[..., 0].sum().backward()
    assert (weights > 0).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x, *feature_map.parameters()))


@pytest.mark.parametrize("head_dim", [8, 6])
@pytest.mark.parametrize("seed", SEEDS)
def test_cosformer_is_its_equation(seed, head_dim):
    feature_map = build_map("cosformer", head_dim=head_dim, max_position_embeddings=50)
    x = rows(2, 6, 3, head_dim, seed=seed)
    positions = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
    angle = math.pi / 2 * positions.numpy()[..., None, None] / 50
    r = relu(x.numpy()) + 1e-3
    expected = numpy.concatenate((r * numpy.cos(angle), r * numpy.sin(angle)), -1)
    assert feature_map.size == 2 * head_dim
    assert_close(feature_map(x, positions), torch.from_numpy(expected), "phi")


@pytest.mark.parametrize("seed", SEEDS)
def test_cosformers_kernel_falls_with_the_cosine_of_the_distance(seed):
    T = 37
    feature_map = build_map("cosformer", max_position_embeddings=T)
    q, k = rows(2, T, 3, 8, seed=seed), rows(2, T, 3, 8, seed=seed + 10)
    kernel = torch.einsum("bihm,bjhm->bhij", features(feature_map, q), features(feature_map, k))
    rectified = torch.einsum("bihd,bjhd->bhij", q.relu() + 1e-3, k.relu() + 1e-3)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    assert_close(kernel, rectified * (math.pi / 2 * distance / T).cos(), "kernel")


def test_cosformer_holds_positions_past_the_last():
    feature_map = build_map("cosformer", max_position_embeddings=10)
    x = rows(1, 1, 3, 8).expand(1, 5, -1, -1)
    phi = feature_map(x, torch.tensor([[-1, 9, 10, 11, 1 << 40]]))
    assert torch.isfinite(phi).all() and (phi >= 0).all()
    assert torch.equal(phi[:, 2], phi[:, 3]) and torch.equal(phi[:, 2], phi[:, 4]) and not torch.equal(phi[:, 1], phi[:, 2])
    assert torch.equal(phi[:, 0], feature_map(x[:, :1], torch.zeros(1, 1, dtype=torch.long))[:, 0])  # padding has position -1


def test_cosformer_without_positions():
    with pytest.raises(ValueError, match=r"^the feature map cosformer needs positions \(B, T\), "):
        build_map("cosformer")(rows(1, 2, 3, 8))


@pytest.mark.parametrize("seed", SEEDS)
def test_identitys_kernel_is_the_product(seed):
    feature_map = build_map("identity", head_dim=6)
    q, k = rows(2, 5, 3, 6, seed=seed), rows(2, 5, 3, 6, seed=seed + 10)
    assert feature_map.size == 6 and not feature_map.positive
    assert torch.equal((feature_map(q) * feature_map(k)).sum(-1), (q * k).sum(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"normalize": True, "attention_window": 5},
        {"normalize": True, "attention_window": 5, "attention_sinks": 1},
    ],
    ids=str,
)
def test_identity_has_no_denominator(settings):
    with pytest.raises(Exception, match="negative features") as caught:
        tiny_config(feature_map="identity", **settings)
    message = str(caught.value.__cause__ or caught.value)
    assert message == (
        "feature_map=identity has negative features, whose sum is no denominator; "
        "set normalize=false attention_window=0 attention_sinks=0, or state_update=delta"
    )
