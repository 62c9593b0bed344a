"""
What the steps of the GPU programme share: their command line, the JSON that is whole at any time, times by CUDA events, and
the card's own rates.
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

from dijiang.evaluate.latency import timing

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402

# when the programme began the step: importing torch counts too
STARTED = float(os.environ.get("STEP_STARTED", time.time()))
PACKAGES = ("triton", "flash-linear-attention", "accelerate", "peft")
MARGIN_S = 4.0  # what a step leaves of its limit, to end by itself
FLUSH_BYTES = 256 << 20  # more than any card's L2 cache
MOST_CALLS = 100
AGAIN = 75  # exit code that asks for another process, for the rows that are left


def arguments(doc: str) -> argparse.Namespace:
    """The options that every step takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of weights, corpus and wheels")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to try the step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then; rows that are left are said so")
    return parser.parse_args()


def device_of(small: bool) -> torch.device:
    """The GPU, or the CPU of a small run."""
    return torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def still_works(device: str) -> bool:
    """Whether the GPU computes after an error; some leave a process none that does."""
    try:
        if device != "cpu":
            torch.randn(8, device="cuda").sum().item()
    except RuntimeError:
        return False
    return True


class Record:
    """
    The JSON of one step, on disk as a whole after every change. A file of an earlier call on the same device is gone on with.

    Attributes:
        data: what the file holds.
    """

    def __init__(self, step: str, options: argparse.Namespace):
        self.path, self.limit = options.results / f"{step}.json", options.seconds
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
            "command": timing.command("python", f"scripts/gpu/steps/{step}.py"),
            "machine": timing.machine(),
            "device": name,
            "versions": measure.versions(*PACKAGES),
        }
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
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
        Measure the rows of `plan` in its order and write the file after each. Rows that an earlier call has are passed over;
        those for which no time is left stand in `data["not_reached"]`, and are what a further call begins with.

        Args:
            plan: what names each row, unique.
            measure_row: what is found for a row; an error of it is noted in the row.
            cost: seconds that a row may take.
            after: entries of `data` that follow from the rows so far.
        """
        rows = self.data.setdefault("rows", [])
        found = [{key: row.get(key) for key in plan[0]} for row in rows]
        waiting = [row for row in plan if row not in found]
        self.data["not_reached"] = len(waiting)
        gc.collect()
        gc.freeze()  # timing collects garbage for every row, which takes long beside all that torch has imported
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
                result = {"error": one_line(error)}
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
    Median and spread of a call's time. On a GPU by CUDA events, its L2 cache emptied before every call, so that calls are
    queued while it is busy and launches cost time only where they outlast the work; on a CPU by the clock.

    Args:
        seconds: what all calls should take together, between `rounds` and `MOST_CALLS` of them.
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
    """The device's rates, as `timing.machine_limits` gives them: bfloat16 products, copying, reading."""
    if device.type != "cuda":
        return timing.machine_limits(["bfloat16"], quick=small)
    best = 0.0
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        found = seconds_per_call(lambda a=a, b=b: torch.mm(a, b), device, seconds=0.2)
        best = max(best, 2 * size**3 / found["median_s"] / 1e9)
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    copying = seconds_per_call(lambda: target.copy_(source), device)["median_s"]
    reading = seconds_per_call(source.sum, device)["median_s"]
    return {
        "product_gflops": {"bfloat16": best},
        "copy_bytes_per_s": 2 * source.nbytes / copying,
        "read_bytes_per_s": source.nbytes / reading,
    }
