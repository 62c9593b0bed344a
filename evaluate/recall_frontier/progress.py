"""Progress of the frontier benchmark: a bar on a terminal, else a line now and then, both with the time left."""

import time

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dijiang.common.progress import Reporter


class FrontierProgress(Reporter):
    """
    Share of the work that is done, and the time left.

    Args:
        total: amount of work.
        shown: False for silence.
    """

    def __init__(self, total: float, *, shown: bool):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, shown=shown)
        self.total = max(total, 1)
        self.done = 0.0
        self.title = "frontier"
        self.task = self.bar.add_task(self.title, total=self.total)

    def advance(self, amount: float, title: str | None = None) -> None:
        """Count an amount of finished work; `title` says what comes next."""
        self.done += amount
        self.title = title or self.title
        self.bar.update(self.task, advance=amount, description=self.title)
        now = time.perf_counter()
        if self.done and self.line_is_due(now):
            left = (now - self.started) * (self.total / self.done - 1)
            self.line(f"{self.title}: {self.done / self.total:.0%}, about {left / 60:.0f} min left")
