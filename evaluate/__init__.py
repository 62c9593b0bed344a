"""
What a conversion kept: quality next to the teacher's, the baselines' and the ablations', latency, memory, attention maps.

Each public name is imported from its module when it is first used, so that the settings can be read without torch.
"""

from dijiang.common.lazy import lazy_names

_MODULE_OF = {
    "EvaluationConfig": ".quality.config",
    "LatencyConfig": ".latency.config",
    "evaluate_model": ".quality.run",
    "linear_only": ".quality.ablations",
    "logits_without_package": ".quality.reload",
    "no_attention": ".quality.ablations",
    "no_memory": ".quality.ablations",
    "perplexity": "dijiang.common.perplexity",
    "run_evaluation": ".quality.run",
    "run_latency": ".latency.run",
    "window_only": ".quality.ablations",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
