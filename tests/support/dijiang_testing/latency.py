"""Pairs of tiny models for the latency benchmark, and a quick run of it."""

from pathlib import Path

from dijiang.evaluate.latency import models
from dijiang.evaluate.latency.config import LatencyConfig
from dijiang.evaluate.latency.measure import measure_latency
from dijiang.evaluate.latency.models import LatencyPair

SIZES = {"vocab_size": 331, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 6}
TINY = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "tie_word_embeddings": False, "max_position_embeddings": 64},
}
HEADS, HEAD_DIM = 6, 8
KEY_VALUE_HEADS = {"llama": 2, "gpt_neox": 6}
LIMITS = {"product_gflops": {"float32": 1e-3, "bfloat16": 1e-3}, "copy_bytes_per_s": 1e6}
CPU = {"device": "cpu", "dtype": "float32"}
NAMES = ["softmax", "softmax static", "dijiang"]


def shape_pair(shape: str, *, longest: int, **settings) -> LatencyPair:
    return models.shape_pair(LatencyConfig(shape=shape, contexts=(longest,), **settings))


def checkpoint_pair(checkpoint: Path, teacher: Path, *, longest: int, **settings) -> LatencyPair:
    return models.checkpoint_pair(checkpoint, teacher, LatencyConfig(contexts=(longest,), **settings))


def quick(pair: LatencyPair, *, advance=lambda rows: None, **settings) -> dict:
    """The result of a few timings at two short contexts."""
    config = LatencyConfig(**({"contexts": (9, 24), "rounds": 2, "seconds": 0.0} | settings))
    return measure_latency(pair, config, advance=advance)
