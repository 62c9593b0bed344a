"""The correctness contract on whole models: every map x decay x window, one truth however the tokens are fed."""

import pytest
import torch
from helpers import EVERY, assert_close, random_ids, set_mode, tiny_model

# one of each for checks whose code path depends on no map but cosformer, which is given positions
SOME = [
    ("wdcf", "none", (0, 0)),
    ("wdcf", "learned", (5, 2)),
    ("hedgehog", "retnet", (1, 0)),
    ("elu", "none", (5, 2)),
    ("cosformer", "none", (5, 2)),
]


def build(case, seed=0, **overrides):
    feature_map, decay, (window, sinks) = case
    return tiny_model(seed, feature_map=feature_map, decay=decay, attention_window=window, attention_sinks=sinks, **overrides)


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
            if name.endswith("key_scale.bias") and model.config.normalize and not case[2][0]:
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
    """Rows of different lengths in one batch against each row alone, padding made of arbitrary tokens."""
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


@pytest.mark.parametrize("case", SOME, ids=str)
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
