"""Runs the stages of a recipe, each from a checkpoint to a checkpoint, and continues where a run was ended."""

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from dijiang.checkpoint.code_files import with_newest_code
from dijiang.checkpoint.patch_weights import copy_with_parameters
from dijiang.checkpoint.provenance import add_stage, public_name, read_provenance, write_provenance
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.common.device import dtype_name, dtype_named, fastest_dtype
from dijiang.common.errors import print_line
from dijiang.common.outputs import new_folder

from ..data.blocks import TrainingBlocks, held_out_blocks, training_blocks
from ..data.recall_sequences import held_out_recall
from ..recipe.schema import Recipe, RunConfig
from ..trainer.callbacks import StopSignals
from ..trainer.checkpoints import Checkpoints, read_manifest
from ..trainer.distributed import (
    deepspeed_settings,
    forget_deepspeed,
    from_main,
    is_main,
    micro_batch,
    prepare_process,
    rank,
    share_errors,
)
from ..trainer.metrics import StageMetrics, StageRecord
from ..trainer.saving import refuse_other_writer, writer
from ..trainer.trainer import RecoveryTrainer, TrainingJob, library_trackers
from .adapters import merged_state
from .build import build_model, gathered_parameters
from .compiled import compile_model, wants_compilation
from .job_folder import StageFolder
from .teacher_logits import collate_with_teacher

TITLES = {"align": "Aligning", "distill": "Distilling"}


def recover(recipe: Recipe, *, progress: bool = True) -> Path:
    """
    Convert the source and run every stage of `recipe` that is not complete yet. See `run_stage`.

    Returns:
        The last stage's model: a folder as `dijiang.convert_model` writes.
    """
    for stage in recipe.stages:
        folder = run_stage(recipe, stage, progress=progress)
    return folder


def run_stage(recipe: Recipe, stage: str, *, progress: bool = True) -> Path:
    """
    Run one stage of `recipe`, from its newest checkpoint on if there is one, and convert the source first if necessary.
    Trained weights are written in the dtype that the checkpoint stores them in, so those stored in bfloat16 are rounded.

    Args:
        recipe: of the whole job.
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
    folder = StageFolder(recipe, stage)
    if folder.model.exists():
        folder.refuse_other_recipe()
        if is_main():
            print_line(f"{folder.model} is already complete")
        return folder.model
    shown = progress and is_main()
    with ExitStack() as stack:
        device = stack.enter_context(training_process(recipe.run))
        with share_errors():
            micro_batch(folder.config, recipe.run)
            library_trackers(recipe.run.report_to)
            deepspeed_settings(folder.config, recipe.run, hidden_size=1)
            if is_main():
                stack.enter_context(folder.lock())
                folder.prepare(shown)
        with share_errors():
            if not folder.recipe_file.is_file():
                raise ValueError(f"process {rank()} does not see {folder.path}; all must share the output's disk")
        train_stage(folder, device, shown)
    return folder.model


@contextmanager
def training_process(run: RunConfig) -> Iterator[torch.device]:
    """Prepare this process for training and yield its device; afterwards free memory and undo global settings."""
    device = prepare_process(run)
    precision = torch.get_float32_matmul_precision()
    try:
        yield device
    finally:
        forget_deepspeed()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.set_float32_matmul_precision(precision)


def train_stage(folder: StageFolder, device: torch.device, progress: bool) -> None:
    """Train the stage to its end and write its model; all processes do this together."""
    run = folder.recipe.run
    config = folder.config
    checkpoint, dtype = pick_checkpoint(folder, device)
    text, held_out, recall_items = read_text(folder, progress)
    record = StageRecord(dtype=dtype_name(dtype), source=folder.fingerprint(), text=text.fingerprint())
    if checkpoint is not None and read_manifest(checkpoint).get("text") not in (None, record.text):
        raise ValueError(f"the training text is not the one that {checkpoint} was trained on; name another output")
    # models come before TrainingArguments, which under ZeRO-3 would have them loaded in parts
    model, blocks = build_model(folder, text, device=device, dtype=dtype, progress=progress)
    if device.type == "cuda" and dtype == torch.bfloat16:
        # sums of bfloat16 products are float32; products of those may use TF32, which keeps more digits than bfloat16
        torch.set_float32_matmul_precision("high")
    deepspeed = deepspeed_settings(config, run, model.student.config.hidden_size)
    if checkpoint is None and folder.stage == "align" and config.calibrate_blocks:
        record.calibration_r2 = calibrate(model, blocks, device)
    if wants_compilation(folder.recipe, folder.stage, device):
        items = [blocks[i] for i in range(micro_batch(config, run))]
        batch = {name: value.to(device) for name, value in collate_with_teacher(items).items()}
        record.compiled = compile_model(model.to(device), batch)
    with StopSignals() as signals:
        deadline = time.monotonic() + 60 * (run.max_minutes or float("inf"))
        job = TrainingJob(
            stage=config,
            run=run,
            blocks=blocks,
            held_out=held_out,
            held_out_recall=recall_items,
            folder=folder.path,
            device=device,
            title=TITLES[folder.stage],
            deepspeed=deepspeed,
            record=record,
            stop_wanted=lambda: signals.caught is not None or time.monotonic() > deadline,
            progress=progress,
        )
        trainer = RecoveryTrainer(model, job)
        if not trainer.run(checkpoint):
            raise KeyboardInterrupt(
                f"{folder.stage} was stopped after step {trainer.state.global_step} of {config.steps}, with a checkpoint; run "
                "the same command again to continue"
            )
    write_model(folder, model, text, trainer.metrics, {"device": device.type} | writer(deepspeed))


def pick_checkpoint(folder: StageFolder, device: torch.device) -> tuple[Path | None, torch.dtype]:
    """The checkpoint to resume from, if any, and the dtype of computations, the same in all processes and resumed runs."""
    run = folder.recipe.run
    checkpoint, dtype = None, run.dtype
    with share_errors():
        if is_main():
            checkpoints = Checkpoints(folder.path / "checkpoints", run.keep_checkpoints)
            checkpoints.clean()
            checkpoint = checkpoints.newest()
            if checkpoint is None:
                folder.refuse_other_lineage()
                dtype = dtype_name(fastest_dtype(device)) if dtype == "auto" else dtype
            else:
                refuse_other_writer(checkpoint, deepspeed_settings(folder.config, run, hidden_size=1))
                manifest = read_manifest(checkpoint)
                dtype = manifest["dtype"] if dtype == "auto" else dtype
                if manifest["source"] != folder.fingerprint():
                    raise ValueError(
                        f"{checkpoint} was trained from another {folder.source}; delete {checkpoint.parent} to start again"
                    )
    checkpoint, dtype = from_main((checkpoint, dtype))
    return checkpoint, dtype_named(dtype)


def read_text(folder: StageFolder, progress: bool) -> tuple[TrainingBlocks, list | None, list]:
    """Training and held-out blocks, and held-out samples; the main process tokenizes first, then the others read its files."""
    data, size = folder.recipe.data, folder.config.block_size
    samples: list[dict[str, torch.Tensor]] = []
    for main_reads in (True, False):
        with share_errors():
            if is_main() == main_reads:
                tokenizer = load_tokenizer(open_source(folder.source))
                blocks = training_blocks(data, folder.config, tokenizer, progress=progress)
                held_out = held_out_blocks(data, size, tokenizer, progress=progress)
                if held_out and data.recall and data.recall.held_out_samples:
                    held_text = torch.cat([item["input_ids"][0] for item in held_out])
                    samples = held_out_recall(data.recall, held_text, size, tokenizer)
    return blocks, held_out, samples


def calibrate(model: nn.Module, blocks: Dataset, device: torch.device) -> float | None:
    """Give the model its closed-form start, the same in every process, on blocks of the full length; its R^2."""
    config = model.stage
    last = range(len(blocks) - min(config.calibrate_blocks, len(blocks)), len(blocks))
    items = [item for item in map(blocks.__getitem__, last) if item["input_ids"].shape[1] == config.block_size]
    input_ids = torch.cat([item["input_ids"] for item in items])
    # documents are joined, because keys of all kinds beyond the window are needed
    position_ids = torch.cat([item["position_ids"] for item in items])[:, :1] + torch.arange(input_ids.shape[1])
    with share_errors():
        return model.to(device).calibrate(input_ids.to(device), position_ids.to(device))


def write_model(folder: StageFolder, model: nn.Module, text: TrainingBlocks, metrics: StageMetrics, process: dict) -> None:
    """Write the trained model and its provenance, whole or not at all; `process` says what trained it."""
    values = gathered_parameters(model.student)
    with share_errors():
        if is_main():
            record = {
                "teacher": public_name(folder.recipe.source),
                "data": text.facts(),
                "config": asdict(folder.config),
                "tokens": folder.config.total_tokens,
                **process,
                **metrics.summary(),
            }
            with new_folder(folder.model) as new:
                copy_with_parameters(folder.source, new, merged_state(model.student, values))
                provenance = with_newest_code(new, read_provenance(folder.source))
                write_provenance(new, add_stage(provenance, folder.stage, **record))
