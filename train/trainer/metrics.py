"""Running sums of what a stage measures, which a resumed run takes up where its checkpoint left them."""

import time
from collections.abc import Callable


class Tally:
    """
    Args:
        steps: of the whole stage.

    Attributes:
        facts: what the stage's record is to say besides, such as the calibration's fit.
    """

    def __init__(self, steps: int):
        self.steps, self.facts = steps, {}
        self.window, self.window_steps = {}, 0
        self.first_loss = self.last_loss = 0.0  # sums over the first and the last tenth of the steps
        self.seconds_before, self.session_steps, self.logged_steps = 0.0, 0, 0
        self.started = self.logged = time.perf_counter()

    @property
    def ends(self) -> int:
        """How many steps the first and the last tenth are."""
        return max(1, self.steps // 10)

    @property
    def seconds(self) -> float:
        """Of training, over all sessions."""
        return self.seconds_before + time.perf_counter() - self.started

    def add(self, step: int, means: dict[str, float]) -> None:
        """Take in the measures of step 1 .. steps."""
        for name, value in means.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        self.session_steps += 1
        if step <= self.ends:
            self.first_loss += means["loss"]
        if step > self.steps - self.ends:
            self.last_loss += means["loss"]

    def take_window(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: value / self.window_steps for name, value in self.window.items()}
        self.window, self.window_steps = {}, 0
        return means

    def speed(self, step: int, tokens_after: Callable[[int], int]) -> dict[str, float]:
        """
        Tokens/s since the last call, and the seconds left by this session's mean, after `step` steps of which
        `tokens_after(step)` are the tokens.
        """
        now = time.perf_counter()
        seen, begun = tokens_after(step), tokens_after(step - self.session_steps)
        since = seen - tokens_after(step - self.session_steps + self.logged_steps)
        rate = since / (now - self.logged)
        self.logged, self.logged_steps = now, self.session_steps
        return {
            "tokens_per_second": rate,
            "seconds_left": (tokens_after(self.steps) - seen) * (now - self.started) / (seen - begun),
        }

    def summary(self) -> dict:
        """What the record says of a stage that is complete."""
        return {
            "seconds": round(self.seconds, 1),
            "loss_first": self.first_loss / self.ends,
            "loss_last": self.last_loss / self.ends,
            **self.facts,
        }

    def state(self) -> dict:
        """All of it, as JSON takes it."""
        names = ("facts", "window", "window_steps", "first_loss", "last_loss")
        return {name: getattr(self, name) for name in names} | {"seconds_before": self.seconds}

    @classmethod
    def from_state(cls, steps: int, state: dict) -> "Tally":
        tally = cls(steps)
        for name, value in state.items():
            setattr(tally, name, value)
        return tally
