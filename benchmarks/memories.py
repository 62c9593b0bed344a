"""
What memories cost in time: SmolLM2-135M's shape with seven kept heads and 128 slots in each other key/value head, against
softmax attention where a prompt is read, and against the same model without memories where it decodes.

    python benchmarks/memories.py [--dtype float32 bfloat16] [--threads 2] [--quick]
        [--output benchmarks/results/memories.json]

Weights are random, because no time depends on them. Reading is the mixing of all 30 layers, without projections, of one prompt
without a cache; SDPA is torch's scaled_dot_product_attention on grouped heads. Decoding is one step of the whole model after a
context of which it has read the first thousand tokens; the rest are random keys and values in its kept heads, since nothing
else of it grows. The contenders take turns.
"""

import argparse
from collections.abc import Sequence

import measure
import torch
import torch.nn.functional as F
from model import SHAPE, TINY
from transformers import AutoModelForCausalLM

from dijiang.evaluate.latency.timing import alternate, ratios
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.kept_heads import join_heads
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers
from dijiang.modeling.transformers_compat import CACHE_NAME

KEPT = ((18, 2), (23, 0), (17, 1), (8, 0), (23, 2), (20, 2), (7, 2))  # (layer, head) that `dijiang convert --fit` chooses
SLOTS = 128
READ = (2048, 8192)
DECODE = (1024, 32768)
PROMPT = 1024  # tokens that are read before decoding: more than window and slots, so that all but kept heads are full
READ_GOALS = {("float32", 8192): 6.0, ("bfloat16", 8192): 4.0}
DECODE_GOALS = {1024: 0.85, 32768: 0.75}  # tokens per second over those of the model without memories


def build(shape: dict, kept: Sequence[tuple[int, int]], slots: int, dtype: torch.dtype) -> DiJiangForCausalLM:
    """A model with a random score, since the start of a learned one ranks all tokens alike."""
    full_heads = [[head for layer, head in kept if layer == i] for i in range(shape["num_hidden_layers"])]
    memory = {"full_heads": full_heads, "attention_memory": slots, "memory_score": "learned"} if slots else {}
    model = AutoModelForCausalLM.from_config(DiJiangConfig(**shape, branch_scale_init=0.0, **memory), dtype=dtype).eval()
    for layer in linear_layers(model).values():
        if layer.memory_score is not None:
            torch.nn.init.normal_(layer.memory_score.w_2)
    return model


def mix(layer: DiJiangLinearAttention, projected: Projections) -> torch.Tensor:
    """What a layer computes between its projections."""
    q, k, v, raw_k = (layer.take_linear_heads(x) for x in projected)
    o, _ = layer.attend(q, k, v, raw_k=raw_k)
    if not layer.full_heads:
        return o
    kept = layer.attend_to_all(projected, None, None)
    return join_heads(kept, o, layer.full_heads, layer.linear_heads, layer.num_key_value_groups)


@torch.no_grad()
def read(model: DiJiangForCausalLM, dtype: str, tokens: int, rounds: int) -> dict:
    """Time the mixing of all layers."""
    config = model.config
    shape = (1, tokens, config.num_key_value_heads, config.head_dim)
    q = torch.randn(1, tokens, config.num_attention_heads, config.head_dim, dtype=getattr(torch, dtype))
    projected = Projections(q, *(torch.randn(shape, dtype=q.dtype) for _ in range(3)))
    layers = linear_layers(model).values()
    q, k, v = (x.transpose(1, 2) for x in projected[:3])
    calls = {
        "sdpa": lambda: [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for _ in layers][-1],
        "memories": lambda: [mix(layer, projected) for layer in layers][-1],
    }
    timings = alternate(calls, rounds=rounds)
    measure.show_timings(f"reading, {dtype}, {tokens:,} tokens, {len(layers)} layers", timings, "sdpa")
    return {"dtype": dtype, "tokens": tokens, "timings": timings, "ratio": ratios(timings, "sdpa")["memories"]}


@torch.no_grad()
def decode(models: dict[str, DiJiangForCausalLM], dtype: str, context: int, options: dict) -> dict:
    """Time one step of one sequence after `context` tokens."""
    ids = torch.randint(0, models["window"].config.vocab_size, (1, min(PROMPT, context)))
    calls, sizes = {}, {}
    for name, model in models.items():
        cache = model(ids, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        for i, layer in linear_layers(model).items():
            if layer.full_heads and context > PROMPT:
                shape = 1, len(layer.full_heads), context - PROMPT, layer.head_dim
                cache.layers[i].update_kept(*(torch.randn(shape, dtype=model.dtype) for _ in "kv"))
        sizes[name] = cache.memory_bytes()
        calls[name] = lambda m=model, c=cache: m(ids[:, -1:], **{CACHE_NAME: c}, use_cache=True).logits
    timings = alternate(calls, **options)
    measure.show_timings(f"decoding, {dtype}, after {context:,} tokens", timings, "window")
    speeds = {name: 1 / x["median_s"] for name, x in timings.items()}
    facts = {"tokens_per_s": speeds, "ratio": ratios(timings, "window")["memories"], "cache_bytes": sizes}
    return {"dtype": dtype, "tokens": context, "timings": timings} | facts


def targets(result: dict) -> list[dict]:
    lines = []
    for r in result["read"]:
        if goal := READ_GOALS.get((r["dtype"], r["tokens"])):
            lines.append(measure.target(f"reading {r['tokens']:,} tokens, {r['dtype']}, vs SDPA", goal, r["ratio"]))
    for r in result["decode"]:
        if goal := DECODE_GOALS.get(r["tokens"]):
            what = f"decoding after {r['tokens']:,} tokens, {r['dtype']}, vs without memories"
            lines.append(measure.target(what, goal, r["ratio"]))
    return lines


def parse_arguments() -> argparse.Namespace:
    return measure.common_arguments(__doc__, ["float32", "bfloat16"]).parse_args()


def main() -> None:
    arguments = parse_arguments()
    measure.prepare(arguments)
    quick = arguments.quick
    shape, kept = (TINY, ((0, 1), (1, 0))) if quick else (SHAPE, KEPT)
    options = {"rounds": 1 if quick else arguments.rounds, "seconds": 0 if quick else 8}
    result = measure.header(arguments, "memories") | {"kept_heads": kept, "slots": SLOTS, "read": [], "decode": []}
    for dtype in arguments.dtype:
        models = {
            "window": build(shape, (), 0, getattr(torch, dtype)),
            "memories": build(shape, kept, SLOTS, getattr(torch, dtype)),
        }
        step = lambda: models["memories"](torch.zeros(1, 256, dtype=torch.long), logits_to_keep=1)  # noqa: B023, E731
        with torch.no_grad():
            result["backend"] = measure.check_backend(arguments.backend, {"reading": measure.backend_of(step)})
        for tokens in (300,) if quick else READ:
            result["read"].append(read(models["memories"], dtype, tokens, 1 if quick else 3))
        for context in (200,) if quick else DECODE:
            result["decode"].append(decode(models, dtype, context, options))
    result["targets"] = [] if quick else targets(result)
    measure.finish(arguments, "memories", result)


if __name__ == "__main__":
    main()
