"""The training loop of both stages: transformers' Trainer, doing the same in each step on any number of processes."""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dijiang.common.errors import unknown
from dijiang.common.perplexity import perplexity_of

from ..recipe.schema import RunConfig, StageConfig
from ..stages.base import next_token_labels
from ..stages.teacher_logits import collate_with_teacher
from .callbacks import ConsoleProgress, FlowCallback, MetricsFile, TensorBoardLog
from .checkpoints import Checkpoints
from .distributed import accumulation, gather, is_main, micro_batch, rank, sum_over_processes, world_size
from .library_hooks import refuse_renamed_hooks
from .metrics import StageMetrics, StageRecord
from .optimizer import adamw, learning_rate_factor
from .saving import METRICS, SCHEDULE, CheckpointWriter


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """
    The settings and data of a training loop.

    Attributes:
        stage: settings of the stage.
        run: settings of how it runs.
        blocks: dataset of stage.steps * stage.batch_size items with "sample_index", trained on in order.
        held_out: items to evaluate on, or None.
        held_out_recall: items with `answers` to measure recall on besides.
        folder: of the stage; checkpoints, logs and metrics.jsonl are written into it.
        device: `cpu` or `cuda`.
        title: for the progress bar.
        deepspeed: DeepSpeed's settings, or None.
        record: what is known of the stage before the first step.
        stop_wanted: asked in each step; once it is true on any process, all save a checkpoint and stop.
        progress: show a progress bar on stderr.
    """

    stage: StageConfig
    run: RunConfig
    blocks: Dataset
    held_out: Sequence[dict[str, torch.Tensor]] | None
    held_out_recall: Sequence[dict[str, torch.Tensor]] = ()
    folder: Path
    device: torch.device
    title: str
    deepspeed: dict | None = None
    record: StageRecord = field(default_factory=StageRecord)
    stop_wanted: Callable[[], bool] = lambda: False
    progress: bool = True


class RecoveryTrainer(Trainer):
    """
    Trains a recovery model: `model(**batch)` returns {"loss": mean over the batch's tokens, other metrics...} when training
    and, when evaluating, {"loss": mean next-token cross-entropy} or, for batches with `answers`, {"right", "asked"}: how many
    of them it gives. `model.parameter_groups()` yields {"name", "params", "lr"}. If `model.teacher` is there and not None,
    `model.teacher_measured(**batch)` gives the same of the teacher.

    Args:
        model: on its device already, unless DeepSpeed is to place it.
        job: everything else.

    Raises:
        ValueError: if the batch cannot be dealt out evenly, or a tracker is unknown or not installed.
    """

    def __init__(self, model: torch.nn.Module, job: TrainingJob):
        refuse_renamed_hooks()
        self.job = job
        self.stage = job.stage
        self.groups = [group for group in model.parameter_groups() if group["params"]]
        self.takes = set(inspect.signature(model.forward).parameters)
        self.teacher_measured = model.teacher_measured if getattr(model, "teacher", None) is not None else None
        self.of_teacher: dict[str, float] = {}  # its perplexity and recall, which do not change in a session
        self.metrics = StageMetrics(job.stage.steps, job.record)
        self.micro_batches: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []  # of the step: sample indices and metrics
        self.last_loss = math.nan
        self.stopping = False
        self.checkpoints = Checkpoints(job.folder / "checkpoints", job.run.keep_checkpoints)
        self.writer = CheckpointWriter(self.checkpoints, model, job.deepspeed)
        data = {"data_collator": collate_with_teacher, "train_dataset": job.blocks, "eval_dataset": job.held_out}
        super().__init__(model, training_arguments(job, self.checkpoints.folder), **data)
        self.model_accepts_loss_kwargs = False  # losses are means, which Trainer divides by the micro-batches of a step
        self.remove_callback(PrinterCallback)
        self.add_callback(FlowCallback(job.run, job.held_out is not None, lambda: self.stopping))
        self.console = ConsoleProgress(job.title, job.stage.tokens_after, lambda: self.last_loss, job.progress and is_main())
        if is_main():
            self.add_callback(self.console)
            self.add_callback(MetricsFile(job.folder / "metrics.jsonl"))
            if "tensorboard" in job.run.report_to:
                self.add_callback(TensorBoardLog(job.folder / "logs"))

    def run(self, checkpoint: Path | None) -> bool:
        """
        Train to the end, from `checkpoint` on if there is one; return False if the run was stopped before.

        Raises:
            ValueError: if the loss or the weights stop being finite. No checkpoint is written from then on.
        """
        if checkpoint is not None:
            state = json.loads((checkpoint / METRICS).read_text(encoding="utf-8"))
            self.metrics = StageMetrics.from_state(self.stage.steps, state)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.console.close()
        return self.state.global_step == self.stage.steps

    # --- optimizer ---

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(self.groups, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LambdaLR:
        """The stage's schedule, applied to the peak of each group."""
        if self.lr_scheduler is None:
            factor = lambda step: learning_rate_factor(step, self.stage)  # noqa: E731
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- loss and metrics ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """Loss of a micro-batch. At the last one of a step, all processes agree if the loss is finite and whether to stop."""
        outputs = model(**{name: value for name, value in inputs.items() if name in self.takes})
        values = {name: value.detach() for name, value in outputs.items()}
        self.micro_batches.append((inputs["sample_indices"], values))
        if self.accelerator.sync_gradients:
            self.finish_loss()
        return outputs["loss"]

    def finish_loss(self) -> None:
        """Add the step's means over all micro-batches and processes; ValueError if the loss is not finite."""
        names = list(self.micro_batches[0][1])
        values = torch.stack([torch.stack([metrics[name].double() for name in names]) for _, metrics in self.micro_batches])
        flag = values.new_tensor([float(self.job.stop_wanted())])
        share = values.sum(0) / (len(self.micro_batches) * world_size())
        stop, *means = sum_over_processes(torch.cat([flag, share])).tolist()
        means = dict(zip(names, means, strict=True))
        step = self.state.global_step + 1
        if not math.isfinite(means["loss"]):
            broken = [indices.tolist() for indices, metrics in self.micro_batches if not metrics["loss"].isfinite()]
            indices = sorted(index for batches in gather(broken) for batch in batches for index in batch)
            raise ValueError(
                f"the loss is {means['loss']} at step {step}, in blocks {', '.join(map(str, indices))}; lower the learning "
                "rates (and name another output), or look at the text. Checkpoints before it are left"
            )
        self.metrics.add(step, means)
        self.last_loss = means["loss"]
        self.micro_batches.clear()
        self.stopping = stop > 0

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs) -> None:
        # DeepSpeed silently skips a step whose gradient is not finite
        skipped = self.accelerator.optimizer_step_was_skipped
        if skipped or (grad_norm is not None and not math.isfinite(grad_norm)):
            raise ValueError(self.not_finite("the gradient"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def not_finite(self, what: str) -> str:
        """The message that ends a run whose numbers are not finite."""
        step = self.state.global_step
        size = self.stage.batch_size
        blocks = f"blocks {(step - 1) * size} to {step * size - 1}"
        return f"{what} is not finite at step {step}, {blocks}; lower the learning rates and name another output"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass a log to the callbacks: one of training, with the means since the last one, or one of an evaluation."""
        if "train_runtime" in logs:  # the summary at the end repeats what was logged
            return
        if "loss" in logs:
            step = self.state.global_step
            factor = learning_rate_factor(step - 1, self.stage)
            speed = self.metrics.speed(step, self.stage.tokens_after)
            logs = {
                **self.metrics.take_window(),
                **{name: value for name, value in logs.items() if name == "grad_norm"},
                **{f"learning_rate/{group['name']}": group["lr"] * factor for group in self.groups},
                "tokens": self.stage.tokens_after(step),
                **speed,
            }
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # --- held-out text ---

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """
        Measure the mean loss per held-out token and the perplexity, recall if there are samples of it, and the teacher's on
        the same; equal for any number of processes. The arguments are Trainer's and have no effect.
        """
        loss = self.held_out_mean(self.eval_dataset, self.model)
        if not math.isfinite(loss):
            raise ValueError(self.not_finite("the held-out loss"))
        record, recall = self.metrics.record, self.job.held_out_recall
        record.held_out_perplexity = perplexity_of(loss)
        logs = {"tokens": self.stage.tokens_after(self.state.global_step), "eval_loss": loss}
        logs["eval_perplexity"] = record.held_out_perplexity
        if recall:
            logs["eval_recall"] = record.held_out_recall = self.held_out_mean(recall, self.model)
        if self.teacher_measured is not None:
            if not self.of_teacher:
                loss = self.held_out_mean(self.eval_dataset, self.teacher_measured)
                if not math.isfinite(loss):
                    raise ValueError(f"the teacher's loss on the held-out text is {loss}; check the source and run.dtype")
                self.of_teacher["perplexity"] = perplexity_of(loss)
                if recall:
                    self.of_teacher["recall"] = self.held_out_mean(recall, self.teacher_measured)
            logs["eval_teacher_perplexity"] = record.teacher_perplexity = self.of_teacher["perplexity"]
            if recall:
                logs["eval_teacher_recall"] = record.teacher_recall = self.of_teacher["recall"]
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    @torch.no_grad()
    def held_out_mean(
        self, items: Sequence[dict[str, torch.Tensor]], measure: Callable[..., dict[str, torch.Tensor]]
    ) -> float:
        """
        Mean of the loss that `measure` finds in single items, each weighted by the number of tokens that it predicts; or the
        share of their answers that are right.
        """
        count = len(items)
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for first in range(0, count, world_size()):  # all processes join each round, because ZeRO-3 gathers weights in it
            batch = self._prepare_inputs(self.data_collator([items[min(first + rank(), count - 1)]]))
            found = measure(**{name: batch[name] for name in ("input_ids", "position_ids", "answers") if name in batch})
            if first + rank() < count:
                if "asked" in found:
                    total += torch.stack((found["right"], found["asked"]))
                    continue
                labels = next_token_labels(batch["input_ids"], batch.get("position_ids"))
                tokens = (labels != -100).sum()
                total += torch.stack((found["loss"].double() * tokens, tokens.double()))
        loss, tokens = sum_over_processes(total).tolist()
        return loss / max(tokens, 1.0)

    # --- checkpoints ---

    def _get_output_dir(self, trial=None) -> str:
        return str(self.writer.partial or self.args.output_dir)

    def _save_checkpoint(self, model, trial=None) -> None:
        if not self.writer.weights_are_finite():
            raise ValueError(self.not_finite("a weight"))
        with self.writer.writing(self.state.global_step, self.metrics):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        self.writer.save_weights(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.writer.load_weights(Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        resumed = None if self.is_deepspeed_enabled else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resumed)
        engine = type(self.model_wrapped).__name__ == "DeepSpeedEngine"
        if engine != (self.args.deepspeed is not None) or self.args.world_size != world_size():
            raise RuntimeError(
                f"the launcher started {world_size()} processes, Trainer sees {self.args.world_size}; "
                f"DeepSpeed is {'active' if engine else 'not active'}; launch with torchrun or deepspeed"
            )
        if engine and resume_from_checkpoint is not None:
            # not strict, because checkpoints hold no frozen weights
            loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise ValueError(f"DeepSpeed finds nothing to load in {resume_from_checkpoint}; delete it")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared


def training_arguments(job: TrainingJob, folder: Path) -> TrainingArguments:
    """Trainer's settings; it writes checkpoints into `folder`, at the steps that FlowCallback names."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch(job.stage, job.run),
        gradient_accumulation_steps=accumulation(job.stage, job.run),
        max_steps=job.stage.steps,
        max_grad_norm=job.stage.clip,
        seed=job.stage.seed,
        use_cpu=job.device.type == "cpu",
        deepspeed=job.deepspeed,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=job.device.type != "cpu",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=library_trackers(job.run.report_to),
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # each process uses one GPU
    return arguments


def library_trackers(names: list[str]) -> list[str]:
    """
    The experiment trackers among `names` that transformers reports to; TensorBoard has a callback of ours.

    Raises:
        ValueError: if a tracker is unknown, or its package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("report_to", name, sorted(INTEGRATION_TO_CALLBACK))
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to names {name!r}, which is not installed; pip install {name}, or leave it out")
    return [name for name in names if name != "tensorboard"]
