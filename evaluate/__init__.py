"""Measures what a conversion kept: quality beside the teacher's and the controls', latency, memory, attention maps."""

from .controls import linear_only, no_attention, window_only
from .decode import decode_speed
from .evaluation import EvaluationConfig, evaluate_model
from .perplexity import perplexity
from .reload import logits_without_package

__all__ = [
    "EvaluationConfig",
    "decode_speed",
    "evaluate_model",
    "linear_only",
    "logits_without_package",
    "no_attention",
    "perplexity",
    "window_only",
]
