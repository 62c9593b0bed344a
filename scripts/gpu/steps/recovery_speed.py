"""How fast a stage's training step is on this machine, by the ways there are to compute it."""

import contextlib
import gc
import os
import time
import traceback
from pathlib import Path

import torch

from common import one_line
from dijiang.evaluate.latency.timing import waiting_for
from dijiang.modeling import window_attention_flex as flex_window
from dijiang.modeling.linear_attention import prefer_backend
from dijiang.modeling.linear_attention_fla import fla_is_usable
from dijiang.train import Recipe
from dijiang.train.data.blocks import training_blocks
from dijiang.train.estimate.estimate import model_size, stage_flops
from dijiang.train.stages import compiled as compiling
from dijiang.train.stages.build import build_model
from dijiang.train.stages.job_folder import StageFolder
from dijiang.train.stages.teacher_logits import collate_with_teacher
from dijiang.train.trainer.optimizer import adamw

EAGER = {"name": "eager, torch"}
COMPILED = {"name": "compiled, torch", "compile": True}
OTHERS = (
    {"name": "eager, torch, FlexAttention", "flex": True},
    {"name": "eager, fla", "backend": "fla"},
)
STEP_SECONDS = 2.0  # that a way is timed for
PROBE_BYTES = 64 << 20
# between two ways in bfloat16, relative
LOSS_DIFFERENCE, GRADIENT_DIFFERENCE = 0.02, 0.1


class Speed:
    """
    A stage's model, built as the stage builds it, on which training steps are timed. Nothing of it is kept.

    Attributes:
        build_seconds: what building took.
        trained: number of parameters that train.
    """

    def __init__(self, recipe: Recipe, stage: str, tokenizer, device: torch.device, dtype: torch.dtype):
        began = time.monotonic()
        self.recipe, self.stage, self.config, self.device = recipe, stage, getattr(recipe, stage), device
        blocks = training_blocks(recipe.data, self.config, tokenizer, progress=False)
        folder = StageFolder(recipe, stage)
        model, self.blocks = build_model(folder, blocks, device=device, dtype=dtype, progress=False)
        self.model = model.to(device).train()
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.before = torch.get_float32_matmul_precision()
        if device.type == "cuda" and dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("high")  # as the stage does
        self.build_seconds = time.monotonic() - began

    def close(self) -> None:
        """Free what the run will need."""
        self.model = self.blocks = None
        torch.set_float32_matmul_precision(self.before)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def flops(self) -> dict[str, float]:
        """FLOPs per training token, by part, by the formulas of docs/estimate.md."""
        sizes = model_size(self.model.teacher), model_size(self.model.student)
        return stage_flops(self.recipe, self.stage, *sizes)

    def choose(self, table: list[dict], record, small: bool, all_ways: bool) -> dict:
        """
        Time the ways that are worth it, put them into `table`, and return the fastest. A small run tries compilation too,
        without its second half, the code generator, which takes minutes there.
        """
        if small:
            compiling.BACKEND = "eager"
        ways = [EAGER, COMPILED]
        if all_ways:
            usable, _ = fla_is_usable(self.device)
            window = self.model.student.config.attention_window >= flex_window.FLEX_FROM
            ways += [way for way in OTHERS if (usable if "backend" in way else window and self.device.type == "cuda")]
        found = []
        for way in ways:
            found.append(self.measure(way, steps=1 if small else 3))
            note(table, found[-1])
            record.save()
        for row in found[1:]:
            if "loss" in row and "loss" in found[0] and (wrong := disagreement(found[0], row)):
                row["error"] = f"not the same as {found[0]['name']}: {wrong}"
        record.save()
        fit = [row for row in found if "error" not in row]
        return max(fit, key=lambda row: row["tokens_per_s"], default=found[0])

    def measure(self, way: dict, steps: int) -> dict:
        """One row of the table: `way` with the largest micro-batch that fits, or the error that it ends in."""
        micro_batch, row = self.config.batch_size, {"stage": self.stage, **way}
        while True:
            try:
                return row | self.time(way, micro_batch, steps)
            except torch.OutOfMemoryError:
                if micro_batch == 1:
                    return row | {"error": "the memory is too small for one sequence"}
                micro_batch //= 2
            except Exception as error:  # of a compiler or a kernel: this way is not for this machine
                traceback.print_exc()
                return row | {"error": one_line(error)}
            finally:
                self.model.compiled = None
                self.model.zero_grad(set_to_none=True)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def time(self, way: dict, micro_batch: int, steps: int) -> dict:
        """Time whole steps: all micro-batches forward and backward, clipping, AdamW with rates of 0."""
        model, wait = self.model, waiting_for(self.device)
        groups = [group | {"lr": 0.0} for group in model.parameter_groups() if group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = adamw(groups, self.config)
        places = range(0, self.config.batch_size, micro_batch)
        batches = [collate_with_teacher([self.blocks[i] for i in range(p, p + micro_batch)]) for p in places]
        batches = [{name: value.to(self.device) for name, value in batch.items()} for batch in batches]
        if way.get("compile"):
            model.compiled = compiling.CompiledParts(model.student, model.teacher)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def step() -> None:
            for batch in batches:
                (model(**batch)["loss"] / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            model.zero_grad(set_to_none=True)

        def figures() -> dict:
            """Loss, and the gradient's norm by group: what all ways must agree on."""
            loss = 0.0
            for batch in batches:
                part = model(**batch)["loss"] / len(batches)
                part.backward()
                loss += part.item()
            norms = {
                group["name"]: torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
                for group in groups
            }
            model.zero_grad(set_to_none=True)
            return {"loss": loss, "gradient_norms": norms}

        with contextlib.ExitStack() as held:
            held.enter_context(prefer_backend(way.get("backend", "torch")))
            held.callback(setattr, flex_window, "use_flex", flex_window.use_flex)
            flex_window.use_flex = way.get("flex", False)
            began = time.monotonic()
            figure = figures()
            warmup = time.monotonic() - began
            step()  # the first one also fills the allocator
            wait()
            began, count = time.monotonic(), 0
            while count < steps and (count == 0 or time.monotonic() - began < STEP_SECONDS):
                step()
                wait()
                count += 1
            seconds = (time.monotonic() - began) / count
        tokens = self.config.batch_size * batches[0]["input_ids"].shape[1]
        row = {"micro_batch": micro_batch, "step_s": seconds, "tokens_per_s": tokens / seconds, "warmup_s": round(warmup, 2)}
        row |= figure
        if self.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return row


def note(table: list[dict], row: dict) -> None:
    """Put a row into a table, in place of that of an earlier call."""
    table[:] = [old for old in table if (old["stage"], old["name"]) != (row["stage"], row["name"])] + [row]


def disagreement(expected: dict, found: dict) -> str:
    """Which of loss and gradients differ by more than rounding, and how; empty if none does."""
    pairs = {"loss": (expected["loss"], found["loss"])}
    pairs |= {
        f"gradient of {name}": (norm, found["gradient_norms"][name]) for name, norm in expected["gradient_norms"].items()
    }
    limits = {name: LOSS_DIFFERENCE if name == "loss" else GRADIENT_DIFFERENCE for name in pairs}
    wrong = [f"{name} {b:.4g} for {a:.4g}" for name, (a, b) in pairs.items() if not abs(a - b) <= limits[name] * abs(a)]
    return ", ".join(wrong)


def checkpoint_seconds(folder: Path, size: int) -> float:
    """About how long a checkpoint of `size` bytes takes here, by writing some of it."""
    probe = folder / ".probe"
    written = min(size, PROBE_BYTES)
    data = os.urandom(1 << 20) * max(1, written >> 20)
    began = time.monotonic()
    with open(probe, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    probe.unlink()
    return 0.3 + 1.3 * seconds * size / len(data)
