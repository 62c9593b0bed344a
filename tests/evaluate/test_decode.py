"""Bytes held while decoding, in closed form, and the greedy steps that are timed."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.evaluate import decode_speed

LAYERS, GROUPS, DIM, WINDOW, SINKS, FEATURES = 2, 2, 8, 4, 2, 16  # of the pair; features come in pairs


def student_bytes(itemsize: int) -> int:
    state = 4 * GROUPS * FEATURES * (DIM + 1)  # sum of phi(k) (v, 1), float32
    window = WINDOW * (2 * GROUPS * DIM * itemsize + 8)  # keys, values and how many tokens came before
    sinks = SINKS * (2 * GROUPS * DIM * itemsize + 1)  # keys, values and whether they are there
    return LAYERS * (state + window + sinks + 8)  # and the number of tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [5, 40])
def test_a_teachers_cache_grows_with_every_token(pair, tokens, dtype, context):
    found = decode_speed(load_source(pair.teacher, dtype=dtype)[0], tokens(context)[0], steps=3, warmup=2)
    per_token = 2 * LAYERS * GROUPS * DIM * dtype.itemsize
    assert found["cache_bytes"] == context * per_token
    assert found["cache_bytes_after"] == (context + 5) * per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [1, WINDOW + SINKS, 7, 40, 400])
def test_a_students_state_has_one_size(pair, tokens, dtype, context):
    found = decode_speed(load_source(pair.checkpoint, dtype=dtype)[0], tokens(context)[0], steps=3, warmup=2)
    assert found["cache_bytes"] == found["cache_bytes_after"] == student_bytes(dtype.itemsize)


@pytest.mark.parametrize("side", ["teacher", "checkpoint"])
def test_steps_decode_greedily(pair, tokens, side):
    model, context = load_source(getattr(pair, side))[0], tokens(20)[0]
    fed = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    found = decode_speed(model, context, steps=4, warmup=3)
    handle.remove()
    assert torch.equal(fed[0], context[None]) and [ids.shape for ids in fed[1:]] == [(1, 1)] * 7
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.cat(fed, dim=1).tolist() == model.generate(context[None], **options).tolist()
    assert found.keys() == {"prefill_seconds", "tokens_per_second", "cache_bytes", "cache_bytes_after"}
    assert found["prefill_seconds"] > 0


def test_speed_is_that_of_the_median_step_after_the_warmup(pair, tokens, monkeypatch):
    lasting = [5.0, 9.0, 9.0, 0.5, 0.25, 8.0]  # the prompt, two steps to warm up, three to time
    looks = iter([time for seconds in lasting for time in (100.0, 100.0 + seconds)])
    monkeypatch.setattr("dijiang.evaluate.decode.time.perf_counter", lambda: next(looks))
    found = decode_speed(load_source(pair.checkpoint)[0], tokens(9)[0], steps=3, warmup=2)
    assert (found["prefill_seconds"], found["tokens_per_second"]) == (5.0, 2.0)
