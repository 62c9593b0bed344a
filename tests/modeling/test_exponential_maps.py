"""The exponential maps against the paper's equations."""

import numpy
import pytest
import scipy.fft
import torch
from dijiang_testing.model_checks import assert_close, build_map, rows

from dijiang.modeling.frequency import frequency_matrix


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("radial", ["normal", "chi"])
def test_wdcf_is_equation_12(radial, direction):
    feature_map = build_map(
        "wdcf", feature_dim=8, feature_activation="exp", feature_pairs=False, radial=radial, dct_direction=direction
    )
    with torch.no_grad():
        feature_map.log_D += rows(3, 8, seed=1)
    x = rows(2, 5, 3, 8, seed=2)
    transform = scipy.fft.dct if direction == "forward" else scipy.fft.idct
    frequencies = torch.from_numpy(transform(x.numpy(), axis=-1, norm="ortho"))
    expected = feature_map.log_D.exp() * (feature_map.T * frequencies).exp() * 8**-0.5
    assert_close(feature_map(x), expected, "phi")


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("head_dim", "feature_dim"), [(8, 8), (8, 20), (510, 600), (512, 300), (512, 512), (514, 1100)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_wdcf_projects_on_its_frequencies_at_any_size(head_dim, feature_dim, direction, tokens):
    feature_map = build_map("wdcf", seed=3, head_dim=head_dim, feature_dim=feature_dim, dct_direction=direction)
    x, matrix = rows(1, tokens, 3, head_dim), frequency_matrix(feature_dim, head_dim, direction, 3)
    expected = torch.nn.functional.linear(x, matrix) * feature_map.T
    assert_close(feature_map.exponents(x), torch.cat((expected, -expected), -1), "exponents")
    assert_close(feature_map.exponents(x, scale=0.3), torch.cat((expected, -expected), -1) * 0.3, "exponents of scaled x")


def test_softmax_activation_normalizes_pairs_with_their_weights():
    feature_map = build_map("wdcf")
    with torch.no_grad():
        feature_map.log_D += rows(3, 22, seed=1)
    x = rows(2, 5, 3, 8, seed=2)
    z = torch.nn.functional.linear(x, frequency_matrix(11, 8, "forward", 0)) * feature_map.T
    plain = feature_map.log_D.exp() * torch.cat((z, -z), -1).exp()
    assert_close(feature_map(x), plain / plain.sum(-1, keepdim=True), "phi")


def test_pff_is_equation_9_with_directions_on_the_sphere():
    feature_map = build_map("pff", feature_activation="exp", feature_pairs=False, feature_dim=16)
    assert_close(feature_map.V.norm(dim=-1), torch.ones(3, 16), "directions")
    x = rows(1, 2, 3, 8)
    omega = feature_map.T[..., None] * feature_map.V
    expected = torch.stack([torch.exp(x[:, :, h] @ omega[h].T) for h in range(3)], 2) * 16**-0.5
    assert_close(feature_map(x), expected, "phi")


def test_wpff_weights_multiply_pff():
    plain, weighted = (build_map(name, feature_activation="exp") for name in ("pff", "wpff"))
    x = rows(1, 2, 3, 8)
    assert_close(weighted(x), plain(x), "start")
    with torch.no_grad():
        weighted.log_D += rows(3, 22, seed=1)
    assert_close(weighted(x), plain(x) * weighted.log_D.exp(), "weighted")


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(("head_dim", "feature_dim"), [(8, 8), (8, 20), (512, 600)])
def test_ldcf_starts_as_wdcf_and_its_directions_are_its_own(head_dim, feature_dim, direction):
    settings = {"seed": 3, "head_dim": head_dim, "feature_dim": feature_dim, "dct_direction": direction}
    fixed, learned = build_map("wdcf", **settings), build_map("ldcf", **settings)
    x = rows(1, 30, 3, head_dim)
    assert_close(learned(x), fixed(x), "start")
    with torch.no_grad():
        learned.V[1] += rows(feature_dim, head_dim, seed=1)
    assert_close(learned(x)[:, :, ::2], fixed(x)[:, :, ::2], "other heads")
    z = x[:, :, 1] @ (learned.T[1, :, None] * learned.V[1]).T
    assert_close(learned(x)[:, :, 1], torch.cat((z, -z), -1).softmax(-1), "its head")


@pytest.mark.parametrize("pairs", [False, True])
def test_prf_is_unbiased_for_the_exponential_kernel(pairs):
    q, k = rows(1, 1, 1, 8, seed=1, scale=0.4), rows(1, 1, 1, 8, seed=2, scale=0.4)
    estimates = []
    for seed in range(40):
        feature_map = build_map("prf", heads=1, seed=seed, feature_activation="exp", feature_pairs=pairs, feature_dim=256)
        estimates.append((feature_map(q) * feature_map(k)).sum().item())
    error = abs(numpy.mean(estimates) - (q * k).sum().exp().item())
    assert error < 4 * numpy.std(estimates) / numpy.sqrt(len(estimates)) < 0.1


def test_quasi_monte_carlo_directions_beat_random_ones():
    """Mean squared error for exp(q.k), chi radii, many pairs: PFF against PRF at the same m (the paper's section 3.2)."""
    q, k = rows(1, 500, 1, 8, seed=1, scale=0.35), rows(1, 500, 1, 8, seed=2, scale=0.35)
    norms = ((q.square() + k.square()).sum(-1) / 2).exp()  # the map drops |x|^2, which belongs to the kernel
    error = {}
    for name in ("prf", "pff"):
        errors = []
        for seed in range(20):
            feature_map = build_map(
                name, heads=1, seed=seed, feature_activation="exp", feature_pairs=True, feature_dim=64, radial="chi"
            )
            kernel = (feature_map(q) * feature_map(k)).sum(-1)
            kernel = kernel / norms if name == "pff" else kernel
            errors.append((kernel - (q * k).sum(-1).exp()).square().mean().item())
        error[name] = numpy.mean(errors)
    assert error["pff"] < 0.8 * error["prf"], error


def test_hedgehog_starts_as_softmax_of_plus_and_minus_x():
    x = rows(1, 3, 3, 8)
    assert_close(build_map("hedgehog", feature_dim=8)(x), torch.cat((x, -x), -1).softmax(-1), "phi")


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("name", ["wdcf", "ldcf", "wpff"])
def test_centering_equals_shifting_the_input(name, activation):
    feature_map = build_map(name, feature_activation=activation)
    x, mean = rows(1, 6, 3, 8, seed=1), rows(3, 8, seed=2)
    expected = feature_map(x - mean).detach()
    feature_map.center(mean)
    assert_close(feature_map(x), expected, "phi")


def test_half_precision_keeps_the_cosine_table():
    feature_map = build_map("wdcf")
    table = feature_map.C.clone()
    assert torch.equal(feature_map.half().C, table) and feature_map.C.dtype == torch.float32
