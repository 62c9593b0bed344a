"""The exact memory against its definition: the M highest scores of all that left the window, one query after another."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, features, rows, tiny_model

from dijiang.modeling.exact_memory import plan_memory
from dijiang.modeling.linear_state import EMPTY

SCORES = ("learned", "window_attention", "self_recall", "random", "key_norm", "key_diff")


def compete(held, arriving, slots: int):
    """One token after another: what each drove out, when each was driven out, and what is held at the end."""
    M, T = len(held), len(arriving)
    left, lost = [T] * (M + T), [-1] * T
    current = [(score, i) for i, score in enumerate(held) if score > EMPTY]
    for t, score in enumerate(arriving):
        if score == EMPTY:
            left[M + t] = t
            continue
        current.append((score, M + t))
        if len(current) > slots:
            weakest = min(current, key=lambda x: (x[0], -x[1]))  # of equal ones the youngest
            current.remove(weakest)
            left[weakest[1]], lost[t] = t, weakest[1]
    return left, lost, sorted(i for _, i in current)


@pytest.mark.parametrize("seed", range(60))
def test_plan_is_what_a_token_by_token_competition_gives(seed):
    """Few distinct scores, so that there are many ties; heads with different numbers of slots; tokens that do not compete."""
    generator = torch.Generator().manual_seed(seed)
    T, C, G = (int(torch.randint(1, high, (), generator=generator)) for high in (40, 12, 4))
    slots = tuple(torch.randint(0, 7, (G,), generator=generator).tolist())
    M = max(slots) + 1
    held = torch.randint(0, 9, (2, G, M), generator=generator).float()
    for head, count in enumerate(slots):
        held[:, head, int(torch.randint(0, count + 1, (), generator=generator)) :] = EMPTY
    arriving = torch.randint(0, 9, (2, G, T), generator=generator).float()
    arriving[torch.rand(2, G, T, generator=generator) < 0.2] = EMPTY
    plan = plan_memory(held, arriving, slots, C)
    for b in range(2):
        for head, count in enumerate(slots):
            left, lost, last = compete(held[b, head].tolist(), arriving[b, head].tolist(), count)
            there = [i for i in range(M + T) if i >= M or held[b, head, i] > EMPTY]
            assert plan.left[b, head, there].tolist() == [left[i] for i in there]
            assert plan.lost[b, head].tolist() == lost
            assert [i for i in plan.last[b, head].tolist() if i >= 0] == last
            for n, start in enumerate(range(0, T, C)):
                _, _, before = compete(held[b, head].tolist(), arriving[b, head, :start].tolist(), count)
                assert [i for i in plan.holders[b, head, n].tolist() if i >= 0] == before


def layer_with_memory(score: str, slots, **overrides):
    settings = {"attention_memory": slots, "memory_score": score, "decay": "learned"} | overrides
    return tiny_model(**settings).model.layers[0].self_attn


def spy_on_scores(layer):
    """The scores of leaving tokens, (B, G, T) of each call."""
    found, original = [], layer.scores_of_leaving
    layer.scores_of_leaving = lambda *args: found.append(original(*args)) or found[-1]
    return found


def loop_oracle(layer, q, k, v, scores):
    """The layer's definition, query by query, from the scores (B, G, T) of its tokens."""
    B, T, H, d = q.shape
    W, S, R = layer.window, layer.sinks, layer.num_key_value_groups
    phi_q = features(layer.feature_map_q, q * layer.feature_scale)
    phi_k = layer.key_features(k, torch.arange(T).expand(B, T))
    log_decay = layer.decay() if layer.decay is not None else torch.zeros(k.shape[2])
    o = torch.zeros(B, T, H, d)
    for b in range(B):
        for g, slots in enumerate(layer.slots):
            held, state = [], []
            for t in range(T):
                if t - W >= S:
                    held.append(t - W)
                    if len(held) > slots:
                        state.append(min(held, key=lambda j: (scores[b, g, j].item(), -j)))
                        held.remove(state[-1])
                exact = [j for j in range(t + 1) if t - j < W or j < S] + held
                ages = torch.arange(len(state) - 1, -1, -1)  # a key decays once for every key after it
                for h in range(g * R, (g + 1) * R):
                    weights = torch.zeros(T)
                    weights[exact] = (k[b, exact, g] @ q[b, t, h] * d**-0.5).exp()
                    old = phi_k[b, state, g] @ phi_q[b, t, h] * (log_decay[g] * ages).exp()
                    weights[state] = old * layer.branch_scale(q, layer.feature_scale)[b, t, h].exp()
                    o[b, t, h] = weights @ v[b, :, g] / weights.sum()
    return o


@pytest.mark.parametrize("slots", [3, 0, [[3, 1], [0, 4]], [[0, 30], [2, 2]]], ids=str)
@pytest.mark.parametrize("feature_map", ["wdcf", "cosformer"])
@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_layer_equals_its_definition_whole_and_in_pieces(score, feature_map, slots):
    layer = layer_with_memory(score, slots, feature_map=feature_map)
    q, k, v, raw_k = (rows(2, 29, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    scores = torch.zeros(2, 2, 29)
    if layer.has_memory:
        found = spy_on_scores(layer)
        o, _ = layer.attend(q, k, v, raw_k=raw_k)
        scores[:, :, : 29 - layer.window] = found[0][:, :, layer.window :]
    else:
        o, _ = layer.attend(q, k, v)
    assert_close(o, loop_oracle(layer, q, k, v, scores), "o")
    outputs, state = [], None
    for start, end in ((0, 1), (1, 9), (9, 10), (10, 11), (11, 20), (20, 29)):
        piece, state = layer.attend(*(x[:, start:end] for x in (q, k, v)), None, state, raw_k[:, start:end])
        outputs.append(piece)
    assert_close(torch.cat(outputs, 1), o, "in pieces", tolerance=1e-4)


@torch.no_grad()
def test_slots_for_every_token_are_full_attention():
    layer = layer_with_memory("random", 40, decay="none")
    q, k, v, raw_k = (rows(1, 44, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert_close(layer.attend(q, k, v, raw_k=raw_k)[0], full.transpose(1, 2), "o")


def test_gradients_reach_held_keys_and_the_state_as_the_definition_says():
    layer = layer_with_memory("learned", 3)
    inputs = [rows(1, 23, heads, 8, seed=i).requires_grad_() for i, heads in enumerate((6, 2, 2))]
    raw_k = rows(1, 23, 2, 8, seed=3)
    found = spy_on_scores(layer)
    o, _ = layer.attend(*inputs, raw_k=raw_k)
    scores = torch.zeros(1, 2, 23)
    scores[:, :, : 23 - layer.window] = found[0][:, :, layer.window :].detach()
    weight = rows(*o.shape, seed=4)
    gradients = torch.autograd.grad((o * weight).sum(), inputs)
    expected = torch.autograd.grad((loop_oracle(layer, *inputs, scores) * weight).sum(), inputs)
    for name, x, y in zip("qkv", gradients, expected, strict=True):
        assert_close(x, y, f"d{name}", tolerance=1e-4)


def test_soft_gate_trains_the_scores_and_becomes_the_hard_memory_as_it_cools():
    """A cool gate lets all but the weakest held token through; that one counts half, half in the linear branch."""
    layer = layer_with_memory("learned", 4)
    q, k, v, raw_k = (rows(1, 40, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    layer.gate_temperature = 0.5
    o, _ = layer.attend(q, k, v, raw_k=raw_k)
    o.square().sum().backward()
    gradients = [p.grad for p in layer.memory_score.parameters()]
    assert all(x is not None and x.isfinite().all() and x.abs().sum() > 0 for x in gradients)
    # warm: each held key counts half exactly and half through its features
    layer.gate_temperature = 1e9
    with torch.no_grad():
        found = spy_on_scores(layer)
        warm, _ = layer.attend(q, k, v, raw_k=raw_k)
        scores = torch.zeros(1, 2, 40)
        scores[:, :, : 40 - layer.window] = found[0][:, :, layer.window :]
        assert_close(warm, half_gated_oracle(layer, q, k, v, scores), "half open gate")


def half_gated_oracle(layer, q, k, v, scores):
    """`loop_oracle` where held keys count half exactly and half through their features, undecayed."""
    B, T, H, d = q.shape
    W, S, R = layer.window, layer.sinks, layer.num_key_value_groups
    phi_q, phi_k = features(layer.feature_map_q, q * layer.feature_scale), layer.key_features(k, None)
    o = torch.zeros(B, T, H, d)
    for g, slots in enumerate(layer.slots):
        held, state = [], []
        for t in range(T):
            if t - W >= S:
                held.append(t - W)
                if len(held) > slots:
                    state.append(min(held, key=lambda j: (scores[0, g, j].item(), -j)))
                    held.remove(state[-1])
            near = [j for j in range(t + 1) if t - j < W or j < S]
            ages = torch.arange(len(state) - 1, -1, -1)
            for h in range(g * R, (g + 1) * R):
                unit = layer.branch_scale(q, layer.feature_scale)[0, t, h].exp()
                exact = lambda rows: (k[0, rows, g] @ q[0, t, h] * d**-0.5).exp()  # noqa: B023, E731
                linear = lambda rows: phi_k[0, rows, g] @ phi_q[0, t, h] * unit  # noqa: B023, E731
                weights = torch.zeros(T)
                weights[near] = exact(near)
                weights[held] = 0.5 * exact(held) + 0.5 * linear(held)
                weights[state] = linear(state) * (layer.decay()[g] * ages).exp()
                o[0, t, h] = weights @ v[0, :, g] / weights.sum()
    return o


@torch.no_grad()
def test_state_bytes_do_not_depend_on_length_and_are_those_of_the_slots():
    layer = layer_with_memory("learned", [[3, 1], [0, 4]])
    sizes = set()
    for T in (1, 9, 200):
        q, k, v, raw_k = (rows(2, T, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
        _, state = layer.attend(q, k, v, raw_k=raw_k)
        sizes.add(sum(x.untyped_storage().nbytes() for x in state.compact().tensors()))
        assert state.memory_k.shape == (2, 4, 8)
    assert len(sizes) == 1


def test_a_state_of_other_slots_is_refused():
    layer = layer_with_memory("learned", 3)
    q, k, v, raw_k = (rows(1, 20, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    _, state = layer.attend(q, k, v, raw_k=raw_k)
    layer.slots = (2, 2)
    with pytest.raises(ValueError, match="6 slots, the layer 4; start from a new cache"):
        layer.attend(q, k, v, None, state, raw_k)
    with pytest.raises(ValueError, match="needs raw_k"):
        layer.attend(q, k, v)
