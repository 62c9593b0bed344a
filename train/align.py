"""The align stage: fit the kernels of a converted checkpoint to its teacher's attention; nothing else changes."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dijiang.convert import (
    add_stage,
    fastest_dtype,
    load_source,
    new_folder,
    public_name,
    read_provenance,
    refuse_other_source,
    write_provenance,
)
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_layer import linear_layers

from .attention_transfer import kernel_parameters, layer_losses, run_teacher
from .calibrate import calibrate_layer
from .checkpoint import copy_with_parameters
from .data import token_blocks
from .progress import TokenProgress

SAME_IN_TEACHER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig:
    """
    Settings of the align stage.

    Attributes:
        tokens: budget of training tokens, rounded down to whole steps; text shorter than that is read again.
        block_size: tokens per sequence.
        batch_size: sequences per step.
        learning_rate: Adam's, after a warm-up over 5 % of the steps, falling to 5 % of itself along a cosine.
        calibration_blocks: sequences of the closed-form start; 0 to leave it out.
        quiet: how far below its fitted share the linear branch starts, as a logarithm.
        dtype: of the frozen weights and the teacher: `float32`, `bfloat16` or `auto`, the faster one on this machine. Kernel
            parameters and sums are float32 always.
        device: `cpu`, `cuda` or `auto`.
        seed: of the order of the text.

    Raises:
        ValueError: on values that make no sense.
    """

    tokens: int = 100_000
    block_size: int = 1024
    batch_size: int = 1
    learning_rate: float = 5e-2
    calibration_blocks: int = 2
    quiet: float = 0.5
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for key in ("block_size", "batch_size", "learning_rate"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} must be greater than 0")
        for key in ("calibration_blocks", "quiet"):
            if not getattr(self, key) >= 0:  # NaN too
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
        if self.tokens < self.tokens_per_step:
            raise ValueError(f"tokens={self.tokens} is less than one step of {self.tokens_per_step} (batch_size * block_size)")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose auto, float32 or bfloat16")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size


def align(
    checkpoint: str | Path,
    output: str | Path,
    *,
    teacher: str | Path,
    data: str | Path | Sequence[str | Path],
    config: AlignConfig | None = None,
    progress: bool = True,
) -> Path:
    """
    Fit the kernel parameters of `checkpoint` to its teacher by attention transfer and write the result to `output`.

    Args:
        checkpoint: folder of a converted model.
        output: folder that does not exist or is empty; it appears only when it is complete.
        teacher: the model that `checkpoint` was converted from: hub id, folder or GGUF file.
        data: one or more paths of UTF-8 text files.
        config: settings; by default those of `AlignConfig`.
        progress: show a progress bar on stderr.

    Returns:
        The output folder.

    Raises:
        ValueError: if checkpoint, teacher, data or output do not allow it, or the loss stops being finite. Nothing is left on
            disk then.
    """
    config = config or AlignConfig()
    data = [data] if isinstance(data, str | Path) else data
    provenance = read_provenance(checkpoint)
    with new_folder(output) as folder:
        device = choose_device(config.device)
        dtype = fastest_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        student, tokenizer = load_source(checkpoint, dtype=dtype)
        blocks = token_blocks(tokenizer, data, config.block_size)
        if student.config.output_norm != "none" or student.config.output_gate:
            raise ValueError(
                f"{checkpoint} has output_norm or output_gate, so its outputs cannot be compared with softmax attention's; "
                "attention transfer is for layers without them, such as preset recommended"
            )
        if not kernel_parameters(student):
            raise ValueError(
                f"{checkpoint} has no linear-attention layer with kernel parameters, so there is nothing to align"
            )
        refuse_other_source(provenance, teacher)
        teacher_model, _ = load_source(teacher, dtype=dtype)
        refuse_misfit(student, teacher_model, teacher)
        student, teacher_model = student.to(device), teacher_model.to(device)

        order = block_order(len(blocks), config.seed)
        record = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)}
        fresh = not any(stage["stage"] == "align" for stage in provenance["stages"])
        if fresh and config.calibration_blocks:
            count = min(config.calibration_blocks, len(blocks))
            first = torch.stack([blocks[next(order)] for _ in range(count)])
            record["calibration_r2"] = calibrate(student, teacher_model, first.to(device), config.quiet)
            order = block_order(len(blocks), config.seed)  # the same blocks also train
        record |= train(student, teacher_model, blocks, order, config, progress)
        copy_with_parameters(checkpoint, folder, kernel_parameters(student))
        facts = {
            "teacher": public_name(teacher),
            "data": [public_name(path) for path in data],
            "config": asdict(config),
        }
        write_provenance(folder, add_stage(provenance, "align", **facts, **record))
    return Path(output)


def choose_device(name: str) -> torch.device:
    """The device that `name` stands for; `auto` is the GPU if there is one. Raises ValueError if it cannot be had."""
    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise ValueError(f"device={name!r} is unknown; choose auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def refuse_misfit(student: DiJiangForCausalLM, teacher_model: DiJiangForCausalLM, teacher: str | Path) -> None:
    """Raise ValueError unless `teacher_model` is a softmax model of the student's shape."""
    if teacher_model.config.has_linear_layers:
        raise ValueError(f"teacher {teacher} has linear-attention layers; give the softmax model that was converted")
    for key in SAME_IN_TEACHER:
        ours, theirs = getattr(student.config, key), getattr(teacher_model.config, key)
        if ours != theirs:
            raise ValueError(f"teacher {teacher} does not fit the checkpoint: {key} is {theirs}, expected {ours}")


def block_order(count: int, seed: int) -> Iterator[int]:
    """Indices 0 .. count - 1 in random order, again and again, each time in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def calibrate(student: DiJiangForCausalLM, teacher: DiJiangForCausalLM, input_ids: torch.Tensor, quiet: float) -> float | None:
    """Closed-form start of all linear layers on input_ids (B, T); returns the mean R^2 of the branch scales' fit."""
    kept = run_teacher(teacher, input_ids)
    fits = []
    for i, attention in linear_layers(student).items():
        q, k, v = attention.project(kept.inputs[i], kept.position_embeddings)
        target = kept.outputs[i].float().view_as(q)
        fits.append(calibrate_layer(attention, q, k, v, target, quiet))
    fits = [fit for fit in fits if fit is not None]
    return sum(fits) / len(fits) if fits else None


def train(student, teacher, blocks: torch.Tensor, order: Iterator[int], config: AlignConfig, progress: bool) -> dict:
    """Run the optimiser over the token budget; returns what the provenance records of it."""
    parameters = list(kernel_parameters(student).values())
    student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.95))
    steps = config.tokens // config.tokens_per_step
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    device = next(student.parameters()).device
    losses, started = [], time.perf_counter()
    with TokenProgress("Aligning", steps * config.tokens_per_step, shown=progress) as bar:
        for step in range(steps):
            input_ids = torch.stack([blocks[next(order)] for _ in range(config.batch_size)]).to(device)
            kept = run_teacher(teacher, input_ids)
            total = 0.0
            for layer, loss in layer_losses(student, kept):
                loss.backward()
                total += loss.item()
                if not math.isfinite(total):
                    raise ValueError(f"the loss of layer {layer} is {loss.item()} at step {step}; lower learning_rate")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total / len(linear_layers(student)))
            bar.advance(config.tokens_per_step, loss=losses[-1])
    seconds = time.perf_counter() - started
    ends = max(1, steps // 10)
    return {
        "tokens": steps * config.tokens_per_step,
        "epochs": steps * config.batch_size / len(blocks),
        "seconds": round(seconds, 1),
        "loss_first": sum(losses[:ends]) / ends,
        "loss_last": sum(losses[-ends:]) / ends,
    }


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine from 1 to 0.05."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
