"""The exact branch and its memory in C against their torch forms: oracle `block_window_attention` and `plan_memory`."""

import itertools

import pytest
import torch
from dijiang_testing.model_checks import assert_close, rows, tiny_model

from dijiang.modeling import native_build
from dijiang.modeling.exact_attention_native import (
    exact_is_native,
    native_pass_memory,
    native_received,
    native_window_attention,
)
from dijiang.modeling.exact_memory import plan_memory
from dijiang.modeling.linear_state import EMPTY, LinearState, StateSizes
from dijiang.modeling.memory_scores import WindowAttentionScore
from dijiang.modeling.window_attention import LinearBranch, Sinks, Window, block_window_attention

pytestmark = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")
SCORES = ("learned", "random", "window_attention", "self_recall", "key_diff")
BLOCK = 64


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)
    with torch.no_grad():
        yield


def full_state(scores: torch.Tensor, k: torch.Tensor, slots: tuple[int, ...], filled: int) -> LinearState:
    """A state whose slots hold tokens 0, 1 .. of these scores (B, G, M), the first `filled` of each head, in order of age."""
    state = LinearState.empty(k, k, StateSizes(4, 1, 0, True, slots))
    first = 0
    for head, count in enumerate(slots):
        used = min(count, filled)
        state.memory_score[:, first : first + used] = scores[:, head, :used]
        state.memory_rank[:, first : first + used] = torch.arange(used)
        first += count
    return state


@pytest.mark.parametrize("slots", [(5, 5), (1, 0), (7, 3), (0, 2), (70, 70)], ids=str)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_plan_is_that_of_torch_with_ties_and_tokens_that_do_not_compete(T, slots):
    for seed, (filled, values) in enumerate(itertools.product((0, 2, 100), (3, 1000))):
        M, G = max(slots), len(slots)
        generator = torch.Generator().manual_seed(seed)
        score = torch.randint(0, values, (3, G, M + T), generator=generator).float()
        score[torch.rand(score.shape, generator=generator) < 0.1] = EMPTY
        score[:, :, :M] = score[:, :, :M].clamp_min(0)
        held = score[:, :, :M].clone()
        for head, count in enumerate(slots):
            held[:, head, min(filled, count) :] = EMPTY
        k = rows(3, T, G, 16, seed=seed)
        state = full_state(held, k, slots, filled)
        rank = torch.arange(100, 100 + T).expand(3, T)
        passed, new = native_pass_memory(state, slots, k, k, score[:, :, M:], rank)
        expected = plan_memory(held, score[:, :, M:], slots, BLOCK)
        # candidates of torch's plan are counted over the most slots of any head, those of C over each head's own
        own = torch.tensor(slots).view(1, G, 1)
        lost = torch.where(expected.lost >= M, expected.lost - M + own, expected.lost)
        there = expected.lost >= 0
        assert torch.equal(passed.there.transpose(1, 2), there)
        assert torch.equal(passed.left.long(), expected.left[:, :, M:])
        all_ranks = torch.cat((torch.arange(M).expand(3, G, M), rank.unsqueeze(1).expand(3, G, T)), dim=2)
        assert torch.equal(
            passed.lost_rank.transpose(1, 2), torch.where(there, all_ranks.gather(2, expected.lost.clamp_min(0)), -1)
        )
        first = 0
        for head, count in enumerate(slots):
            here = slice(first, first + count)
            holders = passed.holders[:, :, here].long().sort(dim=-1).values
            wanted = expected.holders[:, head]
            wanted = torch.where(wanted >= M, wanted - M + count, wanted).sort(dim=-1).values[:, :, M - count :]
            assert torch.equal(holders, wanted), head
            assert torch.equal(passed.left_slot[:, here].long(), expected.left[:, head, :count])
            last = expected.last[:, head].sort(dim=-1).values[:, M - count :]
            ranks = torch.where(last >= 0, all_ranks[:, head].gather(1, last.clamp_min(0)), -1)
            assert torch.equal(new["memory_rank"][:, here].long().sort(dim=-1).values, ranks.sort(dim=-1).values), head
            first += count
        picked = lost.clamp_min(0) - own
        from_input = there & (picked >= 0)
        expected_k = k.transpose(1, 2).gather(2, picked.clamp_min(0).unsqueeze(-1).expand(3, G, T, 16))
        assert torch.equal(passed.lost_k.transpose(1, 2)[from_input], expected_k[from_input])


def attention_inputs(T, W, S, R, *, dtype=torch.float32, seed=0, padded=False):
    """q, a window and a linear branch; keys are slices of a longer tensor."""
    B, G, d = 2, 2, 16
    q = rows(B, T, G * R, d, seed=seed).to(dtype)
    k, v = rows(B, W + T, G, 2 * d, seed=seed + 1).to(dtype).split(d, dim=-1)
    valid = arrival = None
    if padded:
        valid = torch.rand(B, W + T, generator=torch.Generator().manual_seed(seed)) < 0.8
        valid[:, -1] = True
        arrival = torch.tensor([[-1, T // 2, T][i % 3] for i in range(B * S)]).view(B, S)
    sinks = Sinks(*(rows(B, S, G, d, seed=seed + i).to(dtype) for i in (2, 3)), arrival)
    weight, bias = rows(G * R, d, seed=seed + 4), rows(G * R, seed=seed + 5)
    numerator, total = rows(B, T, G * R, d, seed=seed + 6), rows(B, T, G * R, seed=seed + 7).clamp_min(0)
    return q, Window(k, v, valid, sinks), numerator, total, (weight, bias, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 7, 64, 65, 150])
@pytest.mark.parametrize(("W", "S", "R"), [(64, 4, 3), (5, 2, 1), (1, 0, 2), (100, 1, 1)])
def test_attention_without_memory_is_that_of_the_blocks(W, S, R, T, dtype):
    for padded in (False, True):
        q, window, numerator, total, (weight, bias, factor) = attention_inputs(T, W, S, R, dtype=dtype, padded=padded)
        log_scale = bias + factor * (q.float() * weight).sum(-1)
        expected = block_window_attention(q, window, LinearBranch(numerator, total, log_scale), scale=0.3)
        o = native_window_attention(q, window, numerator.clone(), total, (weight, bias, factor), scale=0.3)
        real = torch.ones(q.shape[:2], dtype=torch.bool) if window.valid is None else window.valid[:, W:]
        assert_close(o[real], expected[real], f"padded={padded}", tolerance=5e-6)


@pytest.mark.parametrize("T", [1, 7, 64, 150])
@pytest.mark.parametrize(("W", "S", "R"), [(64, 4, 3), (5, 2, 1), (1, 0, 2)])
def test_received_weights(W, S, R, T):
    for padded in (False, True):
        q, window, *_ = attention_inputs(T, W, S, R, padded=padded)
        real = None if window.valid is None else window.valid[:, W:]
        expected = WindowAttentionScore.received(None, q, window, real, 0.3)
        assert_close(native_received(q, window, 0.3), expected, f"padded={padded}", tolerance=5e-6)


# T, window, sinks, slots, query heads per key/value head, B
SHAPES = [
    (70, 5, 2, 3, 3, 2), (200, 16, 0, 7, 2, 1), (300, 64, 4, 20, 3, 1), (333, 100, 3, [[5, 0], [3, 3]], 1, 3),
    (150, 1, 1, 9, 2, 1), (129, 8, 2, 200, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_equal_torchs(shape, score, dtype, monkeypatch):
    """Outputs and states, of whole inputs, of pieces and steps, and with padding."""
    T, window, sinks, slots, R, B = shape
    seed = SHAPES.index(shape)
    layer = tiny_model(
        seed, hidden_size=32 * R, num_attention_heads=2 * R, num_key_value_heads=2, feature_dim=16, attention_window=window,
        attention_sinks=sinks, attention_memory=slots, memory_score=score, decay="learned" if seed % 2 else "none",
        feature_map="elu" if seed % 3 == 2 else "wdcf",
    ).model.layers[0].self_attn  # fmt: skip
    q, k, v, raw_k = (rows(B, T, heads, 16, seed=seed * 7 + i).to(dtype) for i, heads in enumerate((2 * R, 2, 2, 2)))
    raw_k[:, ::3] = raw_k[:, :1]
    left = torch.arange(T) >= torch.arange(B)[:, None] * 13
    holes = left.clone()
    holes[0, T // 2 : T // 2 + 5] = False
    steps = [0, 3, 50, *range(51, min(T, 90)), T]
    cases = {"whole": ([0, T], None), "pieces": (steps, None), "padded": ([0, T], left), "holes": ([0, 20, T], holes)}

    def attend(cuts, valid):
        state, outputs = None, []
        for start, end in itertools.pairwise(cuts):
            part = slice(start, end)
            here = None if valid is None else valid[:, part]
            o, state = layer.attend(q[:, part], k[:, part], v[:, part], here, state, raw_k[:, part])
            outputs.append(o if here is None else o * here[..., None, None])
        return torch.cat(outputs, dim=1), state

    assert exact_is_native(q, k, v)
    found = {name: attend(*case) for name, case in cases.items()}
    monkeypatch.setenv("DIJIANG_NATIVE", "0")
    assert not exact_is_native(q, k, v)
    for name, case in cases.items():
        o, state = attend(*case)
        assert_close(found[name][0], o, name, tolerance=2e-5 if dtype == torch.float32 else 2e-2)
        new = found[name][1]
        assert (new.seen, new.settled, new.full) == (state.seen, state.settled, state.full)
        assert_close(new.state, state.state, f"{name}: state", tolerance=2e-5 if dtype == torch.float32 else 2e-2)
        if state.window_score.numel():
            assert_close(new.window_score + 1, state.window_score + 1, f"{name}: scores", tolerance=1e-5)
        for head in range(2):
            begin = sum(layer.slots[:head])
            here = slice(begin, begin + layer.slots[head])
            order, wanted = (x.memory_rank[:, here].argsort(dim=1) + begin for x in (new, state))
            for field in ("memory_rank", "memory_k", "memory_v"):
                x, y = (getattr(s, field)[torch.arange(B)[:, None], i] for s, i in ((new, order), (state, wanted)))
                assert torch.equal(x, y), f"{name}: {field} of head {head}"


def test_gradients_and_other_dtypes_are_left_to_torch():
    q, k, v = rows(1, 70, 2, 16), rows(1, 70, 2, 16), rows(1, 70, 2, 16)
    assert exact_is_native(q, k, v)
    assert not exact_is_native(q.half(), k.half(), v.half())
    assert not exact_is_native(q[..., :8], k[..., :8], v[..., :8])
    with torch.enable_grad():
        assert not exact_is_native(q, k, v)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_numbers(threads):
    q, window, numerator, total, log_scale = attention_inputs(300, 64, 4, 3)
    before = torch.get_num_threads()
    expected = native_window_attention(q, window, numerator.clone(), total, log_scale, scale=0.3)
    torch.set_num_threads(threads)
    o = native_window_attention(q, window, numerator.clone(), total, log_scale, scale=0.3)
    torch.set_num_threads(before)
    assert torch.equal(o, expected)
