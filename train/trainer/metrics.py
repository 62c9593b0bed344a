"""Running sums of what a stage measures, and its record; a resumed run continues both from its checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

NOT_RECORDED: Any = object()  # unlike None, which is a value


@dataclass(kw_only=True)
class StageRecord:
    """
    Facts about a stage, besides its losses, for checkpoints and provenance.json. They leave out fields that nothing has set.

    Attributes:
        dtype: of computations and frozen weights.
        source: fingerprint of the checkpoint that the stage starts from.
        text: fingerprint of the training text.
        calibration_r2: fit of the closed-form start; None if nothing was fitted, because no layer has a window.
        compiled: whether torch.compile is used.
        held_out_perplexity: the student's, at the last evaluation.
        teacher_perplexity: the teacher's on the same text.
        held_out_recall: share of the answers of held-out samples that the student gives, at the last evaluation.
        teacher_recall: the teacher's.
    """

    dtype: str = NOT_RECORDED
    source: str = NOT_RECORDED
    text: str = NOT_RECORDED
    calibration_r2: float | None = NOT_RECORDED
    compiled: bool = NOT_RECORDED
    held_out_perplexity: float = NOT_RECORDED
    teacher_perplexity: float = NOT_RECORDED
    held_out_recall: float = NOT_RECORDED
    teacher_recall: float = NOT_RECORDED

    def to_json(self) -> dict[str, Any]:
        """The fields that were set, by name."""
        return {name: value for name, value in vars(self).items() if value is not NOT_RECORDED}


class StageMetrics:
    """
    Sums of each step's metrics, the time they took, and the stage's record.

    Args:
        steps: of the whole stage.
        record: what is known before the first step.
    """

    def __init__(self, steps: int, record: StageRecord):
        self.steps = steps
        self.record = record
        self.window: dict[str, float] = {}
        self.window_steps = 0
        self.first_loss = 0.0  # sum over the first tenth of the steps
        self.last_loss = 0.0  # sum over the last tenth
        self.seconds_before = 0.0
        self.session_steps = 0
        self.logged_steps = 0
        self.started = self.logged = time.perf_counter()

    @property
    def tenth(self) -> int:
        """Number of steps in the first and in the last tenth."""
        return max(1, self.steps // 10)

    @property
    def seconds(self) -> float:
        """Training time of all sessions."""
        return self.seconds_before + time.perf_counter() - self.started

    def add(self, step: int, means: dict[str, float]) -> None:
        """Add the metrics of `step`, counted from 1; `loss` is one of them."""
        for name, value in means.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        self.session_steps += 1
        if step <= self.tenth:
            self.first_loss += means["loss"]
        if step > self.steps - self.tenth:
            self.last_loss += means["loss"]

    def take_window(self) -> dict[str, float]:
        """Means since the last call; of answers those over their own tokens, left out where there were none."""
        means = {name: value / self.window_steps for name, value in self.window.items()}
        share = means.pop("answer_share", None)
        if share is not None:
            sums = {name: means.pop(name) for name in list(means) if name.startswith("answer_")}
            means |= {name: value / share for name, value in sums.items()} if share else {}
        self.window = {}
        self.window_steps = 0
        return means

    def speed(self, step: int, tokens_after: Callable[[int], int]) -> dict[str, float]:
        """Tokens per second since the last call, and seconds left at this session's mean speed, when `step` steps are done."""
        now = time.perf_counter()
        done = tokens_after(step)
        done_before = tokens_after(step - self.session_steps)
        done_at_log = tokens_after(step - self.session_steps + self.logged_steps)
        rate = (done - done_at_log) / (now - self.logged)
        self.logged = now
        self.logged_steps = self.session_steps
        return {
            "tokens_per_second": rate,
            "seconds_left": (tokens_after(self.steps) - done) * (now - self.started) / (done - done_before),
        }

    def summary(self) -> dict[str, Any]:
        """The entries of provenance.json on a stage that is complete."""
        return {
            "seconds": round(self.seconds, 1),
            "loss_first": self.first_loss / self.tenth,
            "loss_last": self.last_loss / self.tenth,
            **self.record.to_json(),
        }

    def state(self) -> dict[str, Any]:
        """The values that a resumed run needs, for JSON."""
        names = ("window", "window_steps", "first_loss", "last_loss")
        sums = {name: getattr(self, name) for name in names}
        return {"facts": self.record.to_json(), **sums, "seconds_before": self.seconds}

    @classmethod
    def from_state(cls, steps: int, state: dict[str, Any]) -> Self:
        """The metrics as `state` described them."""
        metrics = cls(steps, StageRecord(**state.pop("facts")))
        vars(metrics).update(state)
        return metrics
