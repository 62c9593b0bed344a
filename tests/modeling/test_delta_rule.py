"""The delta rule: its forms against one another, against transformers' gated delta rule, and what overwriting means."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from dijiang.modeling.delta_rule import delta_rule

# B, T, H, G, m, d
SHAPES = [
    (1, 1, 1, 1, 3, 2),
    (2, 7, 4, 2, 5, 3),
    (1, 64, 3, 1, 8, 4),
    (2, 130, 6, 3, 4, 9),
    (1, 200, 2, 2, 16, 8),
]  # B T H G m d
DECAYS = ("none", "head", "token")


def problem(shape, decay="token", seed=0, dtype=torch.float32):
    B, T, H, G, m, d = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    inputs = {
        "q": F.normalize(draw(B, T, H, m), dim=-1),
        "k": F.normalize(draw(B, T, G, m), dim=-1),
        "v": draw(B, T, G, d),
        "b": draw(B, T, G).sigmoid(),
        "state": draw(B, G, m, d),
    }
    if decay != "none":
        inputs["log_decay"] = -draw(*((G,) if decay == "head" else (B, T, G))).abs() * 0.3
    return inputs


def with_gradients(inputs, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = delta_rule(**leaves, **options)
    generator = torch.Generator().manual_seed(9)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (o, state))
    return {"o": o, "state": state} | dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_forms_agree_forward_and_backward(shape, decay):
    for seed in range(2):
        inputs = problem(shape, decay, seed)
        oracle = with_gradients(inputs, mode="naive")
        for options in ({"mode": "recurrent"}, {}, {"chunk_size": 5}, {"chunk_size": 1}):
            for name, x in with_gradients(inputs, **options).items():
                assert_close(x, oracle[name], name)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] == shape[3]] + [(2, 130, 3, 3, 16, 8)])
def test_equals_transformers_gated_delta_rule(form, shape):
    """Theirs scales queries by m ** -0.5, and runs by Triton where fla is installed, which needs a GPU."""
    peer = inspect.unwrap(getattr(qwen3_next, f"torch_{form}_gated_delta_rule"))
    inputs = problem(shape)
    o, state = delta_rule(**inputs)
    theirs = peer(
        inputs["q"] * shape[4] ** 0.5, inputs["k"], inputs["v"], g=inputs["log_decay"], beta=inputs["b"],
        initial_state=inputs["state"], output_final_state=True,
    )  # fmt: skip
    assert_close(o, theirs[0].float(), "o")
    assert_close(state, theirs[1].float(), "state")


@pytest.mark.parametrize("mode", ["naive", "chunk", "recurrent"])
def test_a_key_that_comes_again_is_overwritten_and_others_stay(mode):
    """With orthogonal keys and b = 1 the state is a table: the last value of each key is what it gives."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(0, 6, (90,), generator=generator)
    k, v = torch.eye(6)[which][None, :, None], torch.randn(1, 90, 1, 4, generator=generator)
    o, state = delta_rule(torch.eye(6).repeat(15, 1)[None, :, None], k, v, torch.ones(1, 90, 1), mode=mode)
    for t in range(90):
        asked = t % 6
        before = (which[: t + 1] == asked).nonzero().flatten()
        expected = v[0, before[-1], 0] if len(before) else torch.zeros(4)
        torch.testing.assert_close(o[0, t, 0], expected, atol=1e-5, rtol=1e-5)
    # a sum would mix them: the same tokens, written half, leave half of the error
    half = delta_rule(torch.zeros(1, 90, 1, 6), k, v, torch.full((1, 90, 1), 0.5), mode=mode)[1]
    assert (half - state).abs().max() > 0.1


def test_pieces_padding_and_state_between_them():
    inputs = problem((2, 37, 4, 2, 5, 3))
    whole, last = delta_rule(**inputs)
    state, parts = inputs.pop("state"), []
    for piece in (slice(0, 1), slice(1, 20), slice(20, 37)):
        o, state = delta_rule(**{name: x[:, piece] for name, x in inputs.items()}, state=state)
        parts.append(o)
    assert_close(torch.cat(parts, dim=1), whole, "o")
    assert_close(state, last, "state")
    # tokens that write nothing and do not decay leave no trace
    at = torch.tensor([3, 3, 20, 36])
    gaps = torch.cat([torch.arange(37), at]).sort().values
    spread = {name: x[:, gaps] for name, x in inputs.items()}
    repeated = (gaps.diff(prepend=torch.tensor([-1])) == 0)[None, :, None]
    spread["b"], spread["log_decay"] = (spread[name] * ~repeated for name in ("b", "log_decay"))
    _, padded = delta_rule(**spread, state=problem((2, 37, 4, 2, 5, 3))["state"])
    assert_close(padded, last, "state")


def test_long_inputs_in_half_precision_stay_finite():
    inputs = problem((1, 4096, 2, 1, 16, 8), "head", dtype=torch.bfloat16)
    o, state = delta_rule(**inputs)
    assert o.isfinite().all() and state.abs().max() < 100 and o.dtype == state.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    inputs = problem((1, 5, 2, 1, 4, 3))
    for changes, message in (
        ({"mode": "quick"}, "mode='quick' is unknown; choose one of naive, chunk, recurrent"),
        ({"b": inputs["b"][:, :4]}, r"shapes do not fit: q \(1, 5, 2, 4\)"),
        ({"state": inputs["state"][..., :2]}, r"state is \(1, 1, 4, 2\), expected \(1, 1, 4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_rule(**inputs | changes)
