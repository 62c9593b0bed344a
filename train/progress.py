"""A progress bar for token budgets."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0


class TokenProgress:
    """
    Tokens done, tokens/s, loss and time left, on stderr; where that is not a terminal, a plain line now and then.

    Args:
        title: what is going on.
        total: tokens to do.
        shown: False for silence.
    """

    def __init__(self, title: str, total: int, *, shown: bool = True):
        self.title, self.total, self.done = title, total, 0
        self.console = Console(stderr=True)
        self.lines = shown and not self.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens  {task.fields[speed]:,.0f} tokens/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not shown or self.lines)
        self.task = self.bar.add_task(title, total=total, speed=0.0, loss=float("nan"))

    def __enter__(self) -> "TokenProgress":
        self.started = self.last_line = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def advance(self, tokens: int, *, loss: float) -> None:
        """Count `tokens` more, the last of them at this loss."""
        now = time.perf_counter()
        self.done += tokens
        speed = self.done / (now - self.started)
        self.bar.update(self.task, advance=tokens, speed=speed, loss=loss)
        if self.lines and (now - self.last_line > LINE_EVERY_SECONDS or self.done >= self.total):
            self.last_line = now
            left = (self.total - self.done) / speed
            done = f"{self.done:,}/{self.total:,} tokens, {speed:,.0f} tokens/s"
            self.console.print(f"{self.title}: {done}, loss {loss:.4f}, {left:.0f} s left", highlight=False, soft_wrap=True)
