"""What one stage of a recipe costs: trained parameters, FLOPs, bytes per device and hours. The formulas: docs/estimate.md."""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from dijiang.modeling import FEATURE_MAPS
from dijiang.modeling.linear_attention_chunk import CHUNK_SIZE
from dijiang.modeling.window_attention import queries_per_block

from ..recipe.schema import Recipe
from .hardware import DEVICES
from .model_size import ModelSize

LEVELS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
UTILIZATION = 0.35  # share of the device's peak that training reaches
BUCKET = 50_000_000  # elements that the shipped DeepSpeed files send at a time
LIVE = 500_000_000  # gathered elements that they allow at a time in ZeRO 3
RUNTIME = 2**30  # bytes that CUDA and its libraries take


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """
    Cost of one stage.

    Attributes:
        trained: number of parameters that train.
        tokens: training tokens of all steps.
        flops: FLOPs of the whole stage, by part.
        hours: duration at `UTILIZATION` of the device's peak.
        memory: bytes per device, by level of `LEVELS`, then by part.
        host: bytes in main memory per device, by level.
        activations: bytes of activations per device, without (False) and with (True) gradient checkpointing.
    """

    trained: int
    tokens: int
    flops: dict[str, float]
    hours: float
    memory: dict[str, dict[str, float]]
    host: dict[str, float]
    activations: dict[bool, float]


class StageWeights(NamedTuple):
    """Numbers of parameters: those that train, those of them that are cast for computations, adapters, frozen ones."""

    trained: int
    cast: int
    adapters: int
    frozen: int


def stage_cost(recipe: Recipe, stage: str, teacher: ModelSize, student: ModelSize, *, gpu: str, gpus: int) -> StageCost:
    """The cost of one stage on `gpus` devices of the kind `gpu`."""
    config = getattr(recipe, stage)
    device = DEVICES[gpu]
    low = 2 if recipe.run.dtype != "float32" and device.bfloat16 else 4  # bytes of a number in computations
    weights = stage_weights(recipe, stage, student)
    flops = {part: value * config.total_tokens for part, value in stage_flops(recipe, stage, teacher, student).items()}
    activations = activation_bytes(recipe, stage, student.config, low)
    has_teacher = stage == "align" or bool(config.kl_weight and not config.teacher_top_k)
    same_at_all_levels = {
        "teacher": low * teacher.total if has_teacher else 0,
        "activations": activations[recipe.run.gradient_checkpointing],
        "logits": 0 if stage == "align" else logit_bytes(recipe, student.config.vocab_size, low),
        "runtime": 0 if gpu == "cpu" else RUNTIME,
    }
    memory = {}
    host = {}
    for level in LEVELS:
        sharded, host[level] = weight_bytes(level, gpus, weights, low)
        memory[level] = sharded | same_at_all_levels
    return StageCost(
        trained=weights.trained,
        tokens=config.total_tokens,
        flops=flops,
        hours=sum(flops.values()) / (gpus * device.speed * 1e12 * UTILIZATION * 3600),
        memory=memory,
        host=host,
        activations=activations,
    )


def stage_weights(recipe: Recipe, stage: str, student: ModelSize) -> StageWeights:
    """Divide the student's parameters into those that train and those that do not."""
    config = getattr(recipe, stage)
    adapters = 0
    if stage == "distill" and config.trains != "kernel":
        adapters = config.lora_rank * (student.sides if config.trains == "all" else student.projection_sides)
    if config.trains == "all":
        embeddings = student.embeddings if config.train_embeddings else 0
        layers = student.total - student.added - student.fixed - student.output - student.embeddings
        cast = (adapters or layers) + embeddings
    else:
        cast = adapters or (student.projections if config.trains == "attention" else 0)
    if stage == "distill":
        cast += student.output
    trained = student.added + cast
    return StageWeights(trained, cast, adapters, frozen=student.total - trained + adapters)


def stage_flops(recipe: Recipe, stage: str, teacher: ModelSize, student: ModelSize) -> dict[str, float]:
    """FLOPs per training token, by part."""
    config = getattr(recipe, stage)
    context = sum(steps * config.batch_size * length**2 for steps, length in config.phases) / config.total_tokens
    if stage == "align":
        losses = bool(config.combined_weight) + bool(config.linear_weight)
        projected = 2 * student.projection_matrices * (2 if config.trains == "attention" else 1)
        return {
            "teacher": 2 * (teacher.matrices - teacher.head) + teacher.softmax_flops * context,
            "student": projected + 3 * losses * student.mixing_flops,
        }
    mixing = student.mixing_flops + student.softmax_flops * context
    if adapters := stage_weights(recipe, stage, student).adapters:
        gradients = 6 * adapters
    elif config.trains == "all":
        gradients = 2 * (student.matrices - (0 if config.train_embeddings else student.head))
    else:
        gradients = 2 * student.projection_matrices if config.trains == "attention" else 0
    parts = {
        "teacher": (2 * teacher.matrices + teacher.softmax_flops * context) if config.kl_weight else 0,
        "student forward": 2 * student.matrices + mixing,
        "student backward": 2 * student.matrices + 2 * mixing + gradients,
    }
    if recipe.run.gradient_checkpointing:
        parts["recomputed"] = 2 * (student.matrices - student.head) + mixing
    return parts


def activation_bytes(recipe: Recipe, stage: str, config: PretrainedConfig, low: int) -> dict[bool, float]:
    """Bytes of activations per device, without (False) and with (True) gradient checkpointing."""
    tokens = recipe.run.micro_batch_size * getattr(recipe, stage).block_size
    layers = config.num_hidden_layers
    hidden = config.hidden_size
    one_layer = layer_bytes(config, low)
    teacher = tokens * low * (2 * config.intermediate_size + 4 * hidden)  # one layer of the teacher at a time
    if stage == "align":
        inner = config.num_attention_heads * config.head_dim
        return dict.fromkeys((False, True), tokens * (low * layers * (hidden + inner) + one_layer) + teacher)
    return {
        False: tokens * layers * one_layer + teacher,
        True: tokens * (low * hidden * layers + one_layer) + teacher,
    }


def logit_bytes(recipe: Recipe, vocab_size: int, low: int) -> float:
    """Bytes per device of the logits that are in memory at a time."""
    tokens = min(recipe.distill.chunk_tokens, recipe.run.micro_batch_size * recipe.distill.block_size)
    return (16 + 2 * low if recipe.distill.kl_weight else 8 + low) * tokens * vocab_size


def layer_bytes(config: PretrainedConfig, low: int) -> float:
    """Bytes per token that one linear layer keeps for its backward pass, computing in numbers of `low` bytes."""
    H = config.num_attention_heads
    G = config.num_key_value_heads
    d = config.head_dim
    M = FEATURE_MAPS[config.feature_map](config, 1, 0).size
    norms = 3 * low + (0 if config.norm_type == "layer_norm" else 22 if low == 2 else 11)
    outside = norms * config.hidden_size + (4 if config.mlp_type == "gated" else 2) * low * config.intermediate_size
    branch = (8 + 2.5 * low) * H * d + (3 + low) * H * M + (10 + 2 * low) * G * M + 8 / low * G * M * d / CHUNK_SIZE
    scaled = 0 if config.decay == "none" else low * H * CHUNK_SIZE  # autograd saves what a decay multiplies, and the product
    scaled += low * H * M + G * (6 * M + CHUNK_SIZE) if config.decay == "learned" else 0
    exact = config.attention_window + config.attention_sinks + queries_per_block(config.attention_window)
    return outside + branch + scaled + (4.6 * H * (exact + 1) + 8 * H * d if config.attention_window else 0)


def weight_bytes(level: str, gpus: int, weights: StageWeights, low: int) -> tuple[dict[str, float], float]:
    """Bytes per device of weights and what belongs to them, by part, and bytes per device in main memory."""
    stage = int(level[4])
    offload = level.endswith("offload")
    trained = weights.trained
    stored = 4 * trained + low * weights.frozen
    optimizer = 8 * trained / (gpus if stage else 1)
    master = 4 * trained / gpus
    gradients = 4 * trained / (gpus if stage >= 2 else 1)
    on_host = 0.0
    if offload:
        on_host = optimizer + master + gradients + (stored / gpus if stage == 3 else 0)
    if stage == 3:
        gathered = stored * min(1, LIVE / (trained + weights.frozen))
        stored = gathered + (0 if offload else stored / gpus)
    reduced = min(trained, BUCKET) * (2 if stage == 3 else 1) if stage else trained * (gpus > 1)
    parts = {
        "weights": stored,
        "bfloat16 copies": 2 * weights.cast if low == 2 else 0,
        "gradients": 0 if offload else gradients,
        "master weights": 0 if offload or stage not in (1, 2) else master,
        "optimizer states": 0 if offload else optimizer,
        "buffers": 4 * reduced,
    }
    return parts, on_host
