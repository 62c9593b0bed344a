from functools import partial

import pytest
import torch
from helpers import assert_close, op_inputs, random_state, values_and_gradients

from dijiang.modeling import linear_attention

# (B, T, H, G, m, d)
SHAPES = [(2, 1, 2, 2, 4, 3), (1, 63, 4, 2, 16, 8), (2, 100, 6, 2, 11, 7), (1, 130, 3, 1, 5, 9), (1, 64, 2, 2, 8, 8)]
DECAYS = ("none", "constant", "per_token")


def loop_oracle(q, k, v, log_decay=None, *, normalize, initial_state):
    """The definition, one number at a time where that is readable, in float64."""
    q, k, v, state = q.double(), k.double(), v.double(), initial_state.double()
    B, T, H, _ = q.shape
    G = k.shape[2]
    if normalize:
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    rows = []
    for b in range(B):
        for h in range(H):
            g = h * G // H
            S = state[b, g]
            for t in range(T):
                if log_decay is not None:
                    decay = log_decay.double()[g] if log_decay.dim() == 1 else log_decay.double()[b, t, g]
                    S = S * decay.exp()
                S = S + torch.outer(k[b, t, g], v[b, t, g])
                rows.append(q[b, t, h] @ S)
    o = torch.stack(rows).view(B, H, T, -1).transpose(1, 2)
    return o[..., :-1] / o[..., -1:] if normalize else o


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mode", ["naive", "chunk", "recurrent"])
def test_every_form_equals_the_definition(mode, decay, normalize):
    shape = (2, 37, 4, 2, 5, 3)
    tensors, state = op_inputs(shape, decay, seed=1), random_state(shape, normalize, seed=2)
    found, _ = linear_attention(**tensors, normalize=normalize, initial_state=state, mode=mode, chunk_size=16)
    expected = loop_oracle(**tensors, normalize=normalize, initial_state=state)
    assert_close(found, expected, "o")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_forms_agree_forward_and_backward(mode, shape, decay, normalize):
    results = {}
    for form in ("naive", mode):
        tensors = op_inputs(shape, decay, seed=sum(shape))
        tensors["initial_state"] = random_state(shape, normalize, seed=3)
        results[form] = values_and_gradients(
            tensors, partial(linear_attention, normalize=normalize, output_final_state=True, mode=form)
        )
    for name, expected in results["naive"].items():
        assert_close(results[mode][name], expected, name, tolerance=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_does_not_matter(chunk_size, decay):
    tensors = op_inputs((1, 100, 2, 1, 6, 5), decay, seed=5)
    expected, _ = linear_attention(**tensors, mode="naive")
    assert_close(linear_attention(**tensors, chunk_size=chunk_size)[0], expected, "o")


@pytest.mark.parametrize("decay", DECAYS)
def test_pieces_with_a_state_equal_the_whole(decay):
    tensors = op_inputs((2, 90, 4, 2, 7, 5), decay, seed=6)
    whole, final = linear_attention(**tensors, output_final_state=True)
    state, pieces = None, []
    for start, end in ((0, 13), (13, 14), (14, 77), (77, 90)):
        part = {name: x[:, start:end] if x.dim() > 1 else x for name, x in tensors.items()}
        o, state = linear_attention(**part, initial_state=state, output_final_state=True)
        pieces.append(o)
    assert_close(torch.cat(pieces, 1), whole, "o")
    assert_close(state, final, "final state")


def test_grouped_heads_equal_repeated_heads():
    tensors = op_inputs((2, 50, 6, 2, 5, 4), "constant", seed=7)
    repeated = {
        name: x.repeat_interleave(3, dim=-1 if name == "log_decay" else 2) for name, x in tensors.items() if name != "q"
    }
    expected, _ = linear_attention(tensors["q"], **repeated)
    assert_close(linear_attention(**tensors)[0], expected, "o")


def test_without_decay_the_last_row_is_a_weighted_mean():
    tensors = op_inputs((1, 80, 1, 1, 4, 3), "none", seed=8)
    q, k, v = (tensors[name][0, :, 0] for name in "qkv")
    weights = k @ q[-1]
    assert_close(linear_attention(**tensors)[0][0, -1, 0], weights @ v / weights.sum(), "o")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["none", "constant"])
def test_32768_tokens_stay_finite_and_right(dtype, decay):
    T = 32768
    generator = torch.Generator().manual_seed(9)
    q, k = (torch.rand(1, T, 1, 8, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(1, T, 1, 4, generator=generator).to(dtype)
    log_decay = None if decay == "none" else torch.tensor([-0.01])
    o, state = linear_attention(q, k, v, log_decay=log_decay, output_final_state=True)
    assert o.dtype == dtype and state.dtype == torch.float32
    weights = k[0, :, 0].double() @ q[0, -1, 0].double()
    if decay == "constant":
        weights = weights * torch.exp(-0.01 * torch.arange(T - 1, -1, -1, dtype=torch.float64))
    expected = weights @ v[0, :, 0].double() / weights.sum()
    assert torch.isfinite(o).all()
    torch.testing.assert_close(o[0, -1, 0].double(), expected, atol=1e-5 if dtype == torch.float32 else 1e-3, rtol=1e-2)


def test_strong_decay_over_a_long_row_stays_finite():
    """Decay tables g^n and g^-n would leave float32 after some thousand tokens."""
    T = 8192
    ones = torch.ones(1, T, 1, 1)
    o, state = linear_attention(ones, ones, ones, log_decay=torch.tensor([-3.0]), normalize=False, output_final_state=True)
    closed_form = 1 / (1 - torch.exp(torch.tensor(-3.0)))
    assert_close(o[0, -1, 0, 0], closed_form, "geometric sum")
    assert_close(state.squeeze(), closed_form, "state")


def test_bad_input_is_refused_with_what_was_found():
    q, k, v = torch.rand(1, 4, 3, 5), torch.rand(1, 4, 2, 5), torch.rand(1, 4, 2, 5)
    with pytest.raises(ValueError, match="mode='fast' is unknown; choose one of naive, chunk, recurrent"):
        linear_attention(k, k, v, mode="fast")
    with pytest.raises(ValueError, match=r"q \(1, 4, 3, 5\), k \(1, 4, 2, 5\)"):
        linear_attention(q, k, v)
    with pytest.raises(ValueError, match=r"initial_state is \(1, 2, 5, 5\), expected \(1, 2, 5, 6\)"):
        linear_attention(k, k, v, initial_state=torch.zeros(1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"log_decay is \(3,\), expected \(2,\) or \(1, 4, 2\)"):
        linear_attention(k, k, v, log_decay=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk_size=0 and 4 tokens"):
        linear_attention(k, k, v, chunk_size=0)
    with pytest.raises(ValueError, match="and 0 tokens"):
        linear_attention(k[:, :0], k[:, :0], v[:, :0])
