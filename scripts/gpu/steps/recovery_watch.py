"""Puts what a training run logs into the step's JSON while it runs, so that a killed run leaves it."""

import json
import statistics
import threading
import time
from pathlib import Path

EVERY_SECONDS = 5.0
KEPT = ("step", "tokens", "loss", "kl", "ce", "grad_norm", "tokens_per_second")


class Watch:
    """
    Context manager that reads a stage's metrics.jsonl every few seconds, and once more at the end, into the record's
    `training` section under the stage's name.
    """

    def __init__(self, record, path: Path, stage: str):
        self.record, self.path, self.stage = record, path, stage
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def __enter__(self) -> "Watch":
        self.began = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.ended.set()
        self.thread.join()
        self.read()

    def follow(self) -> None:
        while not self.ended.wait(EVERY_SECONDS):
            self.read()

    def read(self) -> None:
        """Take in what the file holds now."""
        lines = []
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        except (OSError, ValueError):  # not there yet, or the last line is half-written
            pass
        curve = [{key: line[key] for key in KEPT if key in line} for line in lines if "loss" in line]
        held_out = [
            {
                "tokens": line["tokens"],
                "perplexity": line["eval_perplexity"],
                "teacher_perplexity": line.get("eval_teacher_perplexity"),
            }
            for line in lines
            if "eval_perplexity" in line
        ]
        found = {"seconds": round(time.monotonic() - self.began, 1), "curve": curve, "held_out": held_out}
        if curve:
            speeds = [line["tokens_per_second"] for line in curve[1:] or curve]
            found |= {"tokens": curve[-1]["tokens"], "tokens_per_s": statistics.median(speeds)}
        self.record.data.setdefault("training", {})[self.stage] = found
        self.record.save()
