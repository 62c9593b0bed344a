import math
from itertools import product

import pytest
import torch
from dijiang_testing.model_checks import (
    EVERY,
    MAPS,
    SIGNED_MAPS,
    WINDOWS,
    assert_close,
    case_settings,
    features,
    tiny_config,
    tiny_model,
)

from dijiang.modeling.decoder_modules import ProjectedAttention
from dijiang.modeling.layer_parts import Decay
from dijiang.modeling.linear_attention_layer import ADDED_PARTS, OUTPUT_PARTS, DiJiangLinearAttention


def random_qkv(B, T, H=6, G=2, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, T, heads, d, generator=generator) for heads in (H, G, G))


def loop_oracle(layer, q, k, v):
    """
    The layer's definition, query by query: exact softmax weights on window and sinks, feature weights on what lies between,
    in the unit c(q), all under one sum if the layer normalizes.
    """
    B, T, H, d = q.shape
    W, S = layer.window, layer.sinks
    scale = d**-0.25
    phi_q, phi_k = features(layer.feature_map_q, q * scale), features(layer.feature_map_k, k * scale)
    if layer.key_scale is not None:
        phi_k = phi_k * layer.key_scale(k * scale)[..., None].exp()
    log_decay = layer.decay() if layer.decay is not None else torch.zeros(k.shape[2])
    o = torch.zeros(B, T, H, d)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // layer.num_key_value_groups
                exact = [j for j in range(t + 1) if t - j < W or j < S]
                old = [j for j in range(t + 1) if t - j >= W and j >= S]
                weights = torch.zeros(T)
                weights[exact] = (k[b, exact, g] @ q[b, t, h] * d**-0.5).exp()
                # a key that left the window at step j + W has decayed once for every step since
                ages = torch.tensor([t - (j + W) for j in old])
                old_weights = phi_k[b, old, g] @ phi_q[b, t, h] * (log_decay[g] * ages).exp()
                if W:
                    old_weights = old_weights * layer.branch_scale(q * scale)[b, t, h].exp()
                weights[old] = old_weights
                o[b, t, h] = weights @ v[b, :, g] / (weights.sum() if layer.normalize else 1.0)
    return o


def delta_oracle(layer, q, k, v):
    """The same with a state that overwrites: what it gives counts exp(c(q)) as soon as it holds anything."""
    B, T, H, d = q.shape
    W, S = layer.window, layer.sinks
    scale = d**-0.25
    phi_q, phi_k = (
        torch.nn.functional.normalize(features(part, x * scale), dim=-1)
        for part, x in ((layer.feature_map_q, q), (layer.feature_map_k, k))
    )
    written = layer.key_scale(k * scale).sigmoid()
    kept = (layer.decay() if layer.decay is not None else torch.zeros(k.shape[2])).exp()
    o = torch.zeros(B, T, H, d)
    for b, g in product(range(B), range(k.shape[2])):
        state, empty = torch.zeros(phi_k.shape[-1], d), True
        for t in range(T):
            j = t - W
            if j >= S:
                held = phi_k[b, j, g] @ state
                state = kept[g] * (state - written[b, j, g] * torch.outer(phi_k[b, j, g], held))
                state = state + written[b, j, g] * torch.outer(phi_k[b, j, g], v[b, j, g])
                empty = False
            exact = [j for j in range(t + 1) if t - j < W or j < S]
            for h in range(g * layer.num_key_value_groups, (g + 1) * layer.num_key_value_groups):
                weights = (k[b, exact, g] @ q[b, t, h] * d**-0.5).exp()
                own = 0.0 if empty else layer.branch_scale(q * scale)[b, t, h].exp() if W else 1.0
                o[b, t, h] = (weights @ v[b, exact, g] + own * (phi_q[b, t, h] @ state)) / (weights.sum() + own)
    return o


@pytest.mark.parametrize("case", [case for case in EVERY if "attention_memory" not in case_settings(case)], ids=str)
def test_layer_equals_its_definition(case):
    """That of an exact memory is in test_exact_memory.py."""
    layer = tiny_model(**case_settings(case)).model.layers[0].self_attn
    G = len(layer.linear_heads)
    q, k, v = random_qkv(2, 19, 3 * G, G)
    oracle = delta_oracle if layer.overwrites else loop_oracle
    assert_close(layer.attend(q, k, v)[0], oracle(layer, q, k, v), "o")


def test_silent_branch_is_exact_softmax_on_window_and_sinks():
    layer = tiny_model(branch_scale_init=-1e4).model.layers[0].self_attn
    q, k, v = random_qkv(1, 30)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    seen = (distance >= 0) & ((distance < layer.window) | (torch.arange(30) < layer.sinks))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    )
    assert_close(layer.attend(q, k, v)[0], expected.transpose(1, 2), "o")


@pytest.mark.parametrize("window", WINDOWS)
def test_grouped_heads_equal_repeated_heads(window):
    W, S = window
    grouped = tiny_model(attention_window=W, attention_sinks=S, decay="learned").model.layers[0].self_attn
    plain = tiny_model(attention_window=W, attention_sinks=S, decay="learned", num_key_value_heads=6).model.layers[0].self_attn
    state = grouped.state_dict()
    for name in state:
        if name.startswith(("feature_map_k", "key_scale", "decay")):
            state[name] = state[name].repeat_interleave(3, dim=0)
        elif name.startswith(("k_proj", "v_proj")):
            state[name] = state[name].view(2, 8, -1).repeat_interleave(3, dim=0).flatten(0, 1)
    plain.load_state_dict(state)
    q, k, v = random_qkv(2, 33)
    repeated = plain.attend(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))[0]
    assert_close(grouped.attend(q, k, v)[0], repeated, "o")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
@torch.no_grad()
def test_32768_tokens_stay_finite_and_the_state_keeps_its_size(feature_map, dtype):
    for decay, (window, sinks) in product(("none", "retnet"), WINDOWS[::2] if feature_map not in SIGNED_MAPS else WINDOWS[:1]):
        settings = {"feature_map": feature_map, "decay": decay, "attention_window": window, "attention_sinks": sinks}
        model = tiny_model(**settings, num_attention_heads=2, num_key_value_heads=1, hidden_size=16).to(dtype)
        layer = model.model.layers[0].self_attn
        q, k, v = (x.to(dtype) * 3 for x in random_qkv(1, 32768, 2, 1))
        o, state = layer.attend(q, k, v)
        _, short = layer.attend(q[:, :100], k[:, :100], v[:, :100])
        step, after = layer.attend(q[:, :1], k[:, :1], v[:, :1], None, state)
        assert all(torch.isfinite(x).all() for x in (o, state.state, step, after.state)), settings
        assert state.state.dtype == torch.float32 and state.settled
        assert [x.shape for x in state.tensors()] == [x.shape for x in short.tensors()] == [x.shape for x in after.tensors()]


@pytest.mark.parametrize("window", WINDOWS)
def test_long_inputs_in_pieces_equal_one_piece(monkeypatch, window):
    layer = tiny_model(attention_window=window[0], attention_sinks=window[1], decay="learned").model.layers[0].self_attn
    q, k, v = random_qkv(2, 50)
    valid = torch.arange(50) >= torch.tensor([[0], [17]])
    expected, _ = layer.attend(q, k, v, valid)
    monkeypatch.setattr("dijiang.modeling.layer_linear_heads.PIECE", 7)
    o, _ = layer.attend(q, k, v, valid)
    assert_close(o[valid], expected[valid], "o")


def test_memory_of_the_forward_pass_grows_linearly():
    """Bytes allocated, counted by torch's profiler: twice the tokens, twice the bytes."""
    layer = tiny_model(num_attention_heads=2, num_key_value_heads=1, hidden_size=16).model.layers[0].self_attn

    def allocated(T):
        q, k, v = random_qkv(1, T, 2, 1)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
            layer.attend(q, k, v)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages())

    assert 1.8 < allocated(8192) / allocated(4096) < 2.2


@pytest.mark.parametrize("spans", [[32, 512], [4.0, 64.0], [100, 1.5]])
def test_decay_is_retnets_formula_for_any_spans(spans):
    gamma = 1 - torch.exp(torch.linspace(-math.log(spans[0]), -math.log(spans[1]), 5))
    config = tiny_config(decay="retnet", decay_spans=spans, num_attention_heads=10, num_key_value_heads=5, hidden_size=80)
    assert_close(Decay(5, learned=False, spans=spans)(), gamma.log(), "log decay", tolerance=1e-5)
    assert_close(DiJiangLinearAttention(config, 0).decay(), gamma.log(), "log decay of a layer", tolerance=1e-5)
    assert torch.isfinite(Decay(5, learned=True, spans=[1.0001, 1e30]).log_rate).all()
    fixed, learned = (Decay(5, learned=learned, spans=spans).log_rate for learned in (False, True))
    assert not fixed.requires_grad and learned.requires_grad


@pytest.mark.parametrize("feature_map", [name for name in MAPS if name not in SIGNED_MAPS])
def test_added_parts_are_all_that_a_layer_adds_and_have_rows_by_head(feature_map):
    settings = {"feature_map": feature_map, "attention_memory": 3, "memory_score": "learned", "decay": "learned"}
    outputs = {"output_norm": "group_norm", "output_gate": True}
    layer = tiny_model(**settings, **outputs).model.layers[0].self_attn
    shared = [name for name, _ in ProjectedAttention(layer.config, 0).named_children()]
    assert [name for name, _ in layer.named_children()] == [*shared, *ADDED_PARTS, *OUTPUT_PARTS]
    G = len(layer.linear_heads)
    for part in ADDED_PARTS:
        rows = G * layer.num_key_value_groups if part in ("feature_map_q", "branch_scale") else G
        assert all(len(parameter) == rows for parameter in getattr(layer, part).parameters()), part
