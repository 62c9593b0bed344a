"""What a recipe costs before anything runs: parameters, FLOPs, memory per device and hours. The formulas: docs/estimate.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from dijiang.checkpoint.shapes import SHAPES
from dijiang.common.errors import one_line
from dijiang.convert import PRESETS
from dijiang.convert.families import FAMILIES, dijiang_config, open_convertible
from dijiang.convert.layer_settings import check_effect
from dijiang.convert.mapping import build_on_meta
from dijiang.modeling import FEATURE_MAPS, DiJiangForCausalLM
from dijiang.modeling.linear_attention_chunk import CHUNK_SIZE
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention
from dijiang.modeling.window_attention import queries_per_block

from ..recipe.schema import Recipe
from ..stages.parameters import ADDED_PARTS, added_parameters
from .hardware import DEVICES

LEVELS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
UTILISATION = 0.35  # share of the device's peak that training reaches
FILL = 0.9  # share of its memory that may be planned for; the rest is lost between the tensors
BUCKET = 50_000_000  # elements that the shipped DeepSpeed files send at a time
LIVE = 500_000_000  # gathered elements that they allow at a time in ZeRO 3
RUNTIME = 2**30  # bytes that CUDA and its libraries take
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """
    Numbers of weights of one model.

    Attributes:
        total: all; a tied head counts once.
        kernel: of the linear layers' kernels that train; fixed: those that stay as they were drawn.
        beside: that conversion added besides, output norms and gates.
        projections: queries, keys, values and outputs of linear layers, biases included.
        embeddings: embeddings and head.
        matrices: that multiply each token, the head among them, also where it is tied.
        head: of `matrices`.
        inner_sides: over the layers' matrices that adapters go to, the sum of their two sides.
        linear: matrices of the projections of linear layers; linear_sides: the sum of their two sides.
        mixed: FLOPs per token of all linear layers' mixing, forward; softmax: those of softmax layers per token of context.
    """

    total: int
    kernel: int
    fixed: int
    beside: int
    projections: int
    embeddings: int
    matrices: int
    head: int
    inner_sides: int
    linear: int
    linear_sides: int
    mixed: float
    softmax: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """
    Cost of one stage.

    Attributes:
        trained: parameters that train.
        tokens: of all steps.
        flops: by part, of the whole stage.
        hours: at `UTILISATION` of the peak.
        memory: by level of `LEVELS`, then by part: bytes per device.
        host: by level, bytes in main memory per device.
        activations: bytes per device without and with gradient checkpointing.
    """

    trained: int
    tokens: int
    flops: dict[str, float]
    hours: float
    memory: dict[str, dict[str, float]]
    host: dict[str, float]
    activations: dict[bool, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """
    Cost of a recipe on `gpus` devices of the kind `gpu`; `level` is the recipe's own of `LEVELS`, None for a DeepSpeed file
    of the user's.
    """

    source: str
    gpu: str
    gpus: int
    level: str | None
    teacher: ModelSize
    student: ModelSize
    stages: dict[str, StageCost]

    def fits(self, stage: str, level: str) -> bool:
        """Whether the stage stays below `FILL` of the device's memory."""
        return sum(self.stages[stage].memory[level].values()) <= FILL * DEVICES[self.gpu].memory * GIB

    @property
    def summary(self) -> str:
        """One line: hours of each stage and the memory of the larger one."""
        hours = ", ".join(f"{name} {duration(cost.hours)}" for name, cost in self.stages.items())
        peak = max(sum(cost.memory[self.level or LEVELS[0]].values()) for cost in self.stages.values())
        memory = f"; {peak / GIB:.1f} GiB per device with {self.level}" if self.level else ""
        return f"{self.gpus} x {self.gpu} at {UTILISATION:.0%} of its peak: {hours}{memory}"


def estimate(recipe: Recipe, *, gpu: str = "h100", gpus: int = 1, shape: PretrainedConfig | Mapping | None = None) -> Estimate:
    """
    What `recipe` costs on `gpus` devices.

    Args:
        gpu: a key of `DEVICES`.
        shape: transformers config of the source, or its entries. Default: that of a folder or GGUF file on disk, then
            `SHAPES`, which knows the bundled recipes' models, then the hub's config.json. No weights are read.

    Raises:
        ValueError: on an unknown device, or a source whose config cannot be had or is of no supported family.
    """
    if gpu not in DEVICES:
        raise ValueError(f"gpu {gpu!r} is unknown; choose from {', '.join(DEVICES)}")
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    config = source_config(recipe.source, shape)
    preset, settings = PRESETS[recipe.convert.preset], recipe.convert.settings
    made = dijiang_config(config, {"layer_types": "linear_attention"} | preset | settings)
    check_effect(settings, made)
    student = build_on_meta(made)
    teacher = model_size(build_on_meta(dijiang_config(config, {})))
    size = model_size(student)
    level = recipe.run.deepspeed or "zero0"
    costs = {stage: stage_cost(recipe, stage, teacher, size, student, gpu, gpus) for stage in recipe.stages}
    level = level if level in LEVELS else None
    return Estimate(source=recipe.source, gpu=gpu, gpus=gpus, level=level, teacher=teacher, student=size, stages=costs)


def source_config(source: str, shape: PretrainedConfig | Mapping | None) -> PretrainedConfig:
    """The transformers config of a source, without its weights."""
    path = Path(source).expanduser()
    if isinstance(shape, PretrainedConfig):
        config = shape
    elif shape is None and path.exists():
        config = open_convertible(path).config
    else:
        entries = dict(SHAPES.get(source, {}) if shape is None else shape)
        try:
            config = (
                AutoConfig.for_model(**entries) if entries else AutoConfig.from_pretrained(source, trust_remote_code=False)
            )
        except Exception as error:
            raise ValueError(f"the config of {source} cannot be had ({one_line(error)}); give a folder on disk") from None
    if config.model_type not in FAMILIES:
        raise ValueError(f"{source} is a {config.model_type} model, whose conversion starts from {', '.join(FAMILIES)}")
    return config


def model_size(model: DiJiangForCausalLM) -> ModelSize:
    config, linear = model.config, [m for m in model.modules() if isinstance(m, DiJiangLinearAttention)]
    projections = [getattr(layer, f"{part}_proj") for layer in linear for part in "qkvo"]
    head, tables = model.lm_head.weight.numel(), {id(p): p for p in (model.lm_head.weight, model.model.embed_tokens.weight)}
    inner = [module for module in model.model.layers.modules() if type(module) is nn.Linear]
    every = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    kernel = sum(p.numel() for p in added_parameters(model).values())
    parts = [part for layer in linear for name in ADDED_PARTS if (part := getattr(layer, name)) is not None]
    return ModelSize(
        total=sum(p.numel() for p in model.parameters()),
        kernel=kernel,
        fixed=sum(p.numel() for part in parts for p in part.parameters()) - kernel,
        beside=sum(p.numel() for layer in linear for m in (layer.output_norm, layer.output_gate) if m for p in m.parameters()),
        projections=sum(p.numel() for module in projections for p in module.parameters()),
        embeddings=sum(p.numel() for p in tables.values()),
        matrices=sum(module.weight.numel() for module in every) + head,
        head=head,
        inner_sides=sum(sum(module.weight.shape) for module in inner),
        linear=sum(module.weight.numel() for module in projections),
        linear_sides=sum(sum(module.weight.shape) for module in projections),
        mixed=sum(mixing_flops(layer) for layer in linear),
        softmax=2.0 * config.num_attention_heads * config.head_dim * (config.num_hidden_layers - len(linear)),
    )


def mixing_flops(layer: DiJiangLinearAttention) -> float:
    """FLOPs per token of one linear layer between its projections, forward."""
    H, G, d, M, C = layer.num_heads, layer.num_key_value_heads, layer.head_dim, layer.feature_map_q.size, CHUNK_SIZE
    projected = "feature_dim" in FEATURE_MAPS[layer.config.feature_map].settings
    features = 2 * (H + G) * M * d if projected else 0
    state = 2 * H * C * (M + d) + 2 * (H + G) * M * d
    near = layer.window + layer.sinks + queries_per_block(layer.window)
    return features + state + (4 * H * d * near if layer.window else 0)


def trained_weights(recipe: Recipe, stage: str, size: ModelSize) -> tuple[int, int]:
    """How many parameters train, and how many of them multiply by matrices in the float type of computations."""
    config = getattr(recipe, stage)
    if adapters := adapter_weights(recipe, stage, size):
        others = adapters + (size.embeddings if config.trains == "all" and config.train_embeddings else 0)
    elif config.trains == "all":
        others = size.total - size.kernel - size.fixed - size.beside - (0 if config.train_embeddings else size.embeddings)
    else:
        others = size.projections if config.trains == "attention" else 0
    others += size.beside if stage == "distill" else 0
    return size.kernel + others, others


def adapter_weights(recipe: Recipe, stage: str, size: ModelSize) -> int:
    config = getattr(recipe, stage)
    if stage == "align" or config.trains == "kernel":
        return 0
    return config.lora_rank * (size.inner_sides if config.trains == "all" else size.linear_sides)


def stage_flops(recipe: Recipe, stage: str, teacher: ModelSize, size: ModelSize) -> dict[str, float]:
    """FLOPs per token, by part."""
    config = getattr(recipe, stage)
    context = sum(steps * config.batch_size * length**2 for steps, length in config.phases) / config.total_tokens
    if stage == "align":
        branches = bool(config.combined_weight) + bool(config.linear_weight)
        projected = 2 * size.linear * (2 if config.trains == "attention" else 1)
        return {
            "teacher": 2 * (teacher.matrices - teacher.head) + teacher.softmax * context,
            "student": projected + 3 * branches * size.mixed,
        }
    mixing = size.mixed + size.softmax * context
    if adapters := adapter_weights(recipe, stage, size):
        gradients = 6 * adapters
    elif config.trains == "all":
        gradients = 2 * (size.matrices - (0 if config.train_embeddings else size.head))
    else:
        gradients = 2 * size.linear if config.trains == "attention" else 0
    parts = {
        "teacher": (2 * teacher.matrices + teacher.softmax * context) if config.kl_weight else 0,
        "student forward": 2 * size.matrices + mixing,
        "student backward": 2 * size.matrices + 2 * mixing + gradients,
    }
    if recipe.run.gradient_checkpointing:
        parts["recomputed"] = 2 * (size.matrices - size.head) + mixing
    return parts


def stage_cost(recipe, stage, teacher: ModelSize, size: ModelSize, student, gpu: str, gpus: int) -> StageCost:
    config, device = getattr(recipe, stage), DEVICES[gpu]
    low = 2 if recipe.run.dtype != "float32" and device.bfloat16 else 4  # bytes of a number in computations
    trained, others = trained_weights(recipe, stage, size)
    flops = {part: value * config.total_tokens for part, value in stage_flops(recipe, stage, teacher, size).items()}
    held = recipe.run.micro_batch_size * config.block_size
    layer, layers, hidden = layer_bytes(student.config, low), student.config.num_hidden_layers, student.config.hidden_size
    inner = student.config.num_attention_heads * student.config.head_dim
    passing = held * low * (2 * student.config.intermediate_size + 4 * hidden)  # the teacher's, of one layer
    if stage == "align":
        needed = held * (low * layers * (hidden + inner) + layer) + passing
        activations, logits, has_teacher = dict.fromkeys((False, True), needed), 0, True
    else:
        has_teacher = bool(config.kl_weight) and not config.teacher_top_k
        activations = {False: held * layers * layer + passing, True: held * (low * hidden * layers + layer) + passing}
        numbers = (16 + 2 * low) if config.kl_weight else (8 + low)
        logits = numbers * min(config.chunk_tokens, held) * student.config.vocab_size
    frozen = size.total - trained + adapter_weights(recipe, stage, size)
    shared = {
        "teacher": low * teacher.total if has_teacher else 0,
        "activations": activations[recipe.run.gradient_checkpointing],
        "logits": logits,
        "runtime": 0 if gpu == "cpu" else RUNTIME,
    }
    memory, host = {}, {}
    for level in LEVELS:
        sharded, host[level] = model_bytes(level, gpus, trained, others, frozen, low)
        memory[level] = sharded | shared
    hours = sum(flops.values()) / (gpus * device.speed * 1e12 * UTILISATION * 3600)
    return StageCost(
        trained=trained,
        tokens=config.total_tokens,
        flops=flops,
        hours=hours,
        memory=memory,
        host=host,
        activations=activations,
    )


def layer_bytes(config, low: int) -> float:
    """Bytes per token that one linear layer keeps for its backward pass, computing in numbers of `low` bytes."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    M = FEATURE_MAPS[config.feature_map](config, 1, 0).size
    norms = 3 * low + (0 if config.norm_type == "layer_norm" else 22 if low == 2 else 11)
    outside = norms * config.hidden_size + (4 if config.mlp_type == "gated" else 2) * low * config.intermediate_size
    branch = (8 + 2.5 * low) * H * d + (3 + low) * H * M + (10 + 2 * low) * G * M + 8 / low * G * M * d / CHUNK_SIZE
    scaled = 0 if config.decay == "none" else low * H * CHUNK_SIZE  # what a decay multiplies is kept before and after
    scaled += low * H * M + G * (6 * M + CHUNK_SIZE) if config.decay == "learned" else 0
    near = config.attention_window + config.attention_sinks + queries_per_block(config.attention_window)
    return outside + branch + scaled + (4.6 * H * (near + 1) + 8 * H * d if config.attention_window else 0)


def model_bytes(level: str, n: int, trained: int, others: int, frozen: int, low: int) -> tuple[dict[str, float], float]:
    """Bytes per device of one level by part, and those in main memory."""
    stage, offload = int(level[4]), level.endswith("offload")
    weights = 4 * trained + low * frozen
    optimizer, master = 8 * trained / (n if stage else 1), 4 * trained / n
    gradients = 4 * trained / (n if stage >= 2 else 1)
    on_host = 0.0
    if offload:
        on_host = optimizer + master + gradients + (weights / n if stage == 3 else 0)
    if stage == 3:
        gathered = weights * min(1, LIVE / (trained + frozen))
        weights = gathered + (0 if offload else weights / n)
    reduced = min(trained, BUCKET) * (2 if stage == 3 else 1) if stage else trained * (n > 1)
    parts = {
        "weights": weights,
        "bfloat16 copies": 2 * others if low == 2 else 0,
        "gradients": 0 if offload else gradients,
        "master weights": 0 if offload or stage not in (1, 2) else master,
        "optimizer states": 0 if offload else optimizer,
        "buffers": 4 * reduced,
    }
    return parts, on_host


def duration(hours: float) -> str:
    """Two digits in hours, minutes or seconds, whichever gives a number of at least 1."""
    value, unit = next(((hours * n, unit) for n, unit in ((1, "h"), (60, "min")) if hours * n >= 1), (hours * 3600, "s"))
    return f"{value:.0f} {unit}" if value >= 9.5 else f"{value:.1f} {unit}"


def render(found: Estimate) -> str:
    """The estimate as a text table."""
    device = DEVICES[found.gpu]
    size, own = found.student, found.student.total - found.teacher.total
    lines = [
        f"{found.source}: {found.teacher.total:,} parameters; {own:,} more by conversion, {size.kernel:,} of them trained",
        f"on {found.summary}",
    ]
    for name, cost in found.stages.items():
        plain, saving = (cost.activations[way] / GIB for way in (False, True))
        total = sum(cost.flops.values())
        parts = ", ".join(f"{part} {value / total:.0%}" for part, value in cost.flops.items() if value)
        lines += [
            "",
            f"{name}: {cost.trained:,} parameters train on {cost.tokens:,} tokens",
            f"  {total:.3g} FLOPs ({parts}); {duration(cost.hours)}",
            f"  {'GiB per device':<18}" + "".join(f"{level:>14}" for level in LEVELS),
        ]
        for part in cost.memory[LEVELS[0]]:
            lines.append(f"  {part:<18}" + "".join(f"{cost.memory[level][part] / GIB:>14.2f}" for level in LEVELS))
        totals = {level: sum(cost.memory[level].values()) / GIB for level in LEVELS}
        marks = {level: ("fits" if found.fits(name, level) else "too large") for level in LEVELS}
        lines += [
            f"  {'total':<18}" + "".join(f"{totals[level]:>14.2f}" for level in LEVELS),
            f"  {'of ' + format(device.memory, 'g') + ' GiB':<18}" + "".join(f"{marks[level]:>14}" for level in LEVELS),
            f"  {'in main memory':<18}" + "".join(f"{cost.host[level] / GIB:>14.2f}" for level in LEVELS),
            f"  activations: {plain:.2f} GiB, with gradient checkpointing {saving:.2f} GiB",
        ]
    return "\n".join(lines)
