"""What all feature maps promise."""

import pytest
import torch
from dijiang_testing.model_checks import MAPS, assert_close, build_map, features, rows, tiny_model

WITH_WEIGHTS = [name for name in MAPS if [*build_map(name).parameters()]]


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("name", MAPS)
def test_features_are_finite_at_any_norm_and_positive_where_promised(name, activation):
    feature_map = build_map(name, feature_activation=activation)
    for scale in (0.0, 1.0, 1e3):
        phi = features(feature_map, rows(1, 50, 3, 8, scale=scale).half())
        assert phi.shape == (1, 50, 3, feature_map.size) and phi.dtype == torch.float32
        assert torch.isfinite(phi).all() and (not feature_map.positive or (phi >= 0).all())
        if scale == 1.0:
            # the first token's sine is zero; later it is not
            assert (phi[:, 1:] > 0).all() == feature_map.positive


@pytest.mark.parametrize("name", MAPS)
def test_every_weight_and_the_input_get_finite_gradients(name):
    feature_map, x = build_map(name), rows(2, 9, 3, 8).requires_grad_(True)
    (features(feature_map, x) * rows(2, 9, 3, feature_map.size, seed=1)).sum().backward()
    for tensor in (x, *feature_map.parameters()):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0


@pytest.mark.parametrize("name", MAPS)
def test_saved_weights_make_the_same_map(name):
    feature_map, x = build_map(name, seed=1), rows(1, 5, 3, 8)
    with torch.no_grad():
        for i, parameter in enumerate(feature_map.parameters()):
            parameter += rows(*parameter.shape, seed=i)
    loaded = build_map(name, seed=1)
    loaded.load_state_dict(feature_map.state_dict())
    assert torch.equal(features(loaded, x), features(feature_map, x))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_seeds_decide_the_weights(name):
    first, again, other = (dict(build_map(name, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    if name != "hedgehog":  # it starts as the identity
        assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MAPS)
def test_query_and_key_maps_start_equal_for_any_number_of_heads(name):
    x = rows(1, 4, 1, 8)
    queries, keys = (features(build_map(name, heads=heads), x.expand(-1, -1, heads, -1)) for heads in (6, 2))
    assert_close(queries[:, :, :2], keys, "phi", tolerance=1e-6)


VARIANTS = {
    "feature_dim": 7,
    "feature_activation": "exp",
    "feature_pairs": False,
    "feature_seed": 5,
    "radial": "chi",
    "dct_direction": "inverse",
}


@pytest.mark.parametrize("key", VARIANTS)
@pytest.mark.parametrize("name", MAPS)
def test_maps_name_just_the_settings_they_use(name, key):
    """A setting that a map names changes its features or their number, any other changes nothing."""
    x, variant = rows(1, 6, 3, 8), {"seed" if key == "feature_seed" else key: VARIANTS[key]}
    plain, varied = features(build_map(name), x), features(build_map(name, **variant), x)
    same = plain.shape == varied.shape and torch.equal(plain, varied)
    assert same == (key not in type(build_map(name)).settings)


@pytest.mark.parametrize("name", MAPS)
def test_features_that_are_not_learned_stay_fixed_even_if_loading_says_otherwise(name):
    x, positions = rows(1, 20, 3, 8).requires_grad_(), torch.arange(20)[None]
    learned, fixed = build_map(name), build_map(name, learn_features=False).requires_grad_()
    assert torch.equal(learned(x, positions), fixed(x, positions))
    fixed(x, positions).square().sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in fixed.parameters())
    learned(x, positions).square().sum().backward()
    assert all(p.grad is not None for p in learned.parameters())


@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("name", MAPS)
def test_largest_features_and_key_weights_stay_finite_over_a_million_tokens(name, activation):
    layer = tiny_model(feature_map=name, feature_activation=activation).model.layers[0].self_attn
    with torch.no_grad():
        layer.key_scale.bias.fill_(1e4)
    x, positions = rows(1, 50, 6, 8, scale=100.0), torch.arange(50)[None]
    largest = layer.feature_map_q(x, positions).max() * layer.key_features(x[:, :, :2], positions).max()
    total = largest * layer.feature_map_q.size * 1e6
    assert torch.isfinite(total) and total > 0
