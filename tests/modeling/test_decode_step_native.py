"""The decoding step in C against the same step in torch."""

import pytest
import torch
from dijiang_testing.model_checks import DECAYS, WINDOWS, assert_close, tiny_model

from dijiang.modeling import decode_step_native, native_build

needs_compiler = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")
MAPS_IN_C = ("wdcf", "ldcf", "wpff", "pff", "prf", "hedgehog")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)


def settled_layer(dtype=torch.float32, B=2, seed=0, tokens=30, **settings):
    """A layer in eval mode, the state after some tokens, and q, k, v, raw_k of the next one as `project` gives them: views."""
    layer = tiny_model(seed, **settings).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(seed)
    qk = torch.randn(B, tokens + 1, 8, 8, generator=generator).to(dtype)
    q, k = qk.split((6, 2), dim=2)
    v, raw_k = torch.randn(2, B, tokens + 1, 2, 8, generator=generator).to(dtype)
    with torch.no_grad():
        _, state = layer.attend(q[:, :-1], k[:, :-1], v[:, :-1], raw_k=raw_k[:, :-1])
    assert state.settled
    return layer, tuple(x[:, -1:] for x in (q, k, v, raw_k)), state.compact()


def step(layer, token, state):
    """The step in C of q, k, v and raw_k, or None."""
    return layer.fused_step(*token[:3], state, token[3])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", MAPS_IN_C)
@torch.no_grad()
def test_step_in_c_equals_the_step_in_torch(name, decay, window, dtype, monkeypatch):
    settings = {"feature_map": name, "decay": decay, "attention_window": window[0], "attention_sinks": window[1]}
    for seed, more in enumerate(({}, {"feature_pairs": False, "key_scale": False, "scale_features": False})):
        layer, token, state = settled_layer(dtype, B=2 + seed, seed=seed, **settings, **more)
        before = [x.clone() for x in state.tensors()]
        o, new = step(layer, token, state)
        assert all(torch.equal(x, y) for x, y in zip(before, state.tensors(), strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(decode_step_native, "step_function", lambda: None)
            expected, expected_new = layer.attend_step(*token[:3], state, token[3])
        assert_close(o, expected, "o", tolerance=1e-5)
        for field, value in vars(expected_new).items():
            new_value = getattr(new, field)
            if isinstance(value, torch.Tensor) and value.numel():
                assert_close(new_value.float(), value.float(), field, tolerance=1e-5)
            elif not isinstance(value, torch.Tensor):
                assert value == new_value, field


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [3, [[4, 2], [1, 3]], [[5, 0], [1, 1]], 40], ids=str)
@pytest.mark.parametrize("score", ["window_attention", "learned", "self_recall", "key_diff", "random", "key_norm"])
@torch.no_grad()
def test_steps_with_a_memory_equal_those_of_torch(score, slots, dtype, monkeypatch):
    """Of a memory that is full or not; where scores tie the older token stays."""
    for seed, tokens in enumerate((8, 11, 40)):
        settings = {"attention_memory": slots, "memory_score": score, "decay": DECAYS[seed]}
        layer, token, state = settled_layer(dtype, seed=seed, tokens=tokens, **settings)
        if score == "learned" and seed == 2:
            layer.memory_score.w_2.zero_()
            state.memory_score[state.memory_rank >= 0] = 0.0
            state.window_score.zero_()
        before = [x.clone() for x in state.tensors()]
        o, new = step(layer, token, state)
        assert all(torch.equal(x, y) for x, y in zip(before, state.tensors(), strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(decode_step_native, "step_function", lambda: None)
            expected, expected_new = layer.attend_step(*token[:3], state, token[3])
        assert_close(o, expected, "o", tolerance=1e-5)
        for field, value in vars(expected_new).items():
            new_value = getattr(new, field)
            if not isinstance(value, torch.Tensor):
                assert value == new_value, field
            elif value.numel():
                finite = value.float().clamp_min(-1e4)
                assert_close(new_value.float().clamp_min(-1e4), finite, field, tolerance=1e-5)


@needs_compiler
@torch.no_grad()
def test_exponential_activation_is_clamped_as_in_torch(monkeypatch):
    layer, token, state = settled_layer(feature_activation="exp")
    layer.key_scale.bias += 100.0
    token = tuple(x * 40 for x in token)
    o, new = step(layer, token, state)
    monkeypatch.setattr(decode_step_native, "step_function", lambda: None)
    expected, expected_new = layer.attend_step(*token[:3], state, token[3])
    assert torch.isfinite(expected).all()
    assert_close(o, expected, "o", tolerance=1e-5)
    assert_close(new.state, expected_new.state, "state", tolerance=1e-5)


@pytest.mark.parametrize(
    "settings", [{"feature_map": "elu"}, {"feature_map": "cosformer"}, {"feature_map": "prf", "feature_activation": "exp"}]
)
def test_what_c_cannot_do_is_left_to_torch(settings):
    layer, token, state = settled_layer(**settings)
    with torch.no_grad():
        assert step(layer, token, state) is None
    layer, token, state = settled_layer()
    assert step(layer, token, state) is None  # gradients are wanted
    with torch.no_grad():
        assert step(layer.half(), [x.half() for x in token], state) is None
