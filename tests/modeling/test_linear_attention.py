import logging
import sys
from functools import partial

import pytest
import torch
from dijiang_testing.model_checks import assert_close, op_inputs, random_state, values_and_gradients

from dijiang.modeling import linear_attention
from dijiang.modeling.linear_attention import naive_linear_attention

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
    o, _ = linear_attention(**tensors, normalize=normalize, initial_state=state, mode=mode, chunk_size=16)
    expected = loop_oracle(**tensors, normalize=normalize, initial_state=state)
    assert_close(o, expected, "o")


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


def exact(q, k, v, log_decay=None, initial_state=None, *, normalize):
    """`naive` in float64: o and the final state."""
    (B, T, H, m), G = q.shape, k.shape[2]
    q = q.double().view(B, T, G, H // G, m).permute(0, 2, 3, 1, 4)
    k, v = (x.double().transpose(1, 2) for x in (k, v))
    if initial_state is None:
        initial_state = torch.zeros(B, G, m, v.shape[-1] + normalize)
    log_decay = None if log_decay is None else log_decay.double().expand(B, T, G).transpose(1, 2)
    o, total, state = naive_linear_attention(q, k, v, log_decay, initial_state.double(), sums=normalize)
    o = o / total.unsqueeze(-1) if normalize else o
    return o.permute(0, 3, 1, 2, 4).reshape(B, T, H, -1), state


# Errors relative to the largest value. `chunk` multiplies in bfloat16: measured over three seeds, 1.3e-2 at most, but 3.2e-2
# for dq and 6.5e-2 for dlog_decay, a difference of large sums. The other forms compute in float32, so that what they return
# in the inputs' dtype is off by its rounding, 2^-8, alone, and the rest not at all.
BFLOAT16_LIMITS = {
    "naive": {"o": 4e-3, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3},
    "chunk": {"o": 2e-2, "final state": 2e-2, "dq": 5e-2, "dk": 2e-2, "dv": 2e-2, "dinitial_state": 3e-2, "dlog_decay": 0.1},
    "recurrent": {"o": 4e-3, "dq": 4e-3, "dk": 4e-3, "dv": 4e-3},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("mode", "shape"),
    # a long row is slow token by token, and the same at every length
    [(m, s) for m in BFLOAT16_LIMITS for s in [*SHAPES, (1, 577, 4, 2, 16, 8)] if m != "recurrent" or s[1] <= 200],
    ids=str,
)
def test_bfloat16_is_near_float32_on_the_same_inputs(mode, shape, decay, normalize):
    tensors = op_inputs(shape, decay, seed=sum(shape), dtype=torch.bfloat16)
    tensors["initial_state"] = random_state(shape, normalize, seed=3)
    rounded = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    options = {"normalize": normalize, "output_final_state": True}
    results = values_and_gradients(tensors, partial(linear_attention, mode=mode, **options))
    expected = values_and_gradients(rounded, partial(linear_attention, mode="naive", **options))
    for name, x in expected.items():
        low = name in ("o", "dq", "dk", "dv")
        assert results[name].dtype == (torch.bfloat16 if low else torch.float32)
        assert_close(results[name], x, name, tolerance=BFLOAT16_LIMITS[mode].get(name, 2e-5))


# lengths about the ends of blocks (64) and of pieces (512)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 511, 512, 513, 1025])
def test_chunk_is_the_same_with_and_without_gradients(T, decay, normalize):
    shape = (2, T, 6, 2, 5, 3)
    tensors = op_inputs(shape, decay, seed=T) | {"initial_state": random_state(shape, normalize, seed=1)}
    options = {"normalize": normalize, "output_final_state": True}
    with_gradients = linear_attention(**tensors, **options)
    assert all(x.requires_grad for x in with_gradients)
    with torch.no_grad():
        without = linear_attention(**tensors, **options)
        expected = exact(**tensors, normalize=normalize)
    with torch.inference_mode():
        inference = linear_attention(**tensors, **options)
    for i, name in enumerate(("o", "final state")):
        assert_close(without[i], with_gradients[i], f"{name} without gradients", tolerance=1e-6)
        assert_close(inference[i], with_gradients[i], f"{name} in inference mode", tolerance=1e-6)
        assert_close(without[i], expected[i], name, tolerance=5e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("mode", "T"),  # only `chunk` has buffers
    [*(("chunk", T) for T in (1, 64, 65, 300, 577, 1025)), *((m, T) for m in ("naive", "recurrent") for T in (1, 64, 65))],
)
def test_calls_share_no_memory_and_leave_their_inputs_alone(T, mode, grad):
    """Pieces of one call share buffers: none of them may be what a caller gets or gave, views included."""
    shape = (1, T, 4, 2, 6, 3)
    for dtype in (torch.float32, torch.bfloat16):
        for packed in (None, torch.tensor([0, T // 3, T]) if T > 2 else None):
            results, inputs = [], []
            for seed in range(2):
                tensors = op_inputs(shape, "per_token", seed, dtype)
                tensors["initial_state"] = random_state(shape, True, seed, None if packed is None else 2)
                inputs.append((tensors, {name: x.detach().clone() for name, x in tensors.items()}))
                with torch.set_grad_enabled(grad):
                    o, state = linear_attention(**tensors, cu_seqlens=packed, output_final_state=True, mode=mode)
                views = [x.detach() for x in (o, state, o[:, ::2, 1:], state[..., -1], o.transpose(1, 2))]
                results.append((views, [x.clone() for x in views]))
            for views, copies in results:
                assert all(torch.equal(x, y) for x, y in zip(views, copies, strict=True))
            for tensors, copies in inputs:
                assert all(torch.equal(x, copies[name]) for name, x in tensors.items())
            owners = [{x.untyped_storage().data_ptr() for x in views} for views, _ in results]
            owners += [{x.untyped_storage().data_ptr() for x in tensors.values()} for tensors, _ in inputs]
            assert len(set.union(*owners)) == sum(map(len, owners))
            (o, state, *_), _ = results[0]
            assert o.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


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


def test_backends_that_do_not_exist_or_cannot_run_here_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.rand(1, 4, 2, 5)
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose one of auto, torch, fla"):
        linear_attention(q, q, q, backend="cuda")
    message = "backend='fla' cannot run: flash-linear-attention needs a CUDA device, not cpu; use backend='torch' or 'auto'"
    for options in ({}, {"mode": "recurrent"}, {"mode": "naive"}, {"cu_seqlens": torch.tensor([0, 1, 4])}):
        with pytest.raises(ValueError, match=message):
            linear_attention(q, q, q, backend="fla", **options)


def test_automatic_choice_on_a_cpu_is_torch_and_says_so_once(caplog):
    tensors = op_inputs((1, 70, 4, 2, 5, 3), "constant", seed=11)
    type(logging.getLogger()).info_once.cache_clear()  # of transformers: other tests may have logged it already
    with caplog.at_level(logging.INFO, logger="dijiang.modeling.linear_attention"):
        assert torch.equal(linear_attention(**tensors, backend="torch")[0], linear_attention(**tensors, backend="auto")[0])
        for mode in ("chunk", "recurrent", "naive"):
            linear_attention(**tensors, mode=mode)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "torch" in message and "no GPU" in message


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", ["naive", "chunk", "recurrent"])
def test_autocast_leaves_sums_and_states_in_float32(mode, grad):
    shape = (2, 70, 4, 2, 5, 3)
    tensors = op_inputs(shape, "per_token", seed=12) | {"initial_state": random_state(shape, True, seed=13)}
    options = {"output_final_state": True, "mode": mode}
    with torch.set_grad_enabled(grad):
        expected = linear_attention(**tensors, **options)
        with torch.autocast("cpu", torch.bfloat16):
            results = linear_attention(**tensors, **options)
    for name, x, y in zip(("o", "final state"), results, expected, strict=True):
        assert x.dtype == torch.float32
        assert_close(x, y, name, tolerance=2e-2)


def test_what_auto_stands_for_can_be_set(monkeypatch):
    module, backends = sys.modules["dijiang.modeling.linear_attention"], []
    monkeypatch.setattr(module, "choose_backend", lambda backend, *args: backends.append(backend) or "torch")
    x = torch.rand(1, 4, 1, 2)
    with module.prefer_backend("torch"):
        linear_attention(x, x, x)
        linear_attention(x, x, x, backend="fla")
    linear_attention(x, x, x)
    assert backends == ["torch", "fla", "auto"]
