"""How far tokenising is, on stderr."""

import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from ..trainer.progress import LINE_EVERY_SECONDS


class TokeniseProgress:
    """
    A spinner with documents, tokens and tokens/s; where stderr is not a terminal, a plain line now and then.

    Args:
        name: of the source.
        limit: tokens after which reading stops; None if the text ends first.
        shown: False for silence.
    """

    def __init__(self, name: str, limit: int | None, *, shown: bool):
        self.name, self.shown = name, shown
        self.goal = "" if limit is None else f" of {limit:,}"
        self.console = Console(stderr=True)
        self.lines = shown and not self.console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        self.spinner = Progress(*columns, console=self.console, disable=not shown or self.lines, transient=True)
        self.task = self.spinner.add_task("")

    def __enter__(self) -> "TokeniseProgress":
        self.started = self.last_line = time.perf_counter()
        self.last = (0, 0)
        self.spinner.start()
        return self

    def __exit__(self, kind, *exception) -> None:
        self.spinner.stop()
        if kind is None:
            self.say(self.line())

    def update(self, tokens: int, documents: int) -> None:
        """Tell the sums so far."""
        self.last = (tokens, documents)
        now = time.perf_counter()
        if self.lines and now - self.last_line > LINE_EVERY_SECONDS:
            self.last_line = now
            self.say(self.line())
        elif not self.spinner.disable and now - self.last_line > 0.1:  # some documents are only a few words long
            self.last_line = now
            self.spinner.update(self.task, description=self.line())

    def line(self) -> str:
        tokens, documents = self.last
        speed = tokens / max(time.perf_counter() - self.started, 1e-9)
        return f"tokenise {self.name}: {tokens:,}{self.goal} tokens, {documents:,} documents, {speed:,.0f} tokens/s"

    def say(self, line: str) -> None:
        """Print one line, plain as it is."""
        if self.shown:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
