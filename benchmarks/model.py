"""
A model of SmolLM2-135M's shape with linear attention against transformers' LlamaForCausalLM of that shape with its own cache:
prefill, decoding and one training step.

    python benchmarks/model.py [--dtype float32] [--threads 2] [--quick] [--backend auto|torch|native]
        [--output benchmarks/results/model.json]

Weights are random, because no time depends on them. Ours has the recommended layers (64 tokens of window, 4 sinks, paired
features) with a linear branch of scale 1 (branch_scale_init=0). The models take turns. Decoding is one step at a given
context. The peer's cache is filled with random keys and values, which costs no prefill, and the token that a step adds is cut
off again, untimed; ours is the state after a short prompt, whose size and time per step are the same at every context.
"""

import argparse
from collections.abc import Callable

import measure
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dijiang.common.memory import available_bytes
from dijiang.evaluate.latency.contenders import SoftmaxContender
from dijiang.evaluate.latency.timing import alternate, ratios
from dijiang.modeling import DiJiangConfig
from dijiang.modeling.transformers_compat import CACHE_NAME

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 65536}  # fmt: skip
TINY = SHAPE | {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
PREFILL = (1024, 4096)
DECODE = ((1, 512), (1, 16384), (8, 16384))  # batch, context
PROMPT = 128  # more than window and sinks, so the state has its final size
TRAIN_TOKENS = 1024
SPARE_BYTES = 3 << 30  # weights, logits and what a step needs in addition to the caches
GOALS = {(8, 16384): 5.0, (1, 512): 0.9}
CACHE_PER_STATE = 80
PEERS = {
    "llama": "transformers' LlamaForCausalLM, its default attention, its default cache (DynamicCache), which copies all "
    "keys and values at every step; the targets are against this",
    "llama static": "the same with StaticCache, of just the size needed, which is written in place",
}


def build(shape: dict, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Our model, its feature maps in float32 as in a checkpoint, and the peer."""
    configs = {"llama": LlamaConfig(**shape), "dijiang": DiJiangConfig(**shape, branch_scale_init=0.0)}
    return {name: AutoModelForCausalLM.from_config(config, dtype=dtype).eval() for name, config in configs.items()}


def random_ids(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, tokens))


def compare(kind: str, dtype: str, batch: int, tokens: int, new_tokens: int, timings: dict, **facts) -> dict:
    """A row of the result; `new_tokens` is the number of tokens that one call handles."""
    measure.show_timings(f"{kind}, {dtype}, batch {batch}, {tokens:,} tokens", timings, "llama")
    speeds = {name: new_tokens / x["median_s"] for name, x in timings.items()}
    measure.console.print(", ".join(f"{name} {speed:,.1f} tokens/s" for name, speed in speeds.items()))
    return {"dtype": dtype, "batch": batch, "tokens": tokens, "timings": timings, "tokens_per_s": speeds,
            "ratio": ratios(timings, "llama")["dijiang"]} | facts  # fmt: skip


def prefill(models: dict, dtype: str, tokens: int, options: dict) -> dict:
    """Time reading a prompt into a new cache and predicting one token."""
    ids = random_ids(models["llama"], 1, tokens)
    calls = {name: lambda m=m: m(ids, use_cache=True, logits_to_keep=1).logits for name, m in models.items()}
    with torch.no_grad():
        timings = alternate(calls, **options)
    return compare("prefill", dtype, 1, tokens, tokens, timings)


def decode(models: dict, dtype: str, batch: int, context: int, options: dict) -> dict:
    """Time one step of `batch` sequences after `context` tokens."""
    llama = models["llama"]
    ours = models["dijiang"]
    growing, fixed = (SoftmaxContender(llama, static=static) for static in (False, True))
    sizes = {"cache_bytes": growing.cache_bytes(batch, context)}
    needed = 2 * sizes["cache_bytes"] + SPARE_BYTES
    available = available_bytes()
    if needed > available:
        reason = f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are free"
        measure.console.print(f"decode, {dtype}, batch {batch}, {context:,} tokens: left out, {reason}")
        return {"dtype": dtype, "batch": batch, "tokens": context, "left_out": reason}
    step = random_ids(llama, batch, 1)
    with torch.no_grad():
        state = ours(random_ids(ours, batch, PROMPT), use_cache=True, logits_to_keep=1)[CACHE_NAME]
        grown, static = (contender.filled_cache(batch, context) for contender in (growing, fixed))
        calls: dict[str, Callable] = {
            "llama": lambda: llama(step, **{CACHE_NAME: grown}, use_cache=True).logits,
            "llama static": lambda: llama(step, **{CACHE_NAME: static}, use_cache=True).logits,
            "dijiang": lambda: ours(step, **{CACHE_NAME: state}, use_cache=True).logits,
        }
        after = {"llama": lambda: growing.step_back(grown), "llama static": lambda: fixed.step_back(static)}
        timings = alternate(calls, after=after, **options)
    sizes |= {"state_bytes": state.memory_bytes(), "cache_per_state": sizes["cache_bytes"] / state.memory_bytes()}
    sizes["ratio_to_static_cache"] = ratios(timings, "llama static")["dijiang"]
    row = compare("decode", dtype, batch, context, batch, timings, **sizes)
    cache, state = sizes["cache_bytes"], sizes["state_bytes"]
    measure.console.print(f"state {state:,} B, KV cache {cache:,} B, {sizes['cache_per_state']:.1f} times as much")
    return row


def train(models: dict, dtype: str, tokens: int, options: dict) -> dict:
    """Time forward and backward of the loss; all weights train, without an optimizer."""
    ids = random_ids(models["llama"], 1, tokens)
    calls = {name: lambda m=m: m(ids, labels=ids, use_cache=False).loss.backward() for name, m in models.items()}
    for model in models.values():
        model.train()
    after = {name: lambda m=m: m.zero_grad(set_to_none=True) for name, m in models.items()}
    timings = alternate(calls, after=after, **options)
    for model in models.values():
        model.eval()
    return compare("training step", dtype, 1, tokens, tokens, timings)


def targets(result: dict) -> list[dict]:
    """The goals that this run measured, and whether they are met."""
    lines = []
    for r in result["decode"]:
        if "left_out" in r:
            continue
        what = f"{r['dtype']}, batch {r['batch']}, context {r['tokens']:,}"
        goal = GOALS.get((r["batch"], r["tokens"]))
        if goal:
            lines.append(measure.target(f"decode, {what}, vs transformers", goal, r["ratio"]))
        if r["tokens"] == 16384:
            lines.append(measure.target(f"bytes of KV cache / bytes of state, {what}", CACHE_PER_STATE, r["cache_per_state"]))
    return lines


def backends(model: torch.nn.Module) -> dict[str, str]:
    """The backend that each pass of our model runs."""
    ids = random_ids(model, 1, 256)
    step = random_ids(model, 1, 1)
    with torch.no_grad():
        ran = {"prefill": measure.backend_of(lambda: model(ids, logits_to_keep=1))}
        state = model(ids, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        ran["decode"] = measure.backend_of(lambda: model(step, **{CACHE_NAME: state}, use_cache=True))
    return ran | {"training": measure.backend_of(lambda: model(ids, logits_to_keep=1))}


def run(arguments: argparse.Namespace) -> dict:
    quick = arguments.quick
    result = {"shape": TINY if quick else SHAPE, "peers": PEERS, "prompt_of_our_state": PROMPT, "backend": {}}
    result |= {"prefill": [], "decode": [], "train": []}
    options = {"rounds": arguments.rounds, "seconds": 0.0 if quick else 5.0}
    for dtype in arguments.dtype:
        models = build(result["shape"], getattr(torch, dtype))
        result["peer_attention"] = models["llama"].config._attn_implementation
        result["backend"][dtype] = measure.check_backend(arguments.backend, backends(models["dijiang"]))
        for batch, context in ((1, 64), (2, 192)) if quick else DECODE:
            result["decode"].append(decode(models, dtype, batch, context, options))
        result["train"].append(train(models, dtype, 64 if quick else TRAIN_TOKENS, options))
        for tokens in (64, 128) if quick else PREFILL:
            result["prefill"].append(prefill(models, dtype, tokens, options))
    return result | {"targets": [] if quick else targets(result)}


def main() -> None:
    arguments = measure.common_arguments(__doc__, ["float32"]).parse_args()
    measure.prepare(arguments)
    measure.finish(arguments, "model", measure.header(arguments, "model") | run(arguments))


if __name__ == "__main__":
    main()
