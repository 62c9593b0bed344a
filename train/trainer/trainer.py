"""The training loop of both stages: transformers' Trainer, doing the same in each step on any number of processes."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..recipe.schema import RunConfig, StageConfig
from ..stages.base import next_token_labels
from .callbacks import ConsoleProgress, FlowCallback, MetricsFile, TensorBoardLog
from .checkpoints import Checkpoints
from .distributed import accumulation, gather, is_main, micro_batch, rank, sum_over_processes, world_size
from .library_hooks import refuse_renamed_hooks
from .metrics import Tally
from .optimizer import adamw, learning_rate_factor
from .saving import SavingTrainer, read_tally


class RecoveryTrainer(SavingTrainer):
    """
    Trains a recovery model: `model(**batch)` returns {"loss": mean over the batch's tokens, measures...} when training and
    {"loss": mean next-token cross-entropy} when evaluating; `model.parameter_groups()` yields {"name", "params", "lr"}. If
    `model.teacher` is there and not None, `model.teacher_text_loss(input_ids, position_ids)` gives its cross-entropy.

    Args:
        model: on its device already, unless DeepSpeed is to place it.
        stage, run: their settings.
        blocks: dataset of stage.steps * stage.batch_size items, trained on in order. Items have "places".
        held_out: dataset of items to evaluate on, or None.
        collate: makes a batch of a list of items.
        folder: of the stage; checkpoints, logs and metrics.jsonl are written below it.
        device: `cpu` or `cuda`.
        title: for the progress bar.
        deepspeed: DeepSpeed's settings, or None.
        stop_wanted: asked in each step; once it is true on any process, all save a checkpoint and stop.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: if the batch cannot be dealt out evenly, or a tracker is unknown or not installed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stage: StageConfig,
        run: RunConfig,
        *,
        blocks: Dataset,
        held_out: Dataset | None,
        collate: Callable,
        folder: Path,
        device: torch.device,
        title: str,
        deepspeed: dict | None = None,
        stop_wanted: Callable[[], bool] = lambda: False,
        progress: bool = True,
    ):
        refuse_renamed_hooks()
        self.stage, self.stop_wanted, self.stopping = stage, stop_wanted, False
        self.groups = [group for group in model.parameter_groups() if group["params"]]
        self.takes = set(inspect.signature(model.forward).parameters)
        self.teacher_loss = model.teacher_text_loss if getattr(model, "teacher", None) is not None else None
        self.teacher_perplexity: float | None = None
        self.tally, self.micro_batches, self.last_loss = Tally(stage.steps), [], math.nan
        self.checkpoints = Checkpoints(folder / "checkpoints", run.keep_checkpoints)
        args = TrainingArguments(
            output_dir=str(self.checkpoints.folder),
            per_device_train_batch_size=micro_batch(stage, run),
            gradient_accumulation_steps=accumulation(stage, run),
            max_steps=stage.steps,
            max_grad_norm=stage.clip,
            seed=stage.seed,
            use_cpu=device.type == "cpu",
            deepspeed=deepspeed,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=device.type != "cpu",
            remove_unused_columns=False,
            average_tokens_across_devices=False,
            logging_nan_inf_filter=False,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=other_trackers(run.report_to),
            disable_tqdm=True,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU
        super().__init__(model, args, data_collator=collate, train_dataset=blocks, eval_dataset=held_out)
        self.model_accepts_loss_kwargs = False  # losses are means, which Trainer divides by the micro-batches of a step
        self.remove_callback(PrinterCallback)
        self.add_callback(FlowCallback(run, held_out is not None, lambda: self.stopping))
        self.console = ConsoleProgress(title, stage.tokens_after, lambda: self.last_loss, progress and is_main())
        if is_main():
            self.add_callback(self.console)
            self.add_callback(MetricsFile(folder / "metrics.jsonl"))
            if "tensorboard" in run.report_to:
                self.add_callback(TensorBoardLog(folder / "logs"))

    def run(self, checkpoint: Path | None) -> bool:
        """
        Train to the end, from `checkpoint` on if one is given; False if the run was stopped before.

        Raises:
            ValueError: if the loss or the weights stop being finite. No checkpoint is written from then on.
        """
        if checkpoint is not None:
            self.tally = read_tally(checkpoint, self.stage.steps)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.console.close()
        return self.state.global_step == self.stage.steps

    # --- what the optimiser does ---

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(self.groups, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LambdaLR:
        """The stage's schedule, on every group's own peak."""
        if self.lr_scheduler is None:
            factor = lambda step: learning_rate_factor(step, self.stage)  # noqa: E731
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    # --- the loss, and what is kept of it ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """The micro-batch's loss. With a step's last one, all processes agree whether it is finite and whether to stop."""
        outputs = model(**{name: value for name, value in inputs.items() if name in self.takes})
        values = {name: value.detach() for name, value in outputs.items()}
        self.micro_batches.append((inputs["places"], values))
        if self.accelerator.sync_gradients:
            self.finish_loss()
        return outputs["loss"]

    def finish_loss(self) -> None:
        """Take the step's means over all micro-batches and processes, or raise ValueError if the loss is not finite."""
        names = list(self.micro_batches[0][1])
        values = torch.stack([torch.stack([found[name].double() for name in names]) for _, found in self.micro_batches])
        flag = values.new_tensor([float(self.stop_wanted())])
        share = values.sum(0) / (len(self.micro_batches) * world_size())
        stop, *means = sum_over_processes(torch.cat([flag, share])).tolist()
        means = dict(zip(names, means, strict=True))
        step = self.state.global_step + 1
        if not math.isfinite(means["loss"]):
            bad = [places.tolist() for places, found in self.micro_batches if not torch.isfinite(found["loss"])]
            bad = sorted(place for found in gather(bad) for places in found for place in places)
            raise ValueError(
                f"the loss is {means['loss']} at step {step}, in blocks {', '.join(map(str, bad))}; lower the learning rates "
                "(and name another output), or look at the text. Checkpoints before it are left"
            )
        self.tally.add(step, means)
        self.last_loss = means["loss"]
        self.micro_batches.clear()
        self.stopping = stop > 0

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs) -> None:
        # DeepSpeed leaves such a step out unsaid
        skipped = self.accelerator.optimizer_step_was_skipped
        if skipped or (grad_norm is not None and not math.isfinite(grad_norm)):
            raise ValueError(self.not_finite("the gradient"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def not_finite(self, what: str) -> str:
        step, size = self.state.global_step, self.stage.batch_size
        blocks = f"blocks {(step - 1) * size} to {step * size - 1}"
        return f"{what} is not finite at step {step}, {blocks}; lower the learning rates and name another output"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand on a log: of training with the means since the last one, or of an evaluation."""
        if "train_runtime" in logs:  # the summary at the end repeats what was logged
            return
        if "loss" in logs:
            step = self.state.global_step
            factor = learning_rate_factor(step - 1, self.stage)
            speed = self.tally.speed(step, self.stage.tokens_after)
            logs = {
                **self.tally.take_window(),
                **{name: value for name, value in logs.items() if name == "grad_norm"},
                **{f"learning_rate/{group['name']}": group["lr"] * factor for group in self.groups},
                "tokens": self.stage.tokens_after(step),
                **speed,
            }
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """
        Mean loss per held-out token and the perplexity, beside the teacher's; the same for any number of processes. Arguments
        are the library's, and not looked at.
        """
        loss = self.held_out_loss(lambda batch: self.model(**batch)["loss"])
        if not math.isfinite(loss):
            raise ValueError(self.not_finite("the held-out loss"))
        found = {"held_out_perplexity": math.exp(min(loss, 700.0))}
        logs = {"tokens": self.stage.tokens_after(self.state.global_step), "eval_loss": loss}
        logs["eval_perplexity"] = found["held_out_perplexity"]
        if self.teacher_loss is not None:
            if self.teacher_perplexity is None:  # once: neither it nor the text changes in a session
                loss = self.held_out_loss(lambda batch: self.teacher_loss(batch["input_ids"], batch.get("position_ids")))
                if not math.isfinite(loss):
                    raise ValueError(f"the teacher's loss on the held-out text is {loss}; check the source and run.dtype")
                self.teacher_perplexity = math.exp(min(loss, 700.0))
            logs["eval_teacher_perplexity"] = found["teacher_perplexity"] = self.teacher_perplexity
        self.tally.facts |= found
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    @torch.no_grad()
    def held_out_loss(self, loss_of: Callable[[dict], torch.Tensor]) -> float:
        """`loss_of` one block at a time, each weighed by the tokens that it predicts."""
        count, processes = len(self.eval_dataset), world_size()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for first in range(0, count, processes):  # all take part in each round: ZeRO-3 gathers weights in it
            item = self.eval_dataset[min(first + rank(), count - 1)]
            batch = self._prepare_inputs(self.data_collator([item]))
            loss = loss_of({name: value for name, value in batch.items() if name in self.takes}).double()
            if first + rank() < count:
                labels = next_token_labels(batch["input_ids"], batch.get("position_ids"))
                tokens = (labels != -100).sum()
                total += torch.stack((loss * tokens, tokens.double()))
        loss, tokens = sum_over_processes(total).tolist()
        return loss / max(tokens, 1.0)


def other_trackers(names: list[str]) -> list[str]:
    """
    Those of `names` that transformers reports to.

    Raises:
        ValueError: if one of all is unknown, or its package is not installed.
    """
    for name in names:
        if name != "tensorboard" and name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to names {name!r}, which is unknown; choose from {known}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to names {name!r}, which is not installed; pip install {name}, or leave it out")
    return [name for name in names if name != "tensorboard"]
