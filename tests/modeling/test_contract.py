"""The correctness contract on whole models: every map x decay x window, one truth however the tokens are fed."""

from copy import deepcopy

import pytest
import torch
from dijiang_testing.model_checks import EVERY, assert_close, case_settings, random_ids, rows, set_mode, tiny_model

from dijiang.modeling.linear_attention_native import native_is_usable

# one of each for checks whose code path depends on no map but cosformer, which needs positions
SOME = [
    ("wdcf", "none", (0, 0)),
    ("wdcf", "learned", (5, 2)),
    ("hedgehog", "retnet", (1, 0)),
    ("elu", "none", (5, 2)),
    ("cosformer", "none", (5, 2)),
    ("wdcf", "none", (5, 2, "slots")),
    ("wdcf", "learned", (5, 2, "kept")),
    ("cosformer", "learned", (5, 2, "both")),
    ("wdcf", "none", (0, 0), "delta"),
    ("identity", "learned", (5, 2, "both"), "delta"),
]


def build(case, seed=0, **overrides):
    return tiny_model(seed, **case_settings(case), **overrides)


def has_slots(case) -> bool:
    """Whether the layers hold tokens by their scores: rounding may then move other tokens into the slots."""
    return "attention_memory" in case_settings(case)


def padding_mask(lengths, T: int, side: str) -> torch.Tensor:
    """(rows, T), 1 for the tokens of each row, 0 for the padding on `side`."""
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_naive_equals_chunk_equals_recurrent_forward_and_backward(case):
    model, ids = build(case), random_ids(2, 71)
    results = {}
    for mode in ("naive", "chunk", "recurrent"):
        set_mode(model, mode)
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[mode] = {"logits": output.logits.detach()} | gradients
    assert any("feature_map_k" in name for name in results["naive"]) or case[0] in ("elu", "cosformer", "identity")
    for mode in ("chunk", "recurrent"):
        assert results[mode].keys() == results["naive"].keys()
        for name, expected in results["naive"].items():
            # without a window it cancels in the denominator, if there is one: the gradient is noise
            cancels = model.config.normalize and not case[2][0] and "delta" not in case
            if name.endswith("key_scale.bias") and cancels:
                assert expected.abs().max() < 1e-5 and results[mode][name].abs().max() < 1e-5
            else:
                assert_close(results[mode][name], expected, f"{mode} {name}", tolerance=1e-3)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_cache_equals_no_cache_in_pieces_and_token_by_token(case):
    model, ids = build(case), random_ids(2, 43)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, pieces = None, []
        for start, end in ((0, 1), (1, 3), (3, 24), (24, 25), (25, 36), *((t, t + 1) for t in range(36, 43))):
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert_close(torch.cat(pieces, 1), whole, "logits", tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_padding_leaves_no_trace(case, side, dtype):
    """Rows of different lengths in one batch against each row alone, the padding being arbitrary tokens."""
    model, lengths, T = build(case).to(dtype), (3, 17, 29), 29
    ids, mask = random_ids(3, T, seed=1), padding_mask(lengths, T, side)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        for row, length in enumerate(lengths):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real], use_cache=False).logits[0]
            tolerance = 1e-4 if dtype == torch.float32 else 4e-2
            assert_close(padded[row, real], alone, f"{side}, length {length}", tolerance=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_padded_prompts_continue_from_the_cache_as_alone(case, side):
    model, lengths, T = build(case), (2, 9, 21), 21
    ids, more = random_ids(3, T, seed=2), random_ids(3, 12, seed=3)
    mask = padding_mask(lengths, T, side)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        steps = []
        for t in range(more.shape[1]):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
            steps.append(model(more[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
        steps = torch.cat(steps, 1)
        for row, length in enumerate(lengths):
            real = mask[row, :T].bool()
            joined = torch.cat((ids[row, real], more[row]))[None]
            expected = model(joined, use_cache=False).logits[0, length:]
            # padding after the prompt takes places in the window, so only a layer without one can look past it
            if side == "left" or not model.config.attention_window:
                assert_close(steps[row], expected, f"length {length}", tolerance=1e-4)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_generation_from_left_padded_batch_equals_each_prompt_alone(case):
    model, lengths, T = build(case, pad_token_id=0), (4, 11), 11
    ids, mask = random_ids(2, T, seed=4), padding_mask(lengths, T, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, T - length :], max_new_tokens=20, do_sample=False)
        assert torch.equal(together[row, T:], alone[0, length:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_cached_generation_equals_uncached(case, options):
    model, ids = build(case), random_ids(2, 9, seed=5)
    cached, plain = (model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_prompt_in_pieces_and_continued_chat_equal_one_prompt(case):
    model, ids = build(case), random_ids(1, 31, seed=6)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, prefill_chunk_size=7), expected)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_rows_of_a_batch_do_not_depend_on_their_order(case):
    model, ids = build(case), random_ids(4, 26, seed=7)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(model(ids[order]).logits, model(ids).logits[order], "logits")


@pytest.mark.parametrize("case", SOME, ids=str)
def test_no_token_sees_the_future(case):
    model, ids = build(case), random_ids(1, 40, seed=8)
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 97
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("case", [case for case in SOME if "full_heads" not in case_settings(case)], ids=str)
def test_cache_size_does_not_depend_on_length(case):
    """Bytes are those of the memory behind the tensors: a view of a long prompt would count as long."""
    model, sizes = build(case), set()
    with torch.no_grad():
        for T in (1, 10, 333):
            cache = model(random_ids(2, T), use_cache=True).past_key_values
            sizes.add(cache.memory_bytes())
            model(random_ids(2, 1), past_key_values=cache)
            sizes.add(cache.memory_bytes())
    assert len(sizes) == 1


def test_layer_types_mix():
    types = ["full_attention", "linear_attention", "sliding_attention"]
    model = tiny_model(num_hidden_layers=3, layer_types=types, sliding_window=4)
    ids = random_ids(2, 23, seed=9)
    cached, plain = (model.generate(ids, max_new_tokens=15, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    pieces, cache = [], None
    for start, end in ((0, 9), (9, 10), (10, 23)):
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, "logits", tolerance=1e-4)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compiled_with_a_cache_equals_eager(case):
    model, ids = build(case), random_ids(1, 21)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = compiled(ids[:, :20], use_cache=True)
        second = compiled(ids[:, 20:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), expected, "logits", tolerance=1e-4)


@pytest.mark.parametrize("case", [case for case in EVERY if not has_slots(case)], ids=str)
@torch.no_grad()
def test_bfloat16_prompt_in_pieces_equals_the_whole(case):
    """Root mean squares, as single logits differ by rounding alone: measured, 1.6e-2 at most and 1.2 times."""
    model, ids = build(case), random_ids(2, 60)
    full = model(ids, use_cache=False).logits
    whole = model.to(torch.bfloat16)(ids, use_cache=False).logits
    cache, pieces = None, []
    for start, end in ((0, 23), (23, 24), (24, 26), (26, 45), *((t, t + 1) for t in range(45, 60))):
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    pieces = torch.cat(pieces, 1)
    assert pieces.dtype == torch.bfloat16
    distance = lambda x, y: ((x.float() - y.float()).norm() / full.norm()).item()  # noqa: E731
    assert distance(pieces, whole) < 3e-2 and distance(pieces, full) < 1.5 * distance(whole, full)


# decoding with states that are settled: sinks filled, the window full of later tokens


def layer_and_inputs(case, B: int, T: int, seed: int = 0):
    """The first layer of a model and q, k, v and unrotated keys of T tokens for its heads with a linear state."""
    layer = build(case).model.layers[0].self_attn
    G = len(layer.linear_heads)
    return layer, [rows(B, T, heads, 8, seed=seed + i) for i, heads in enumerate((3 * G, G, G, G))]


def attend(layer, inputs, valid=None, state=None):
    q, k, v, raw_k = inputs
    return layer.attend(q, k, v, valid, state, raw_k)


def between(tensors, start: int, end: int):
    return [x[:, start:end] for x in tensors]


def decode(layer, qkv, start: int, end: int, state):
    """Tokens start .. end - 1 one by one."""
    outputs = []
    for t in range(start, end):
        o, state = attend(layer, between(qkv, t, t + 1), None, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def assert_same_memory(state, expected, slots: tuple[int, ...], name: str, tolerance: float) -> None:
    """Each head's slots hold the same tokens, in any order."""
    for found, wanted in zip(*(x.memory_rank.split(slots, dim=1) for x in (state, expected)), strict=True):
        assert torch.equal(found.sort(-1).values, wanted.sort(-1).values), f"{name}: tokens in the memory"
    for part in ("memory_k", "memory_v", "memory_score"):
        sums = []
        for x in (state, expected):
            values = getattr(x, part)
            values = values.unsqueeze(-1) if values.dim() == 2 else values
            weight = torch.where(x.memory_rank >= 0, (x.memory_rank + 1.0).cos(), 0.0)  # tells the tokens apart
            values = torch.where(x.memory_rank.unsqueeze(-1) >= 0, values, 0.0) * weight.unsqueeze(-1)
            sums.append(torch.stack([y.sum(1) for y in values.split(slots, dim=1)]))
        assert_close(*sums, f"{name}: {part}", tolerance)


def assert_same_state(state, expected, name: str, tolerance: float = 2e-5, slots: tuple[int, ...] = ()) -> None:
    for part in ("state", "window_k", "window_v", "window_score", "score_carry"):
        if getattr(expected, part).numel():
            assert_close(getattr(state, part), getattr(expected, part), f"{name}: {part}", tolerance)
    if state.memory_rank.numel():
        assert_same_memory(state, expected, slots, name, tolerance)
    for part in ("tokens", "sink_filled", "seen", "settled", "full"):
        assert torch.equal(torch.as_tensor(getattr(state, part)), torch.as_tensor(getattr(expected, part))), f"{name}: {part}"
    assert torch.equal(state.ranks(), expected.ranks()), f"{name}: ranks"


@pytest.mark.parametrize("case", EVERY, ids=str)
@torch.no_grad()
def test_lean_step_equals_the_general_one(case):
    """A mode asked for by name takes the general path."""
    layer, qkv = layer_and_inputs(case, 3, 40)
    _, state = attend(layer, between(qkv, 0, 23))
    assert state.settled
    for t in range(23, 40):
        token, before = between(qkv, t, t + 1), deepcopy(state)
        layer.mode = "recurrent"
        expected, expected_state = attend(layer, token, None, state)
        layer.mode = None
        o, new_state = attend(layer, token, None, state)
        stepped, _ = layer.attend_step(*token[:3], state, token[3])
        assert torch.equal(o, stepped)
        assert_close(o, expected, f"o at {t}")
        assert_same_state(new_state, expected_state, f"state at {t}", slots=layer.slots)
        assert_same_state(state, before, "the old state", tolerance=1e-9, slots=layer.slots)
        state = new_state


@pytest.mark.parametrize("case", EVERY, ids=str)
@torch.no_grad()
def test_settled_state_continued_by_pieces_equals_one_pass(case):
    """Lean steps leave the ranks of the window to be counted again, which positions of keys depend on."""
    layer, qkv = layer_and_inputs(case, 2, 130, seed=3)
    expected, last = attend(layer, qkv)
    o, state = attend(layer, between(qkv, 0, 13))
    outputs = [o]
    for start, end in ((13, 24), (27, 36), (38, 110), (116, 120)):  # lean steps up to each piece, then the piece
        if start > state.seen:
            o, state = decode(layer, qkv, state.seen, start, state)
            outputs.append(o)
        o, state = attend(layer, between(qkv, start, end), None, state)
        outputs.append(o)
    o, state = decode(layer, qkv, state.seen, 130, state)
    assert_close(torch.cat([*outputs, o], dim=1), expected, "o", tolerance=1e-4)
    assert_same_state(state, last, "state", tolerance=1e-4, slots=layer.slots)


@pytest.mark.parametrize("case", EVERY, ids=str)
@torch.no_grad()
def test_rows_that_settle_at_different_times_equal_each_row_alone(case):
    """A left-padded batch, then steps without a mask, far more than window and sinks hold."""
    lengths, T, steps = (1, 6, 19), 19, 32
    layer, qkv = layer_and_inputs(case, 3, T + steps, seed=6)
    valid = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    _, state = attend(layer, between(qkv, 0, T), valid)
    assert state.settled == (case[2][0] == 0 or case[2] == (1, 0))
    o, state = decode(layer, qkv, T, T + steps, state)
    assert state.settled and state.tokens.tolist() == [length + steps for length in lengths]
    for row, length in enumerate(lengths):
        alone = [x[row : row + 1, T - length :] for x in qkv]
        expected, last = attend(layer, alone)
        assert_close(o[row : row + 1], expected[:, length:], f"length {length}", tolerance=1e-4)
        assert_close(state.state[row : row + 1], last.state, f"state of length {length}", tolerance=1e-4)
        assert torch.equal(state.ranks()[row : row + 1], last.ranks())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_padding_after_a_settled_state_leaves_no_trace(case, side):
    """Messages of a chat that differ in length: padding is ignored, and left of a message it shifts only the window."""
    layer, qkv = layer_and_inputs(case, 2, 60, seed=9)
    _, state = attend(layer, between(qkv, 0, 30))
    assert state.settled
    valid = padding_mask((7, 20), 20, side).bool()
    results = []
    for shift in (0.0, 2.0):
        message = [torch.where(valid[..., None, None], x, x + shift) for x in between(qkv, 30, 50)]
        o, after = attend(layer, message, valid, state)
        steps, end = decode(layer, qkv, 50, 60, after)
        results.append({"o": o[valid], "steps": steps, "state": after.state, "state at the end": end.state})
        assert after.tokens.tolist() == [37, 50]
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, name)


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_right_padding_behind_the_first_piece_of_a_long_prompt_leaves_no_trace(case, monkeypatch):
    """The state is settled after the first piece and meets the padding in the second."""
    monkeypatch.setattr("dijiang.modeling.layer_linear_heads.PIECE", 16)
    layer, qkv = layer_and_inputs(case, 2, 48, seed=12)
    valid = padding_mask((20, 48), 48, "right").bool()
    results = []
    for shift in (0.0, 2.0):
        _, state = attend(layer, [torch.where(valid[..., None, None], x, x + shift) for x in qkv], valid)
        results.append(state)
    assert_close(results[1].state, results[0].state, "state")


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_settled_caches_are_copied_and_reordered(case):
    model, ids, more = build(case), random_ids(4, 30, seed=10), random_ids(4, 25, seed=11)
    cache = None
    for piece in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):  # settled long before its last token
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    assert all(layer.state.settled for layer in cache.layers)
    order = torch.tensor([2, 0, 0, 3])
    for operation, chosen in (
        (lambda cache: None, torch.arange(4)),
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_select_indices(order[:2]), order[:2]),
        (lambda cache: cache.batch_repeat_interleave(2), torch.arange(4).repeat_interleave(2)),
    ):
        copy, logits = deepcopy(cache), []
        operation(copy)
        for piece in (*more[chosen, :8].split(1, dim=1), more[chosen, 8:17], *more[chosen, 17:].split(1, dim=1)):
            logits.append(model(piece, past_key_values=copy).logits)
        expected = model(torch.cat((ids, more), 1)[chosen], use_cache=False).logits[:, 30:]
        assert_close(torch.cat(logits, 1), expected, "logits", tolerance=1e-4)
        assert cache.get_seq_length() == 30 and copy.get_seq_length() == 55


@pytest.mark.parametrize("case", SOME, ids=str)
@torch.no_grad()
def test_long_decoding_of_a_left_padded_batch_equals_each_row_alone(case):
    model, lengths, T, steps = build(case), (2, 9, 21), 21, 30
    ids, more = random_ids(3, T, seed=12), random_ids(3, steps, seed=13)
    mask = torch.cat((padding_mask(lengths, T, "left"), torch.ones(3, steps, dtype=torch.long)), dim=1)
    cache = model(ids, attention_mask=mask[:, :T], use_cache=True).past_key_values
    logits = [
        model(more[:, t : t + 1], attention_mask=mask[:, : T + t + 1], past_key_values=cache).logits for t in range(steps)
    ]
    for row, length in enumerate(lengths):
        alone = torch.cat((ids[row, T - length :], more[row]))[None]
        expected = model(alone, use_cache=False).logits[0, length:]
        assert_close(torch.cat(logits, 1)[row], expected, f"length {length}", tolerance=1e-4)


@pytest.mark.parametrize("case", [case for case in SOME if not has_slots(case)], ids=str)
def test_autocast_is_near_full_precision_forward_and_backward(case):
    """As the Trainer's bf16=True: float32 weights, products in bfloat16."""
    model, ids = build(case, initializer_range=0.1), random_ids(2, 71)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inference = model(ids, use_cache=False).logits
            cache = model(ids[:, :70]).past_key_values
            step = model(ids[:, 70:], past_key_values=cache).logits
        results.append((output.logits.detach(), inference, step, {name: p.grad for name, p in model.named_parameters()}))
        assert all(x is None or torch.isfinite(x).all() for x in results[-1][3].values())
    for name, expected, low in zip(("logits", "inference", "step"), *results, strict=False):
        assert_close(low.float(), expected, name, tolerance=0.1)


# head and feature sizes that the C kernels take; the tiny ones of the other tests go through torch
NATIVE = {"hidden_size": 96, "head_dim": 16, "feature_dim": 16}
NATIVE_CASES = [
    ("wdcf", "none", (0, 0)),
    ("wdcf", "learned", (5, 2)),
    ("hedgehog", "retnet", (1, 0)),
    ("prf", "none", (5, 2)),
    ("wdcf", "none", (5, 2, "slots")),
    ("hedgehog", "none", (5, 2, "kept")),
    ("wdcf", "learned", (5, 2, "both")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_native_layers_equal_torchs(case, dtype, monkeypatch):
    """Whole rows, padded ones, prompts in pieces and steps, with DIJIANG_NATIVE=0 and without."""
    # in halves another token would get a slot, so that these are given by place
    settings = NATIVE | case_settings(case)
    if has_slots(case) and dtype == torch.bfloat16:
        settings["memory_score"] = "random"
    model, ids = tiny_model(**settings).to(dtype), random_ids(3, 90, seed=11)
    layer = model.model.layers[0].self_attn
    mask = padding_mask((90, 41, 66), 90, "left")

    def outputs():
        with torch.no_grad():
            yield model(ids, use_cache=False).logits
            yield model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            cache, pieces = None, []
            for start, end in ((0, 7), (7, 60), *((t, t + 1) for t in range(60, 75)), (75, 90)):
                output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                pieces.append(output.logits)
            yield torch.cat(pieces, dim=1)

    with torch.no_grad():
        q, k, v, _ = layer.project(
            torch.randn(1, 9, 96, dtype=dtype), model.model.rotary_emb(ids.to(dtype), torch.arange(9)[None])
        )
        assert layer.runs_natively(q, k, v, None) == native_is_usable()[0]
    native = list(outputs())
    monkeypatch.setenv("DIJIANG_NATIVE", "0")
    for name, result, expected in zip(("whole", "padded", "pieces"), native, outputs(), strict=True):
        assert_close(result, expected, name, tolerance=1e-4 if dtype == torch.float32 else 4e-2)
    assert_close(native[2], native[0], "pieces of the whole", tolerance=1e-4 if dtype == torch.float32 else 8e-2)


def test_calibration_reads_sums_of_weights_from_layers_of_any_size():
    """Without a state and with values of no columns, as train/ asks for them."""
    layer = build(("wdcf", "none", (5, 2)), **NATIVE).model.layers[0].self_attn
    q, k = torch.randn(2, 40, 6, 16), torch.randn(2, 40, 2, 16)
    with torch.no_grad():
        _, total, _ = layer.linear_branch(q, k, k[..., :0], None, None)
        _, expected, _ = layer.linear_branch(q, k, k, None, None)
    assert_close(total, expected, "sums")


def test_windows_changed_on_a_live_layer_need_a_new_cache():
    model, ids = build(("wdcf", "none", (5, 2))), random_ids(1, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for layer in model.model.layers:
            layer.self_attn.window = 9
        with pytest.raises(
            ValueError, match="7 rows for sinks and window, the layer 2 sinks and a window of 9; start from a new"
        ):
            model(ids[:, :1], past_key_values=cache)
