"""Measures what a conversion kept: quality beside the teacher's and the controls', latency, memory, attention maps."""

from .controls import linear_only, no_attention, window_only
from .evaluation import EvaluationConfig, evaluate_model, run_evaluation
from .latency_run import run_latency
from .perplexity import perplexity
from .reload import logits_without_package

__all__ = [
    "EvaluationConfig",
    "evaluate_model",
    "linear_only",
    "logits_without_package",
    "no_attention",
    "perplexity",
    "run_evaluation",
    "run_latency",
    "window_only",
]
