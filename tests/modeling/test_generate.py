"""Cached generation through `generate` gives the texts of generation without a cache, whatever transformers calls it."""

import pytest
import torch
from dijiang_testing.model_checks import random_ids, tiny_model
from transformers import GenerationConfig

from dijiang.modeling import DiJiangCache
from dijiang.modeling.transformers_compat import CACHE_NAME

CASES = {
    "window": {},
    "no window": {"attention_window": 0, "attention_sinks": 0, "decay": "retnet"},
    "signed": {"feature_map": "identity", "decay": "learned"},
    "mixed": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
        "sliding_window": 4,
    },
    "slots": {"attention_memory": 3, "memory_score": "learned"},
    "kept heads and slots": {
        "full_heads": [[1], []],
        "attention_memory": [[0, 4], [2, 0]],
        "memory_score": "window_attention",
    },
    "all heads kept in one layer": {"full_heads": [[0, 1], [0]]},
    "softmax": {"layer_types": ["full_attention", "full_attention"]},
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "temperature": 1.3},
    "beam samples": {"do_sample": True, "num_beams": 2, "top_k": 0},
    "two prompts at once": {"guidance_scale": 1.5},
}
each_case = pytest.mark.parametrize("case", CASES)


def generate(model, ids, **options) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(ids, **{"max_new_tokens": 13, "do_sample": False} | options)


@pytest.mark.parametrize("mode", MODES)
@each_case
def test_cached_generation_equals_generation_without_cache(case, mode):
    model, ids = tiny_model(seed=3, **CASES[case]), random_ids(3, 11, seed=4)
    tokens, expected = (generate(model, ids, use_cache=cached, **MODES[mode]) for cached in (True, False))
    assert torch.equal(tokens, expected)
    assert len(set(expected[0, 11:].tolist())) > 2  # one token over and over would hide a lost cache


@each_case
def test_padded_batch_equals_each_prompt_alone(case):
    model, ids = tiny_model(seed=5, **CASES[case]), random_ids(3, 12, seed=6)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 9)):
        mask[row, :padding] = 0
    for options in ({}, {"num_beams": 2}):
        batch = generate(model, ids, attention_mask=mask, use_cache=True, **options)
        for row, padding in enumerate((0, 4, 9)):
            alone = generate(model, ids[row : row + 1, padding:], use_cache=False, **options)
            assert torch.equal(batch[row, padding:], alone[0])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@each_case
def test_second_message_continues_from_the_cache_of_the_first(case, name):
    """generate takes the cache by its old name or its new one, with any version."""
    model, first, more = tiny_model(seed=7, **CASES[case]), random_ids(2, 9, seed=8), random_ids(2, 5, seed=9)
    cache = DiJiangCache(model.config)
    ids = torch.cat((generate(model, first, **{name: cache}), more), dim=1)
    assert cache.get_seq_length() == 9 + 12
    tokens = generate(model, ids, **{name: cache})
    assert torch.equal(tokens, generate(model, ids, use_cache=False))


def test_generate_returns_the_cache_it_used():
    model, ids = tiny_model(seed=1), random_ids(2, 9)
    output = generate(model, ids, return_dict_in_generate=True)
    assert isinstance(output[CACHE_NAME], DiJiangCache) and output[CACHE_NAME].get_seq_length() == 9 + 12


@pytest.mark.slow
def test_generate_batch_of_a_softmax_port_equals_generate():
    """Continuous batching hands forward keywords of its own, and a cache that is no `Cache`."""
    model, prompts = tiny_model(seed=2, **CASES["softmax"]), [[1, 2, 3, 4], [5, 6, 7]]
    sizes = {"num_blocks": 16, "max_batch_tokens": 32}
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=96, pad_token_id=0, **sizes)
    expected = [generate(model, torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :].tolist() for prompt in prompts]
    answers = model.generate_batch(prompts, generation_config=options, warmup=False)
    assert [answers[f"req_{i}"].generated_tokens for i in range(2)] == expected
