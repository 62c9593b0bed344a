"""Trainer callbacks (schedule, progress, metrics.jsonl, TensorBoard) and the handling of SIGINT and SIGTERM."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from dijiang.common.outputs import write_text_whole
from dijiang.common.progress import TokenProgress

from ..recipe.schema import RunConfig

AGAIN_SECONDS = 1.0  # a second Ctrl-C within this time is the same one, passed on by a launcher
SHOW_CURSOR = "\x1b[?25h"  # a running bar hides the cursor
ON_CONSOLE = ("loss", "kl", "ce", "answer_kl")


class FlowCallback(TrainerCallback):
    """
    Decides after each step whether to log, evaluate, save and stop.

    Args:
        run: how often.
        evaluates: whether there is held-out text.
        stop_wanted: says whether to save and stop after this step.
    """

    def __init__(self, run: RunConfig, evaluates: bool, stop_wanted: Callable[[], bool]):
        self.run = run
        self.evaluates = evaluates
        self.stop_wanted = stop_wanted

    def on_step_end(self, args, state, control, **kwargs):
        def due(every: int) -> bool:
            return state.global_step >= state.max_steps or (every > 0 and state.global_step % every == 0)

        control.should_log = due(self.run.log_every)
        control.should_evaluate = self.evaluates and due(self.run.evaluate_every)
        control.should_save = due(self.run.save_every)
        if self.stop_wanted():
            control.should_save = control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """
    Writes `metrics.jsonl`: one JSON object for each log, with its step, in order. A resumed run first drops the lines of steps
    that it repeats.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        lines = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= state.global_step:
                        lines.append(line + "\n")
                except ValueError:  # a killed run may leave half a line
                    continue
        write_text_whole(self.path, "".join(lines))

    def on_log(self, args, state, control, logs, **kwargs):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class TensorBoardLog(TrainerCallback):
    """Writes all metrics as TensorBoard scalars by step; those of steps that a resumed run repeats are purged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer = None

    def on_train_begin(self, args, state, control, **kwargs):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs, **kwargs):
        for name, value in logs.items():
            self.writer.add_scalar(name, value, state.global_step)
        self.writer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.writer.close()


class ConsoleProgress(TrainerCallback):
    """
    Shows a bar of the tokens and a line for each log, on stderr.

    Args:
        title: name of the stage.
        tokens_after: gives the tokens of a number of steps.
        last_loss: gives the loss of the step that just ended.
        shown: False for silence.
    """

    def __init__(self, title: str, tokens_after: Callable[[int], int], last_loss: Callable[[], float], shown: bool):
        self.title = title
        self.tokens_after = tokens_after
        self.last_loss = last_loss
        self.shown = shown
        self.bar = None

    def close(self) -> None:
        """End the bar; call it after an error too."""
        if self.bar is not None:
            self.bar.__exit__()

    def on_train_begin(self, args, state, control, **kwargs):
        done, total = self.tokens_after(state.global_step), self.tokens_after(state.max_steps)
        self.bar = TokenProgress(self.title, total, done=done, shown=self.shown, lines=False).__enter__()
        if done:
            self.bar.line(f"{self.title}: continuing at step {state.global_step:,} of {state.max_steps:,}")

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.bar.advance(self.tokens_after(step) - self.tokens_after(step - 1), loss=self.last_loss())

    def on_log(self, args, state, control, logs, **kwargs):
        if "eval_loss" in logs:
            perplexity, teacher = logs["eval_perplexity"], logs.get("eval_teacher_perplexity")
            text = f"held-out loss {logs['eval_loss']:.4f}, perplexity {perplexity:.3f}"
            text += f", {perplexity / teacher:.3f} times the teacher's {teacher:.3f}" if teacher else ""
            if "eval_recall" in logs:
                text += f", recall {logs['eval_recall']:.0%}"
                text += f" of answers, the teacher {logs['eval_teacher_recall']:.0%}" if "eval_teacher_recall" in logs else ""
        else:
            rates = [f"{value:.2e}" for name, value in logs.items() if name.startswith("learning_rate/")]
            losses = "".join(f"{name} {logs[name]:.4f}, " for name in ON_CONSOLE if name in logs)
            text = f"{logs['tokens']:,} tokens, {logs['tokens_per_second']:,.0f} tokens/s, {losses}"
            text += f"learning rate {' '.join(rates)}, {duration(logs['seconds_left'])} left"
        self.bar.line(f"{self.title}: step {state.global_step:,}/{state.max_steps:,}, {text}")


def duration(seconds: float) -> str:
    """A time as `1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StopSignals:
    """
    Notes SIGINT (Ctrl-C) and SIGTERM in `caught` instead of ending the process, so that a checkpoint can be written first. A
    second Ctrl-C ends it at once. A context manager; it does nothing outside the main thread, where Python handles no signals.
    """

    def __init__(self):
        self.caught = None
        self.before = {}
        self.time = 0.0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.caught is not None and now - self.time > AGAIN_SECONDS:
            if sys.stderr.isatty():
                sys.stderr.write(SHOW_CURSOR)
                sys.stderr.flush()
            os._exit(128 + signal.SIGINT)
        if self.caught is None:
            self.caught = number
            self.time = now
