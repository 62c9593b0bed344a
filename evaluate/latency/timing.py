"""What every measurement of speed shares: alternating rounds, medians, what the machine can do at most, peak memory."""

import ctypes
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MOST_ROUNDS = 101


def alternate(
    calls: dict[str, Callable],
    *,
    rounds: int = 7,
    seconds: float = 0.0,
    warmup: int = 1,
    after: dict[str, Callable] | None = None,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict]:
    """
    Time every call once per round, in alternating order (A B C C B A A B C ...), so that neither a slow minute of the machine
    nor the traces of the call before favour one of them.

    Args:
        rounds: at least so many; more follow until `seconds` have passed.
        warmup: rounds that are not counted.
        after: by name, what to do untimed after each call of that name.
        wait: called before every look at the clock; for a GPU, see `waiting_for`.

    Returns:
        by name: median_s, min_s, q1_s, q3_s and rounds.
    """
    found, started = {name: [] for name in calls}, None
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, max(rounds, MOST_ROUNDS)):
            started = clock() if turn == 0 else started
            if turn >= rounds and clock() - started >= seconds:
                break
            for name, call in calls.items() if turn % 2 == 0 else reversed(calls.items()):
                wait()
                begin = clock()
                result = call()
                wait()
                spent = clock() - begin
                del result
                if after and name in after:
                    after[name]()
                if turn >= 0:
                    found[name].append(spent)
    finally:
        gc.enable()
    return {name: summary(times) for name, times in found.items()}


def waiting_for(device: torch.device | str) -> Callable[[], None]:
    """What waits until a device has done all that it was told; a CPU does it at once."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def summary(times: list[float]) -> dict:
    """Median and spread of some times."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_s": median, "min_s": min(times), "q1_s": q1, "q3_s": q3, "rounds": len(times)}


def ratios(timings: dict[str, dict], peer: str) -> dict[str, float]:
    """How many times faster than `peer` each of the others was, by medians."""
    return {name: timings[peer]["median_s"] / x["median_s"] for name, x in timings.items() if name != peer}


def floor_seconds(flops: float, moved_bytes: float, limits: dict, dtype: str) -> float:
    """
    The longer of doing `flops` at the measured rate of large products and moving `moved_bytes` at that of a large copy or,
    where that was measured and is higher, of reading.
    """
    rate = max(limits["copy_bytes_per_s"], limits.get("read_bytes_per_s", 0.0))
    return max(flops / (limits["product_gflops"][dtype] * 1e9), moved_bytes / rate)


def best_seconds(call: Callable, rounds: int = 5, wait: Callable[[], None] = lambda: None) -> float:
    return alternate({"call": call}, rounds=rounds, wait=wait)["call"]["min_s"]


def machine_limits(dtypes: list[str], quick: bool = False, device: torch.device | str = "cpu") -> dict:
    """
    Rates of large matrix products by dtype (GFLOP/s), and of a copy (bytes read + written) and a sum (bytes read) of a tensor
    too large for most caches.
    """
    rates, wait = {}, waiting_for(device)
    for dtype in dtypes:
        rates[dtype] = 0.0
        for size in (128,) if quick else (1024, 2048, 4096):
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), wait=wait)
            rates[dtype] = max(rates[dtype], 2 * size**3 / seconds / 1e9)
    source = torch.ones((1 << 20 if quick else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    copying, reading = (best_seconds(call, wait=wait) for call in (lambda: target.copy_(source), source.sum))
    return {
        "product_gflops": rates,
        "copy_bytes_per_s": 2 * source.nbytes / copying,
        "read_bytes_per_s": source.nbytes / reading,
    }


def machine() -> dict:
    """The machine in words and numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    return found


def command(*program: str) -> str:
    """The command line of this process, `program` in place of its first word; of absolute paths the last name alone."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join([*program, *words])


def own_command() -> str | None:
    """The `dijiang ...` that this process is, None where another program called us."""
    return command("dijiang") if Path(sys.argv[0]).name in ("dijiang", "dijiang.exe", "__main__.py") else None


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that can be had without swapping; on a GPU, what torch keeps for itself but does not use included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def trim() -> None:
    """Give back memory that is free: that of dead cycles, and what glibc keeps, where it is the C library."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


class PeakMemory:
    """
    `with PeakMemory() as peak: ...`; then `peak.bytes` is the largest resident memory above that at entry; on a GPU, the
    largest sum of torch's tensors there above that at entry.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.gpu = torch.device(device) if torch.device(device).type == "cuda" else None

    def __enter__(self) -> "PeakMemory":
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.gpu)
            self.before = torch.cuda.memory_allocated(self.gpu)
            return self
        self.linux = Path("/proc/self/clear_refs").exists()
        if self.linux:  # forget the earlier peak, which may belong to the imports
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self.read("VmRSS:")
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = (torch.cuda.max_memory_allocated(self.gpu) if self.gpu else self.read("VmHWM:")) - self.before

    def read(self, field: str) -> int:
        if not self.linux:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        words = Path("/proc/self/status").read_text(encoding="utf-8").split()
        return int(words[words.index(field) + 1]) * 1024
