"""Speed of a stage's training step on this machine, by the way of computing it."""

import contextlib
import gc
import os
import time
import traceback
from pathlib import Path

import torch
from shared import describe_error

from dijiang.evaluate.latency.timing import waiting_for
from dijiang.modeling import window_attention_flex as flex_window
from dijiang.modeling.linear_attention import prefer_backend
from dijiang.modeling.linear_attention_fla import fla_is_usable
from dijiang.train import Recipe
from dijiang.train.data.blocks import training_blocks
from dijiang.train.estimate.model_size import model_size
from dijiang.train.estimate.stage_cost import stage_flops
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
STEP_SECONDS = 2.0  # for which a way is timed
PROBE_BYTES = 64 << 20
# largest relative differences between two ways in bfloat16
LOSS_DIFFERENCE, GRADIENT_DIFFERENCE = 0.02, 0.1


class Speed:
    """
    Times training steps of a stage's model, which is built as the stage builds it and then thrown away.

    Attributes:
        build_seconds: time to build the model.
        trained: number of parameters that train.
    """

    def __init__(self, recipe: Recipe, stage: str, tokenizer, device: torch.device, dtype: torch.dtype):
        began = time.monotonic()
        self.recipe = recipe
        self.stage = stage
        self.config = getattr(recipe, stage)
        self.device = device
        blocks = training_blocks(recipe.data, self.config, tokenizer, progress=False)
        folder = StageFolder(recipe, stage)
        model, self.blocks = build_model(folder, blocks, device=device, dtype=dtype, progress=False)
        self.model = model.to(device).train()
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.before = torch.get_float32_matmul_precision()
        if device.type == "cuda" and dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("high")  # as in the stage
        self.build_seconds = time.monotonic() - began

    def close(self) -> None:
        """Free the memory that the run will need."""
        self.model = self.blocks = None
        torch.set_float32_matmul_precision(self.before)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def flops(self) -> dict[str, float]:
        """FLOPs per training token by part, from the formulas of docs/estimate.md."""
        sizes = model_size(self.model.teacher), model_size(self.model.student)
        return stage_flops(self.recipe, self.stage, *sizes)

    def choose(self, table: list[dict], record, small: bool, all_ways: bool) -> dict:
        """Time several ways, with fla and FlexAttention if `all_ways`; write them into `table`, and return the fastest."""
        if small:
            compiling.BACKEND = "eager"  # the code generator takes minutes on a CPU
        ways = [EAGER, COMPILED]
        if all_ways:
            usable, _ = fla_is_usable(self.device)
            window = self.model.student.config.attention_window >= flex_window.FLEX_FROM
            ways += [way for way in OTHERS if (usable if "backend" in way else window and self.device.type == "cuda")]
        rows = []
        for way in ways:
            rows.append(self.measure(way, steps=1 if small else 3))
            note(table, rows[-1])
            record.save()
        eager, *others = rows
        for row in others:
            if "loss" in row and "loss" in eager and (difference := disagreement(eager, row)):
                row["error"] = f"not the same as {eager['name']}: {difference}"
        record.save()
        usable_rows = [row for row in rows if "error" not in row]
        return max(usable_rows, key=lambda row: row["tokens_per_s"], default=eager)

    def measure(self, way: dict, steps: int) -> dict:
        """One row of the table: `way` with the largest micro-batch that fits, or the error that ends it."""
        micro_batch = self.config.batch_size
        row = {"stage": self.stage, **way}
        while True:
            try:
                return row | self.time(way, micro_batch, steps)
            except torch.OutOfMemoryError:
                if micro_batch == 1:
                    return row | {"error": "the memory is too small for one sequence"}
                micro_batch //= 2
            except Exception as error:  # a compiler or a kernel may not support this machine
                traceback.print_exc()
                return row | {"error": describe_error(error)}
            finally:
                self.model.compiled = None
                self.model.zero_grad(set_to_none=True)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def time(self, way: dict, micro_batch: int, steps: int) -> dict:
        """Time whole steps: all micro-batches forward and backward, clipping, AdamW with learning rates of 0."""
        model = self.model
        wait = waiting_for(self.device)
        groups = [group | {"lr": 0.0} for group in model.parameter_groups() if group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = adamw(groups, self.config)
        starts = range(0, self.config.batch_size, micro_batch)
        batches = [collate_with_teacher([self.blocks[i] for i in range(start, start + micro_batch)]) for start in starts]
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
            """Loss, and the gradient's norm by group, which must agree between all ways."""
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

        with contextlib.ExitStack() as stack:
            stack.enter_context(prefer_backend(way.get("backend", "torch")))
            stack.callback(setattr, flex_window.kernel, "enabled", flex_window.kernel.enabled)
            flex_window.kernel.enabled = way.get("flex", False)
            began = time.monotonic()
            compared = figures()
            warmup = time.monotonic() - began
            step()  # the first one also fills the allocator
            wait()
            began = time.monotonic()
            count = 0
            while count < steps and (count == 0 or time.monotonic() - began < STEP_SECONDS):
                step()
                wait()
                count += 1
            seconds = (time.monotonic() - began) / count
        tokens = self.config.batch_size * batches[0]["input_ids"].shape[1]
        row = {"micro_batch": micro_batch, "step_s": seconds, "tokens_per_s": tokens / seconds, "warmup_s": round(warmup, 2)}
        row |= compared
        if self.device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return row


def note(table: list[dict], row: dict) -> None:
    """Append a row to a table, in place of the same row of an earlier call."""
    table[:] = [old for old in table if (old["stage"], old["name"]) != (row["stage"], row["name"])] + [row]


def disagreement(expected: dict, row: dict) -> str:
    """The loss and gradients of `row` that differ from the expected ones by more than rounding; empty if none does."""
    pairs = {"loss": (expected["loss"], row["loss"])}
    norms = row["gradient_norms"]
    pairs |= {f"gradient of {name}": (norm, norms[name]) for name, norm in expected["gradient_norms"].items()}
    limits = {name: LOSS_DIFFERENCE if name == "loss" else GRADIENT_DIFFERENCE for name in pairs}
    different = [f"{name} {b:.4g} for {a:.4g}" for name, (a, b) in pairs.items() if not abs(a - b) <= limits[name] * abs(a)]
    return ", ".join(different)


def checkpoint_seconds(folder: Path, size: int) -> float:
    """Estimate how long writing a checkpoint of `size` bytes takes here, from a smaller file."""
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
