"""
What the benchmarks share: alternating rounds, ratios against a peer of the same run, what the machine can do at most, peak
memory of a fresh process, and results in a file.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

MOST_ROUNDS = 101
NATIVE = ("native_linear_attention", "native_step")  # the functions of dijiang.modeling that run code of our own
CHUNK = 64  # tokens per block of the chunk form, as the floor counts it
console = Console(width=None if sys.stdout.isatty() else 127)


def alternate(
    calls: dict[str, Callable],
    *,
    rounds: int = 7,
    seconds: float = 0.0,
    warmup: int = 1,
    after: dict[str, Callable] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict]:
    """
    Time every call once per round, in turn (A B C A B C ...), so that a slow minute of the machine hits all of them.

    Args:
        rounds: at least so many; more follow until `seconds` have passed.
        warmup: rounds that are not counted.
        after: by name, what to do untimed after each call of that name.

    Returns:
        by name: median_s, min_s, q1_s, q3_s and rounds.
    """
    found, started = {name: [] for name in calls}, None
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, MOST_ROUNDS):
            started = clock() if turn == 0 else started
            if turn >= rounds and clock() - started >= seconds:
                break
            for name, call in calls.items():
                begin = clock()
                result = call()
                spent = clock() - begin
                del result
                if after and name in after:
                    after[name]()
                if turn >= 0:
                    found[name].append(spent)
    finally:
        gc.enable()
    return {name: summary(times) for name, times in found.items()}


def summary(times: list[float]) -> dict:
    """Median and spread of some times."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_s": median, "min_s": min(times), "q1_s": q1, "q3_s": q3, "rounds": len(times)}


def ratios(timings: dict[str, dict], peer: str) -> dict[str, float]:
    """How many times faster than `peer` each of the others was, by medians."""
    return {name: timings[peer]["median_s"] / x["median_s"] for name, x in timings.items() if name != peer}


def floor_flops(tokens: int, heads: int, head_dim: int, features: int, chunk: int = CHUNK) -> int:
    """
    Flops of the products that the chunk form performs, with d = head_dim, M = features, C = chunk, per token and head:
    2*2*d*M (maps of q and k) + 2*2*M*d (state read and written) + 2*C*(M + d) (weights inside a block, times the values).
    """
    d, M = head_dim, features
    return tokens * heads * (2 * 2 * d * M + 2 * 2 * M * d + 2 * chunk * (M + d))


def floor_seconds(flops: float, moved_bytes: float, limits: dict, dtype: str) -> float:
    """The longer of doing `flops` at the measured rate of large products and moving `moved_bytes` at that of a large copy."""
    return max(flops / (limits["product_gflops"][dtype] * 1e9), moved_bytes / limits["copy_bytes_per_s"])


def best_seconds(call: Callable, rounds: int = 5) -> float:
    return alternate({"call": call}, rounds=rounds)["call"]["min_s"]


def machine_limits(dtypes: list[str], quick: bool = False) -> dict:
    """Rates of large matrix products by dtype (GFLOP/s) and of a copy too large for any cache (bytes read + written)."""
    rates = {}
    for dtype in dtypes:
        rates[dtype] = 0.0
        for size in (128,) if quick else (1024, 2048, 4096):
            a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            rates[dtype] = max(rates[dtype], 2 * size**3 / seconds / 1e9)
    source = torch.ones((1 << 20 if quick else 1 << 30) // 4)
    target = torch.empty_like(source)
    return {"product_gflops": rates, "copy_bytes_per_s": 2 * source.nbytes / best_seconds(lambda: target.copy_(source))}


def machine() -> dict:
    """The machine in words and numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python and of packages, None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("dijiang", "torch", "transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


class PeakMemory:
    """`with PeakMemory() as peak: ...`; then `peak.bytes` is the largest resident memory above that at entry."""

    def __enter__(self) -> "PeakMemory":
        self.linux = Path("/proc/self/clear_refs").exists()
        if self.linux:  # forget the earlier peak, which may belong to the imports
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self.read("VmRSS:")
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = self.read("VmHWM:") - self.before

    def read(self, field: str) -> int:
        if not self.linux:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        words = Path("/proc/self/status").read_text(encoding="utf-8").split()
        return int(words[words.index(field) + 1]) * 1024


def run_fresh(script: str, *arguments) -> dict:
    """What a fresh process of `script` prints as JSON on its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def backend_of(call: Callable) -> str:
    """`torch` or `native`: whether `call` got a result from one of the native functions."""
    answered = []

    def note(frame, event, result):
        if event == "return" and result is not None:
            answered.append(frame.f_code.co_name in NATIVE)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return "native" if any(answered) else "torch"


def choose_backend(name: str) -> None:
    """`torch` keeps a native kernel out, where there is one. Call it before dijiang is imported."""
    if any(module.startswith("dijiang.modeling") for module in sys.modules):
        raise RuntimeError("the backend must be chosen before dijiang.modeling is imported")
    if name == "torch":
        os.environ["DIJIANG_NATIVE"] = "0"
    else:
        os.environ.pop("DIJIANG_NATIVE", None)


def check_backend(asked: str, ran: dict[str, str]) -> dict[str, str]:
    """`ran`, the backend by pass, if it is what was asked for; a native one need not know every pass."""
    if (asked == "torch" and "native" in ran.values()) or (asked == "native" and "native" not in ran.values()):
        raise SystemExit(f"--backend {asked} was asked for, but what ran is {ran}")
    return ran


def common_arguments(description: str, default_dtypes: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=default_dtypes)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--rounds", type=int, default=7, help="at least so many; short calls get more")
    parser.add_argument("--backend", choices=("auto", "torch", "native"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script; says nothing about targets")
    parser.add_argument("--output", type=Path, help="JSON file; with --quick none is written by default")
    return parser


def header(arguments: argparse.Namespace, script: str, *packages: str) -> dict:
    """The part of a result that says what was run where. The command leaves out folders outside this one."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *words]),
        "quick": arguments.quick,
        "dtypes": arguments.dtype,
        "machine": machine(),
        "versions": versions(*packages),
    }


def target(name: str, limit: float, measured: float, *, at_most: bool = False) -> dict:
    """One line of the section `targets`; `at_most` where less is better."""
    return {
        "name": name,
        "target": f"{'<=' if at_most else '>='} {limit:g}",
        "measured": measured,
        "met": measured <= limit if at_most else measured >= limit,
    }


def show(title: str, columns: list[str], rows: list[list]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row))
    console.print(table)


def show_timings(title: str, timings: dict[str, dict], peer: str) -> None:
    gains = ratios(timings, peer)
    rows = []
    for name, x in timings.items():
        times = [1e3 * x[key] for key in ("median_s", "min_s", "q1_s", "q3_s")]
        rows.append([name, *times, x["rounds"], gains.get(name, 1.0)])
    show(title, ["", "median ms", "min", "1st quartile", "3rd quartile", "rounds", f"times faster than {peer}"], rows)


def show_targets(targets: list[dict]) -> None:
    rows = [[x["name"], x["target"], x["measured"], "yes" if x["met"] else "NO"] for x in targets]
    if rows:
        show("Targets", ["", "target", "measured", "met"], rows)


def write_json(path: Path, result: dict) -> None:
    """Write `result`, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
