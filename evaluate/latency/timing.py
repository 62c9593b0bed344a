"""Timing of calls in alternating rounds, summaries of the times, and the rates that the machine reaches at most."""

import functools
import gc
import statistics
import time
from collections.abc import Callable

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
    nor what the previous call left in caches favors one of them.

    Args:
        calls: by name.
        rounds: minimum; more follow until `seconds` have passed.
        seconds: see `rounds`.
        warmup: rounds that are not counted.
        after: by name, what to do untimed after each call of that name.
        wait: called before each look at the clock; for a GPU, see `waiting_for`.
        clock: gives seconds.

    Returns:
        By name, the `summary` of the times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = clock()
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, max(rounds, MOST_ROUNDS)):
            if index == 0:
                started = clock()
            if index >= rounds and clock() - started >= seconds:
                break
            for name, call in calls.items() if index % 2 == 0 else reversed(calls.items()):
                wait()
                begin = clock()
                result = call()
                wait()
                spent = clock() - begin
                del result
                if after and name in after:
                    after[name]()
                if index >= 0:
                    times[name].append(spent)
    finally:
        gc.enable()
    return {name: summary(spent) for name, spent in times.items()}


def waiting_for(device: torch.device | str) -> Callable[[], None]:
    """A function that waits until a GPU has finished its queue; on a CPU, where calls are synchronous, it does nothing."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def summary(times: list[float]) -> dict:
    """Median and spread of times in seconds: median_s, min_s, the quartiles q1_s and q3_s, and the number of rounds."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_s": median, "min_s": min(times), "q1_s": q1, "q3_s": q3, "rounds": len(times)}


def ratios(timings: dict[str, dict], peer: str) -> dict[str, float]:
    """How many times faster than `peer` each of the others was, by medians."""
    return {name: timings[peer]["median_s"] / x["median_s"] for name, x in timings.items() if name != peer}


def floor_seconds(flops: float, moved_bytes: float, limits: dict, dtype: str) -> float:
    """
    Least time on this machine: the longer of computing `flops` at the measured rate of large products and of moving
    `moved_bytes` at the rate of a large copy or, where it was measured and is higher, of reading.
    """
    rate = max(limits["copy_bytes_per_s"], limits.get("read_bytes_per_s", 0.0))
    return max(flops / (limits["product_gflops"][dtype] * 1e9), moved_bytes / rate)


def best_seconds(call: Callable, rounds: int = 5, wait: Callable[[], None] = lambda: None) -> float:
    return alternate({"call": call}, rounds=rounds, wait=wait)["call"]["min_s"]


def machine_limits(
    dtypes: list[str],
    quick: bool = False,
    device: torch.device | str = "cpu",
    *,
    sizes: tuple[int, ...] = (1024, 2048, 4096),
    seconds_of: Callable[[Callable], float] | None = None,
) -> dict:
    """
    Rates of large matrix products by dtype (GFLOP/s), and of a copy (bytes read + written) and a sum (bytes read) of a tensor
    too large for most caches. `sizes` are those of the matrices; `seconds_of` times a call, by default `best_seconds`.
    """
    if seconds_of is None:
        seconds_of = functools.partial(best_seconds, wait=waiting_for(device))
    rates = dict.fromkeys(dtypes, 0.0)
    for dtype in dtypes:
        for size in (128,) if quick else sizes:
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            seconds = seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            rates[dtype] = max(rates[dtype], 2 * size**3 / seconds / 1e9)
    source = torch.ones((1 << 20 if quick else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    return {
        "product_gflops": rates,
        "copy_bytes_per_s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source)),
        "read_bytes_per_s": source.nbytes / seconds_of(source.sum),
    }
