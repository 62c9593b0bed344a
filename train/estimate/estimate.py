"""Cost of a recipe before anything runs: parameters, FLOPs, memory per device and hours. The formulas: docs/estimate.md."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from dijiang.checkpoint.shapes import SHAPES
from dijiang.common.errors import one_line, unknown
from dijiang.convert import PRESETS
from dijiang.convert.families import FAMILIES, dijiang_config, open_convertible
from dijiang.convert.layer_settings import check_effect
from dijiang.convert.mapping import build_on_meta

from ..recipe.schema import Recipe
from .hardware import DEVICES
from .model_size import ModelSize, model_size
from .stage_cost import LEVELS, UTILIZATION, StageCost, stage_cost

FILL = 0.9  # share of the memory that may be planned for; the rest is lost between the tensors
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """
    Cost of a recipe.

    Attributes:
        source: source of the recipe.
        gpu: kind of device, a key of `DEVICES`.
        gpus: number of devices.
        level: the one of `LEVELS` that the recipe names; None if it names another DeepSpeed file.
        teacher: size of the source model.
        student: size of the converted model.
        stages: cost of each stage, by name.
    """

    source: str
    gpu: str
    gpus: int
    level: str | None
    teacher: ModelSize
    student: ModelSize
    stages: dict[str, StageCost]

    def fits(self, stage: str, level: str) -> bool:
        """True if the stage stays below `FILL` of the device's memory."""
        return sum(self.stages[stage].memory[level].values()) <= FILL * DEVICES[self.gpu].memory * GIB

    @property
    def summary(self) -> str:
        """One line: hours of each stage and the memory of the larger one."""
        hours = ", ".join(f"{name} {duration(cost.hours)}" for name, cost in self.stages.items())
        peak = max(sum(cost.memory[self.level or LEVELS[0]].values()) for cost in self.stages.values())
        memory = f"; {peak / GIB:.1f} GiB per device with {self.level}" if self.level else ""
        return f"{self.gpus} x {self.gpu} at {UTILIZATION:.0%} of its peak: {hours}{memory}"


def estimate(recipe: Recipe, *, gpu: str = "h100", gpus: int = 1) -> Estimate:
    """
    Estimate the cost of a recipe.

    Args:
        recipe: the recipe.
        gpu: kind of device, a key of `DEVICES`.
        gpus: number of devices.

    Raises:
        ValueError: on an unknown device, or a source whose config cannot be read or is of no supported family.
    """
    if gpu not in DEVICES:
        raise unknown("gpu", gpu, DEVICES)
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    config = source_config(recipe.source)
    settings = recipe.convert.settings
    student_config = dijiang_config(config, {"layer_types": "linear_attention"} | PRESETS[recipe.convert.preset] | settings)
    check_effect(settings, student_config)
    teacher = model_size(build_on_meta(dijiang_config(config, {})))
    student = model_size(build_on_meta(student_config))
    level = recipe.run.deepspeed or "zero0"
    return Estimate(
        source=recipe.source,
        gpu=gpu,
        gpus=gpus,
        level=level if level in LEVELS else None,
        teacher=teacher,
        student=student,
        stages={stage: stage_cost(recipe, stage, teacher, student, gpu=gpu, gpus=gpus) for stage in recipe.stages},
    )


def source_config(source: str) -> PretrainedConfig:
    """The transformers config of a folder or GGUF file on disk, of a model in `SHAPES`, or on the hub; no weights are read."""
    path = Path(source).expanduser()
    if path.exists():
        config = open_convertible(path).config
    elif source in SHAPES:
        config = AutoConfig.for_model(**SHAPES[source])
    else:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            raise ValueError(f"the config of {source} cannot be read ({one_line(error)}); give a folder on disk") from None
    if config.model_type not in FAMILIES:
        raise ValueError(f"{source} is a {config.model_type} model, whose conversion starts from {', '.join(FAMILIES)}")
    return config


def duration(hours: float) -> str:
    """Two digits in hours, minutes or seconds, whichever gives a number of at least 1."""
    value, unit = next(((hours * n, unit) for n, unit in ((1, "h"), (60, "min")) if hours * n >= 1), (hours * 3600, "s"))
    return f"{value:.0f} {unit}" if value >= 9.5 else f"{value:.1f} {unit}"


def render(result: Estimate) -> str:
    """The estimate as a text table."""
    teacher = result.teacher
    student = result.student
    more = student.total - teacher.total
    lines = [
        f"{result.source}: {teacher.total:,} parameters; {more:,} more by conversion, {student.added:,} of them trained",
        f"on {result.summary}",
    ]
    for name in result.stages:
        lines += ["", *render_stage(result, name)]
    return "\n".join(lines)


def render_stage(result: Estimate, stage: str) -> list[str]:
    cost = result.stages[stage]
    flops = sum(cost.flops.values())
    parts = ", ".join(f"{part} {value / flops:.0%}" for part, value in cost.flops.items() if value)
    plain, checkpointed = (cost.activations[checkpointing] / GIB for checkpointing in (False, True))
    memory = {part: [f"{cost.memory[level][part] / GIB:.2f}" for level in LEVELS] for part in cost.memory[LEVELS[0]]}
    rows = {
        "GiB per device": LEVELS,
        **memory,
        "total": [f"{sum(cost.memory[level].values()) / GIB:.2f}" for level in LEVELS],
        f"of {DEVICES[result.gpu].memory:g} GiB": ["fits" if result.fits(stage, level) else "too large" for level in LEVELS],
        "in main memory": [f"{cost.host[level] / GIB:.2f}" for level in LEVELS],
    }
    return [
        f"{stage}: {cost.trained:,} parameters train on {cost.tokens:,} tokens",
        f"  {flops:.3g} FLOPs ({parts}); {duration(cost.hours)}",
        *(f"  {title:<18}" + "".join(f"{cell:>14}" for cell in cells) for title, cells in rows.items()),
        f"  activations: {plain:.2f} GiB, with gradient checkpointing {checkpointed:.2f} GiB",
    ]
