"""AdamW over a model's parameter groups, and the schedule of their learning rates."""

import math

import torch

from ..recipe.schema import StageConfig


def adamw(groups: list[dict], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW on `groups` of {"name", "params", "lr"}, without decay for the group `kernel`, biases and norms."""
    split = []
    for group in groups:
        decays = [p for p in group["params"] if dimensions(p) > 1 and group["name"] != "kernel"]
        rest = [p for p in group["params"] if dimensions(p) <= 1 or group["name"] == "kernel"]
        for params, decay in ((decays, stage.weight_decay), (rest, 0.0)):
            if params:
                split.append({"params": params, "lr": group["lr"], "weight_decay": decay})
    return torch.optim.AdamW(split, betas=tuple(stage.betas), fused=True)


def dimensions(parameter: torch.nn.Parameter) -> int:
    """Number of dimensions of the whole parameter, also where DeepSpeed holds a flat part of it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def learning_rate_factor(step: int, stage: StageConfig) -> float:
    """
    Share of the peak in step 0 .. steps - 1: a linear warm-up, then flat or along a cosine to `final_share`.

    transformers' own schedules differ: their first step has learning rate 0, ours the first part of the warm-up.
    """
    warmup = round(stage.warmup_share * stage.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if stage.schedule == "flat":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, stage.steps - warmup))
    return stage.final_share + (1 - stage.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
