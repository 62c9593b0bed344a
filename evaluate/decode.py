"""Decoding speed and cache size after a context of given length."""

import statistics
import time

import torch

from dijiang.modeling import DiJiangCache, DiJiangForCausalLM


@torch.no_grad()
def decode_speed(model: DiJiangForCausalLM, context: torch.Tensor, *, steps: int = 24, warmup: int = 4) -> dict[str, float]:
    """
    Read `context` and then decode greedily, one sequence, one token a step.

    Args:
        model: a DiJiang model or a teacher in the same decoder.
        context: (tokens,) int64.
        steps: timed steps, after `warmup` untimed ones.

    Returns:
        `prefill_seconds`; `tokens_per_second`, by the median step; `cache_bytes`, all layers, after the context;
        `cache_bytes_after`, after the last step.
    """
    device = next(model.parameters()).device
    cache = DiJiangCache(model.config)
    start = time.perf_counter()
    logits = model(input_ids=context[None].to(device), past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    token.item()  # waits for the device
    prefill_seconds = time.perf_counter() - start
    cache_bytes = cache.memory_bytes()
    times = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        token.item()
        times.append(time.perf_counter() - start)
    return {
        "prefill_seconds": prefill_seconds,
        "tokens_per_second": 1.0 / statistics.median(times[warmup:]),
        "cache_bytes": cache_bytes,
        "cache_bytes_after": cache.memory_bytes(),
    }
