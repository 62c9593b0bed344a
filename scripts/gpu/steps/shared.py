"""
Shared parts of the GPU programme's steps: command line, the JSON file that is whole at any time, times by CUDA events, and
the card's rates.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from dijiang.common.machine import command_line, machine
from dijiang.evaluate.latency import timing

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402

# when the programme started the step, so that importing torch counts too
STARTED = float(os.environ.get("STEP_STARTED", time.time()))
PACKAGES = ("triton", "flash-linear-attention", "accelerate", "peft")
MARGIN_S = 4.0  # left of a step's limit, so that it ends by itself
FLUSH_BYTES = 256 << 20  # more than any card's L2 cache
MOST_CALLS = 100
AGAIN = 75  # exit code that asks for another process for the remaining rows


def arguments(doc: str, **own: dict) -> argparse.Namespace:
    """The options that every step takes, and those in `own`, whose values are arguments of `add_argument`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    parser.add_argument("--data", type=Path, required=True, help="folder of weights, corpus and wheels")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to try the step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit; the JSON says what it left out")
    return parser.parse_args()


def device_of(small: bool) -> torch.device:
    """The GPU, or the CPU of a small run."""
    return torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")


def describe_error(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def still_works(device: str) -> bool:
    """Whether the GPU still computes after an error; some errors end its use in this process."""
    try:
        if device != "cpu":
            torch.randn(8, device="cuda").sum().item()
    except RuntimeError:
        return False
    return True


class Record:
    """
    The JSON of one step, on disk as a whole after every change. A file of an earlier call on the same device is continued.

    Attributes:
        data: content of the file.
    """

    def __init__(self, step: str, options: argparse.Namespace):
        self.path = options.results / f"{step}.json"
        self.limit = options.seconds
        device = device_of(options.small)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        earlier = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        same = earlier.get("device") == name and earlier.get("small") == options.small
        self.data = earlier if same else {}
        self.before = self.data.get("seconds", 0.0)
        self.data |= {
            "step": step,
            "complete": False,
            "small": options.small,
            "command": command_line("python", f"scripts/gpu/steps/{step}.py"),
            "machine": machine(),
            "device": name,
            "versions": measure.versions(*PACKAGES),
        }
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.data["seconds"] = round(self.before + time.time() - STARTED, 1)
        measure.write_json(self.path, self.data)

    def left(self) -> float:
        """Seconds until the step should have ended."""
        return self.limit - MARGIN_S - (time.time() - STARTED)

    def run(
        self,
        plan: list[dict],
        measure_row: Callable[[dict], dict],
        *,
        cost: Callable[[dict], float],
        after: Callable[[list[dict]], dict],
    ) -> None:
        """
        Measure the rows of `plan` in order and write the file after each. Rows of an earlier call are passed over; those for
        which no time is left are counted in `data["not_reached"]`, and another call begins with them.

        Args:
            plan: the entries that identify each row.
            measure_row: returns further entries of a row; an error is recorded in the row.
            cost: seconds that a row may take.
            after: returns entries of `data` that follow from the rows so far.
        """
        rows = self.data.setdefault("rows", [])
        measured = [{key: row.get(key) for key in plan[0]} for row in rows]
        waiting = [row for row in plan if row not in measured]
        self.data["not_reached"] = len(waiting)
        gc.collect()
        gc.freeze()  # timing collects garbage for every row, which would look at all that torch has imported
        for row in waiting:
            if cost(row) > self.left():
                continue
            began = time.monotonic()
            try:
                result = measure_row(row)
            except torch.OutOfMemoryError:
                result = {"left_out": "the GPU's memory ran out"}
            except Exception as error:  # one row that fails must not cost the others
                traceback.print_exc()
                result = {"error": describe_error(error)}
            rows.append(row | result | {"row_s": round(time.monotonic() - began, 2)})
            self.data["not_reached"] -= 1
            self.data |= after(rows)
            self.save()
            print(json.dumps(rows[-1]), flush=True)
            if "error" in result and not still_works(self.data["device"]):
                print(f"the device no longer works after row {row}", file=sys.stderr)
                raise SystemExit(AGAIN)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def finish(self, **facts) -> None:
        """Add what follows from the rows; the step is complete if it reached all of them."""
        self.data |= facts | {"complete": not self.data.get("not_reached", 0)}
        self.save()


def seconds_per_call(call: Callable, device: torch.device, *, seconds: float = 0.1, warmup: int = 2, rounds: int = 5) -> dict:
    """
    Median and spread of a call's time. On a GPU it is measured by CUDA events, and its L2 cache is emptied before every call:
    calls are queued while the GPU is busy, so launches cost time only where they outlast the work.

    Args:
        seconds: that all calls should take together, between `rounds` and `MOST_CALLS` of them.
    """
    if device.type != "cuda":
        return timing.alternate({"call": call}, rounds=rounds, seconds=seconds, warmup=warmup)["call"]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for _ in range(warmup):
        call()

    def events(calls: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            result = call()
            end.record()
            del result
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    once = max(min(events(2)), 1e-6)
    return timing.summary(events(int(min(max(seconds / once, rounds), MOST_CALLS))))


def card_rates(device: torch.device, small: bool) -> dict:
    """The device's rates of bfloat16 products, copying and reading."""
    if device.type != "cuda":
        return timing.machine_limits(["bfloat16"], quick=small)
    seconds_of = lambda call: seconds_per_call(call, device)["median_s"]  # noqa: E731
    return timing.machine_limits(["bfloat16"], device=device, sizes=(4096, 8192), seconds_of=seconds_of)


def run_bench(
    step: str,
    doc: str,
    bench: Callable,
    *,
    plan: Callable[[bool], list[dict]],
    cost: Callable[[dict], float],
    targets: Callable[[list[dict]], list[dict]],
    facts: Callable[[torch.device, bool], dict],
) -> None:
    """Run a step that measures the rows of `plan` by `bench(device, small, rates).measure_row`; see `Record.run`."""
    options = arguments(doc)
    record = Record(step, options)
    device = device_of(options.small)
    torch.manual_seed(0)
    rates = record.data.get("limits") or card_rates(device, options.small)
    record.data |= facts(device, options.small) | {"limits": rates}
    record.save()
    measure_row = bench(device, options.small, rates).measure_row
    after = lambda rows: {"targets": [] if options.small else targets(rows)}  # noqa: E731
    record.run(plan(options.small), measure_row, cost=cost, after=after)
    record.finish()
