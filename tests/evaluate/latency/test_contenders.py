"""What is timed is real decoding, and bytes and least work are those counted by hand."""

import pytest
import torch
from dijiang_testing.latency import CPU, HEAD_DIM, HEADS, KEY_VALUE_HEADS, LIMITS, NAMES, TINY, checkpoint_pair, shape_pair

from dijiang.convert import convert_model
from dijiang.evaluate.latency import measure
from dijiang.evaluate.latency.contenders import contenders_of
from dijiang.modeling.transformers_compat import CACHE_NAME

WINDOW, SINKS = 4, 2  # of the pair


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_steps_decode_as_generate_does(both, tokens, name):
    contender, ids = contenders_of(both)[name], tokens(21)
    following, cache = contender.prefill(ids)
    written = [following]
    for _ in range(1 if name == "softmax static" else 5):  # the static cache has room for one token
        written.append(contender.step(torch.tensor(written[-1])[:, None], cache))
    options = {"max_new_tokens": len(written), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = contender.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 21:]
    assert torch.tensor(written).T.tolist() == expected.tolist()
    assert len(set(expected.flatten().tolist())) > 1


@pytest.mark.parametrize("name", ["softmax", "softmax static"])
def test_a_step_taken_back_leaves_the_cache_as_it_was(both, tokens, name):
    contender = contenders_of(both)[name]
    _, cache = contender.prefill(tokens(21))
    step, other = tokens(1), tokens(1) + 1
    with torch.no_grad():
        logits = lambda ids: contender.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True).logits  # noqa: E731
        first = logits(step)
        contender.step_back(cache)
        assert int(cache.get_seq_length()) == 21
        assert (logits(other) - first).abs().max() > 0.1  # the last token matters
        contender.step_back(cache)
        assert torch.equal(logits(step), first)


@pytest.mark.parametrize("softmax_layers", [[], [1]])
def test_a_repeated_cache_is_that_of_a_whole_batch(pair, tokens, tmp_path, monkeypatch, softmax_layers):
    """Also where a layer kept softmax attention; steps from it leave the next copy alone."""
    types = ["full_attention" if i in softmax_layers else "linear_attention" for i in range(2)]
    settings = {"attention_window": WINDOW, "branch_scale_init": 0.5, "layer_types": types}
    folder = convert_model(pair.teacher, tmp_path / "out", progress=False, **settings)
    contender = contenders_of(checkpoint_pair(folder, pair.teacher, longest=40, **CPU))["dijiang"]
    ids, batch = tokens(31, rows=1), 3
    monkeypatch.setattr(contender, "random_ids", lambda *sizes: ids)
    step = tokens(1, rows=batch)
    with torch.no_grad():
        _, real = contender.prefill(ids.expand(batch, -1))
        expected = contender.model(input_ids=step, **{CACHE_NAME: real}, use_cache=True).logits
        for _ in range(2):
            repeated = contender.filled_cache(batch, 31)
            assert repeated.get_seq_length() == 31
            logits = contender.model(input_ids=step, **{CACHE_NAME: repeated}, use_cache=True).logits
            assert (logits - expected).abs().max() < 1e-5
            assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [5, 40])
def test_cache_bytes_in_closed_form(pair, dtype, context):
    """Two layers, two key/value heads of 8, 16 features; window entries carry 8 bytes more, sinks 1, a layer 8."""
    item, batch = {"float32": 4, "bfloat16": 2}[dtype], 3
    contenders = contenders_of(checkpoint_pair(pair.checkpoint, pair.teacher, longest=40, device="cpu", dtype=dtype))
    state = 2 * (4 * 2 * 16 * 9 + WINDOW * (2 * 2 * 8 * item + 8) + SINKS * (2 * 2 * 8 * item + 1) + 8)
    per_token = 2 * 2 * 2 * 8 * item
    expected = {"softmax": context * per_token, "softmax static": (context + 1) * per_token, "dijiang": state}
    for name, contender in contenders.items():
        cache = contender.filled_cache(batch, context)
        held = cache.memory_bytes() if name == "dijiang" else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert contender.cache_bytes(batch, context) == held == batch * expected[name], name


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 16},
        {"attention_window": 0, "attention_sinks": 0, "normalize": False},
    ],
)
@pytest.mark.parametrize("context", [9, 60])
def test_cache_bytes_of_other_layers(settings, context):
    contender = contenders_of(shape_pair("llama", longest=60, settings=settings, **CPU))["dijiang"]
    cache = contender.filled_cache(2, context)
    assert contender.cache_bytes(2, context) == sum(x.nbytes for x in tensors(cache))
    contender.step(contender.random_ids(2, 1), cache)
    contender.step_back(cache)
    kinds = contender.model.config.layer_types
    assert {x.get_seq_length() for x, kind in zip(cache.layers, kinds, strict=True) if "full" in kind} <= {context}


def tensors(cache) -> list[torch.Tensor]:
    return [
        x for layer in cache.layers for x in (layer.state.tensors() if hasattr(layer, "state") else [layer.keys, layer.values])
    ]


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize(("batch", "context"), [(1, 7), (5, 50)])
def test_the_least_that_a_step_takes(shape, batch, context):
    """Counted layer by layer for 48 wide, 70 inside, 331 words, three layers; the default window and sinks, 64 and 4."""
    gated, G, d, H, L, M = shape == "llama", KEY_VALUE_HEADS[shape], HEAD_DIM, HEADS, 3, 16
    matrices = L * (48 * (H + 2 * G) * d + H * d * 48 + (3 if gated else 2) * 48 * 70) + 48 * 331
    biases = 0 if gated else L * (3 * 48 + 48 + 70 + 48)
    norms = (2 * L + 1) * (48 if gated else 2 * 48)
    weights = 4 * (matrices + biases + norms)  # a tied head is in `matrices`; an embedding of its own is not read
    kernels = 4 * L * ((H + G) * (d + 2 * d) + (H + G) * (d + 1))
    cache = 4 * 2 * batch * L * G * d
    scores = 4 * batch * L * H * d * (context + 1)
    sums = 4 * L * G * M * (d + 1)
    near = 4 * 2 * L * G * d * 68
    features = 2 * L * (H + G) * d * d
    mixed = 2 * L * (H + G) * M * (d + 1) + 4 * L * H * d * 68
    expected = {
        "softmax": (2 * batch * matrices + scores, weights + cache * (context + 2 * (context + 1))),
        "softmax static": (2 * batch * matrices + scores, weights + cache * (context + 1)),
        "dijiang": (2 * batch * matrices + batch * (features + mixed), weights + kernels + batch * (2 * sums + near)),
    }
    contenders = contenders_of(shape_pair(shape, longest=50, **CPU))
    assert {name: contender.least_work(batch, context) for name, contender in contenders.items()} == expected
    floor = measure.decode_row(contenders, batch, context, LIMITS, {"rounds": 1})["floor_s"]
    assert floor == {name: pytest.approx(max(flops / 1e6, moved / 1e6)) for name, (flops, moved) in expected.items()}
