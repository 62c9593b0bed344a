"""Runs the stages of a recipe, each from a checkpoint to a checkpoint, and goes on where a run was ended."""

import gc
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from dijiang.checkpoint.code_files import with_newest_code
from dijiang.checkpoint.patch_weights import copy_with_parameters
from dijiang.checkpoint.provenance import add_stage, public_name, read_provenance, write_provenance
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.common.device import fastest_dtype
from dijiang.common.outputs import new_folder

from ..data.blocks import TrainingBlocks, held_out_blocks, training_blocks
from ..recipe.schema import Recipe
from ..trainer.callbacks import StopSignals
from ..trainer.checkpoints import Checkpoints, read_manifest
from ..trainer.distributed import (
    accumulation,
    deepspeed_settings,
    forget_deepspeed,
    from_main,
    is_main,
    micro_batch,
    prepare_process,
    rank,
    share_errors,
)
from ..trainer.saving import refuse_other_writer, writer
from ..trainer.trainer import RecoveryTrainer, other_trackers
from .adapters import merged_state
from .build import StageModels, gathered_parameters
from .compiled import compile_model, wants_compilation
from .job_folder import StageFolder
from .teacher_logits import collate_with_teacher

TITLES = {"align": "Aligning", "distill": "Distilling"}


def recover(recipe: Recipe, *, progress: bool = True) -> Path:
    """
    Convert the source and run every stage of `recipe`, leaving out what is complete already. See `run_stage`.

    Returns:
        The last stage's model: a folder as `dijiang.convert_model` writes.
    """
    for stage in recipe.stages:
        folder = run_stage(recipe, stage, progress=progress)
    return folder


def run_stage(recipe: Recipe, stage: str, *, progress: bool = True) -> Path:
    """
    Run one stage of `recipe`, from its newest checkpoint on if there is one, and convert the source first if need be. Trained
    weights are written in the dtype that the checkpoint stores them in, so those stored in bfloat16 are rounded.

    Args:
        stage: `align` or `distill`.
        progress: show progress on stderr.

    Returns:
        `<output>/<stage>/model`.

    Raises:
        ValueError: if the recipe, the source, the text, the machine or what is in the output folder do not allow it, or the
            loss stops being finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if stage not in recipe.stages:
        raise ValueError(f"the recipe has no section {stage}; it has {' and '.join(recipe.stages) or 'no stage'}")
    return StageRun(recipe, stage, progress).run()


class StageRun:
    """One run of one stage, as each of its processes does it."""

    def __init__(self, recipe: Recipe, stage: str, progress: bool):
        self.recipe, self.stage, self.config = recipe, stage, getattr(recipe, stage)
        self.folder = StageFolder(recipe, stage)
        self.checkpoints = Checkpoints(self.folder.path / "checkpoints", recipe.run.keep_checkpoints)
        self.shown = progress and is_main()

    def run(self) -> Path:
        if self.folder.model.exists():
            self.folder.refuse_other_recipe()
            if is_main():
                print(f"dijiang: {self.folder.model} is already complete", file=sys.stderr)
            return self.folder.model
        with ExitStack() as held:
            self.device, self.precision = prepare_process(self.recipe.run), torch.get_float32_matmul_precision()
            with share_errors():
                accumulation(self.config, self.recipe.run)
                other_trackers(self.recipe.run.report_to)
                self.deepspeed(hidden_size=1)
                if is_main():
                    held.enter_context(self.folder.lock())
                    self.folder.prepare(self.shown)
            with share_errors():
                if not self.folder.recipe_file.is_file():
                    raise ValueError(f"process {rank()} does not see {self.folder.path}; all must share the output's disk")
            held.callback(self.release)
            self.train()
        return self.folder.model

    def release(self) -> None:
        """Let go of what would weigh on the next stage in this process."""
        self.trainer = None
        forget_deepspeed()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.set_float32_matmul_precision(self.precision)

    def deepspeed(self, hidden_size: int) -> dict | None:
        run = self.recipe.run
        return deepspeed_settings(run.deepspeed, self.config, run, hidden_size) if run.deepspeed is not None else None

    def train(self) -> None:
        checkpoint, self.dtype = self.pick_checkpoint()
        text, held_out = self.read_text()
        if checkpoint is not None and read_manifest(checkpoint).get("text") not in (None, text.fingerprint()):
            raise ValueError(f"the training text is not the one that {checkpoint} was trained on; name another output")
        # models come before TrainingArguments, which under ZeRO-3 would have them loaded in parts
        models = StageModels(self.recipe, self.stage, self.folder, self.dtype, self.device, self.shown)
        model, blocks = models.build(text)
        if self.device.type == "cuda" and self.dtype == torch.bfloat16:
            # float32 is what bfloat16 numbers are summed up in, so its products may be TF32's, which keep more digits
            torch.set_float32_matmul_precision("high")
        settings = self.deepspeed(model.student.config.hidden_size)
        facts = {"dtype": str(self.dtype).removeprefix("torch."), "source": self.folder.fingerprint()}
        facts["text"] = text.fingerprint()
        if checkpoint is None and self.stage == "align" and self.config.calibrate_blocks:
            facts |= self.calibrate(model, blocks)
        if wants_compilation(self.recipe, self.stage, self.device):
            facts["compiled"] = compile_model(model.to(self.device), self.trial_batch(blocks))
        with StopSignals() as signals:
            ends = time.monotonic() + 60 * (self.recipe.run.max_minutes or float("inf"))
            self.trainer = RecoveryTrainer(
                model,
                self.config,
                self.recipe.run,
                blocks=blocks,
                held_out=held_out,
                collate=collate_with_teacher,
                folder=self.folder.path,
                device=self.device,
                title=TITLES[self.stage],
                deepspeed=settings,
                stop_wanted=lambda: signals.caught is not None or time.monotonic() > ends,
                progress=self.shown,
            )
            self.trainer.tally.facts = facts
            if not self.trainer.run(checkpoint):
                raise KeyboardInterrupt(
                    f"{self.stage} was stopped after step {self.trainer.state.global_step} of {self.config.steps}, with a "
                    "checkpoint; run the same command again to go on"
                )
        self.write_model(model, text, settings)

    def pick_checkpoint(self) -> tuple[Path | None, torch.dtype]:
        """The checkpoint to go on from, if any, and the dtype of computations, the same in all processes and resumed runs."""
        found, name = None, self.recipe.run.dtype
        with share_errors():
            if is_main():
                self.checkpoints.clean()
                if (found := self.checkpoints.newest()) is None:
                    self.folder.refuse_other_lineage()
                    name = str(fastest_dtype(self.device)).removeprefix("torch.") if name == "auto" else name
                else:
                    refuse_other_writer(found, self.deepspeed(hidden_size=1))
                    manifest = read_manifest(found)
                    name = manifest["dtype"] if name == "auto" else name
                    if manifest["source"] != self.folder.fingerprint():
                        raise ValueError(
                            f"{found} was trained from another {self.folder.source}; delete {found.parent} to start anew"
                        )
        found, name = from_main((found, name))
        return found, getattr(torch, name)

    def read_text(self):
        """Training and held-out blocks; the main process tokenises, the others find its files."""
        for turn in (True, False):
            with share_errors():
                if is_main() == turn:
                    tokenizer = load_tokenizer(open_source(self.folder.source))
                    blocks = training_blocks(self.recipe.data, self.config, tokenizer, progress=self.shown)
                    size = self.config.block_size
                    held_out = held_out_blocks(self.recipe.data, size, tokenizer, progress=self.shown)
        return blocks, held_out

    def trial_batch(self, blocks: Dataset) -> dict[str, torch.Tensor]:
        """A micro-batch as the model takes it."""
        items = [blocks[i] for i in range(micro_batch(self.config, self.recipe.run))]
        return {name: value.to(self.device) for name, value in collate_with_teacher(items).items()}

    def calibrate(self, model: nn.Module, blocks: Dataset) -> dict:
        """The closed-form start, alike in every process, on blocks of the full length; what the record says of it."""
        last = range(len(blocks) - min(self.config.calibrate_blocks, len(blocks)), len(blocks))
        items = [item for item in map(blocks.__getitem__, last) if item["input_ids"].shape[1] == self.config.block_size]
        input_ids = torch.cat([item["input_ids"] for item in items])
        # documents are not told apart: far keys of all kinds are what is wanted
        position_ids = torch.cat([item["position_ids"] for item in items])[:, :1] + torch.arange(input_ids.shape[1])
        with share_errors():
            r2 = model.to(self.device).calibrate(input_ids.to(self.device), position_ids.to(self.device))
            return {"calibration_r2": r2}

    def write_model(self, model: nn.Module, text: TrainingBlocks, settings: dict | None) -> None:
        """Have the result appear, with its record."""
        values = gathered_parameters(model.student)
        with share_errors():
            if is_main():
                record = {
                    "teacher": public_name(self.recipe.source),
                    "data": text.facts(),
                    "config": asdict(self.config),
                    "tokens": self.config.total_tokens,
                    "device": self.device.type,
                    **writer(settings),
                    **self.trainer.tally.summary(),
                }
                with new_folder(self.folder.model) as new:
                    copy_with_parameters(self.folder.source, new, merged_state(model.student, values))
                    provenance = with_newest_code(new, read_provenance(self.folder.source))
                    write_provenance(new, add_stage(provenance, self.stage, **record))
