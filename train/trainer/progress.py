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
        done: how many of them were done before; they do not count for the speed.
        shown: False for silence.
        lines: False for no lines but those of `line`.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True, lines: bool = True):
        self.title, self.total, self.done, self.done_before = title, total, done, done
        self.console, self.shown = Console(stderr=True), shown
        no_bar = not shown or not self.console.is_terminal
        self.lines = shown and lines and no_bar
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens  {task.fields[speed]:,.0f} tokens/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=no_bar)
        self.task = self.bar.add_task(title, total=total, completed=done, speed=0.0, loss=float("nan"))

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
        speed = (self.done - self.done_before) / (now - self.started)
        self.bar.update(self.task, advance=tokens, speed=speed, loss=loss)
        if self.lines and (now - self.last_line > LINE_EVERY_SECONDS or self.done >= self.total):
            self.last_line = now
            left = (self.total - self.done) / speed
            done = f"{self.done:,}/{self.total:,} tokens, {speed:,.0f} tokens/s"
            self.console.print(f"{self.title}: {done}, loss {loss:.4f}, {left:.0f} s left", highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
