"""Progress on stderr: a bar on a terminal; where stderr is no terminal, a plain line now and then for the longest work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_SECONDS = 15.0
REFRESH_EVERY_SECONDS = 0.1

COUNTERS: dict[str, type[ProgressColumn]] = {
    "bytes": DownloadColumn,
    "items": MofNCompleteColumn,
    "work": TimeElapsedColumn,
}


@contextmanager
def progress_bar(
    title: str, total: float, *, shown: bool = True, unit: Literal["bytes", "items", "work"] = "work"
) -> Iterator[Callable[..., None]]:
    """
    Show one bar for the length of a `with` block, if stderr is a terminal.

    Args:
        title: what is going on.
        total: amount of work, in `unit`.
        shown: False for silence.
        unit: `bytes` and `items` are counted beside the bar; `work` shows the time instead.

    Yields:
        A function that adds an amount of finished work and, given a second argument, changes the title. Work that was never
        reported counts as finished when the block ends well.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), COUNTERS[unit](), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not shown or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount, title=None: bar.update(task, advance=amount, description=title)
        bar.update(task, completed=total)


class Reporter:
    """
    Prints on stderr: a live display on a terminal, else plain lines, at most one every `LINE_EVERY_SECONDS`.

    Args:
        columns: of the live display.
        shown: False for silence.
        lines: False for no lines but those that `line` prints.
        transient: whether the display disappears at the end.
    """

    def __init__(self, *columns: ProgressColumn, shown: bool, lines: bool = True, transient: bool = False):
        self.console = Console(stderr=True)
        self.shown = shown
        live = shown and self.console.is_terminal
        self.lines = shown and lines and not live
        self.bar = Progress(*columns, console=self.console, disable=not live, transient=transient)
        self.started = self.last_line = time.perf_counter()

    def __enter__(self) -> Self:
        self.started = self.last_line = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def line_is_due(self, now: float) -> bool:
        """Whether it is time for a plain line, which the caller then prints."""
        if not self.lines or now - self.last_line <= LINE_EVERY_SECONDS:
            return False
        self.last_line = now
        return True

    def line(self, text: str) -> None:
        """Print a line, above the display if there is one."""
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


class TokenProgress(Reporter):
    """
    Tokens done, tokens/s, loss and time left.

    Args:
        title: what is going on.
        total: tokens to do.
        done: tokens that an earlier run did; they do not count for the speed.
        shown: False for silence.
        lines: False for no lines but those that `line` prints.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True, lines: bool = True):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens  {task.fields[speed]:,.0f} tokens/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, shown=shown, lines=lines)
        self.title = title
        self.total = total
        self.done = self.done_before = done
        self.task = self.bar.add_task(title, total=total, completed=done, speed=0.0, loss=float("nan"))

    def advance(self, tokens: int, *, loss: float) -> None:
        """Count `tokens` more, the last of them at this loss."""
        now = time.perf_counter()
        self.done += tokens
        speed = (self.done - self.done_before) / max(now - self.started, 1e-9)
        self.bar.update(self.task, advance=tokens, speed=speed, loss=loss)
        if self.line_is_due(now) or (self.lines and self.done >= self.total):
            done = f"{self.done:,}/{self.total:,} tokens, {speed:,.0f} tokens/s"
            self.line(f"{self.title}: {done}, loss {loss:.4f}, {(self.total - self.done) / speed:.0f} s left")


class TokenizeProgress(Reporter):
    """
    A spinner with documents, tokens and tokens/s, and one line with the sums at the end.

    Args:
        name: of the source.
        limit: tokens after which reading stops; None if the text ends first.
        shown: False for silence.
    """

    def __init__(self, name: str, limit: int | None, *, shown: bool):
        super().__init__(SpinnerColumn(), TextColumn("{task.description}", markup=False), shown=shown, transient=True)
        self.name = name
        self.goal = "" if limit is None else f" of {limit:,}"
        self.sums = (0, 0)
        self.task = self.bar.add_task("")
        self.last_refresh = 0.0

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if exception[0] is None:
            self.line(self.summary())

    def update(self, tokens: int, documents: int) -> None:
        """Set the sums so far."""
        self.sums = (tokens, documents)
        now = time.perf_counter()
        if self.line_is_due(now):
            self.line(self.summary())
        elif not self.bar.disable and now - self.last_refresh > REFRESH_EVERY_SECONDS:  # many documents are a few words long
            self.last_refresh = now
            self.bar.update(self.task, description=self.summary())

    def summary(self) -> str:
        tokens, documents = self.sums
        speed = tokens / max(time.perf_counter() - self.started, 1e-9)
        return f"tokenize {self.name}: {tokens:,}{self.goal} tokens, {documents:,} documents, {speed:,.0f} tokens/s"
