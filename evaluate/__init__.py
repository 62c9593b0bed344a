"""Measures what a conversion kept: quality beside the teacher's and the controls', latency, memory, attention maps."""

from dijiang.common.perplexity import perplexity

from .latency.run import run_latency
from .quality.ablations import linear_only, no_attention, window_only
from .quality.reload import logits_without_package
from .quality.run import EvaluationConfig, evaluate_model, run_evaluation

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
