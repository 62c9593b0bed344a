"""
What a conversion kept: quality next to the teacher's, the baselines' and the ablations', latency, memory, attention maps.

Each public name is imported from its module when it is first used, so that the settings can be read without torch.
"""

from importlib import import_module

_MODULE_OF = {
    "EvaluationConfig": "dijiang.evaluate.quality.config",
    "LatencyConfig": "dijiang.evaluate.latency.config",
    "evaluate_model": "dijiang.evaluate.quality.run",
    "linear_only": "dijiang.evaluate.quality.ablations",
    "logits_without_package": "dijiang.evaluate.quality.reload",
    "no_attention": "dijiang.evaluate.quality.ablations",
    "perplexity": "dijiang.common.perplexity",
    "run_evaluation": "dijiang.evaluate.quality.run",
    "run_latency": "dijiang.evaluate.latency.run",
    "window_only": "dijiang.evaluate.quality.ablations",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dijiang.evaluate' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
