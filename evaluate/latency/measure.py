"""
Latency and memory of a DiJiang model and of its softmax model: the time to the first token and that of a decoding step, over
contexts and batches, and the least time that the machine allows for a step (as Table 1 and Figure 4 of arXiv 2403.19928).
"""

from collections.abc import Callable

import torch
from rich.console import Console

from dijiang.checkpoint.provenance import versions
from dijiang.common.device import dtype_name
from dijiang.common.machine import machine, own_command
from dijiang.common.memory import PeakMemory, trim
from dijiang.modeling.linear_attention_native import native_is_usable

from ..report.tables import print_table
from .config import LatencyConfig
from .contenders import WORDS, Contender, contenders_of
from .models import SPARE_BYTES, LatencyPair, shortage
from .timing import alternate, floor_seconds, machine_limits, ratios, waiting_for

PEERS = ("softmax", "softmax static")
# tokens/s of the softmax model and of DiJiang, decoding at 2,048 tokens on an A800 (arXiv 2403.19928, Table 1)
PAPER_CONTEXT = 2048
PAPER_SPEEDS = {
    "pythia-70m": (2037, 2605),
    "pythia-160m": (622, 1315),
    "pythia-410m": (203, 787),
    "pythia-1b": (105, 611),
    "pythia-2.8b": (34, 284),
}
MEANINGS = {
    "prefill": "a prompt is read into a new cache until the first generated token is known: the time to the first token",
    "decode": "one token of every sequence goes in after so many tokens of context, until the next one is known",
    "peak_bytes": "most memory at a time above the weights, the cache included: resident memory of the process, on a GPU that "
    "of torch's tensors",
    "cache_bytes": "keys and values, or states, of all layers and sequences",
    "floor_s": "the longer of computing and of moving what a decoding step must (weights once; keys and values once, and "
    "twice more where the cache copies them; states read and written), at the rates in limits, those of large products, "
    "copies and sums. What stays in the processor's cache can be read faster",
    "of_floor": "median over floor_s",
    "floor_ratio": "floor_s of the softmax model over that of DiJiang: the gain if both reached their floors",
    "ratio": "how many times faster DiJiang is, by medians",
    "flatness": "median of a step at the longest context over that at the shortest",
}


def measure_latency(pair: LatencyPair, config: LatencyConfig, *, advance: Callable[[int], None] = lambda rows: None) -> dict:
    """
    Time both models, the softmax one with two kinds of cache; all take their turn in every round.

    Args:
        pair: from `shape_pair` or `checkpoint_pair`.
        config: what to measure; contexts may be no longer than those that `pair` was built for.
        advance: called with the number of rows that were just finished.

    Returns:
        The result, ready for JSON; its entry `meanings` explains the numbers. A row that does not fit into memory says so
        under `left_out`.
    """
    contenders = contenders_of(pair)
    device = pair.dijiang.device
    dtype = dtype_name(pair.dijiang.dtype)
    limits = machine_limits([dtype], device=device)
    usable, reason = native_is_usable()
    rows = []
    for phase in config.phases:
        for context in sorted(config.contexts):
            for batch in sorted(config.batches):
                row = measure_row(phase, contenders, batch, context, limits, rounds=config.rounds, seconds=config.seconds)
                if phase == "decode" and context == PAPER_CONTEXT and pair.shape in PAPER_SPEEDS:
                    softmax, dijiang = PAPER_SPEEDS[pair.shape]
                    row["paper_ratio"] = round(dijiang / softmax, 2)
                rows.append(row)
                advance(1)
    return {
        "kind": "latency",
        "command": own_command(),
        "name": pair.name,
        "machine": machine(),
        "versions": versions(),
        "device": device.type,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "native_code": {"usable": usable, "reason": reason},
        "models": pair.facts,
        "attention": pair.softmax.config._attn_implementation,
        "contenders": WORDS,
        "meanings": MEANINGS,
        "weights_bytes": {name: contenders[name].weights_bytes for name in ("softmax", "dijiang")},
        "limits": limits,
        "rows": rows,
        "flatness": flatness(rows),
    }


def measure_row(
    phase: str, contenders: dict[str, Contender], batch: int, context: int, limits: dict, *, rounds: int, seconds: float
) -> dict:
    """One row of the result."""
    row = {"phase": phase, "batch": batch, "context": context}
    device = contenders["dijiang"].device
    trim()
    if reason := shortage(needed_bytes(phase, contenders, batch, context), device):
        return row | {"left_out": reason}
    options = {"rounds": rounds, "seconds": seconds, "wait": waiting_for(device)}
    try:
        if phase == "prefill":
            return row | prefill_row(contenders, batch, context, options)
        return row | decode_row(contenders, batch, context, limits, options)
    except torch.OutOfMemoryError:  # of a GPU
        return row | {"left_out": "the GPU's memory ran out"}


def needed_bytes(phase: str, contenders: dict[str, Contender], batch: int, context: int) -> float:
    """A generous estimate of what a row takes in addition to the weights."""
    config = contenders["dijiang"].model.config
    caches = [contender.cache_bytes(batch, context) for contender in contenders.values()]
    # a layer's inputs and outputs while a prompt is read; ours reads its context with a batch of one before it decodes
    prompt = 4 * context * (8 * config.hidden_size + 3 * config.intermediate_size) * (batch if phase == "prefill" else 1)
    if phase == "prefill":  # there is one cache at a time, and keys and values exist twice while they are written
        return prompt + 2 * max(caches) + SPARE_BYTES
    # all caches exist at the same time, the growing one with a copy of one layer
    return prompt + sum(caches) * (1 + 2 / config.num_hidden_layers) + SPARE_BYTES


def prefill_row(contenders: dict[str, Contender], batch: int, context: int, options: dict) -> dict:
    """Read a prompt of random tokens, of one length for all sequences."""
    ids = contenders["dijiang"].random_ids(batch, context)
    calls = {name: lambda contender=contender: contender.prefill(ids) for name, contender in contenders.items()}
    timings = alternate(calls, **options)
    peaks = {}
    for name, contender in contenders.items():
        trim()
        with PeakMemory(contender.device) as peak:
            contender.prefill(ids)
        peaks[name] = peak.bytes
    return compared(contenders, batch, context, timings, batch * context, peaks)


def decode_row(contenders: dict[str, Contender], batch: int, context: int, limits: dict, options: dict) -> dict:
    """Decode one token of every sequence after `context` tokens."""
    caches = {name: contender.filled_cache(batch, context) for name, contender in contenders.items()}
    ids = contenders["dijiang"].random_ids(batch, 1)
    steps = {name: lambda name=name: contenders[name].step(ids, caches[name]) for name in contenders}
    after = {name: lambda name=name: contenders[name].step_back(caches[name]) for name in contenders}
    timings = alternate(steps, after=after, warmup=2, **options)
    peaks = {}
    floors = {}
    for name, contender in contenders.items():
        trim()
        with PeakMemory(contender.device) as peak:
            for _ in range(2):
                steps[name]()
                after[name]()
        peaks[name] = contender.cache_bytes(batch, context) + peak.bytes
        floors[name] = floor_seconds(*contender.least_work(batch, context), limits, dtype_name(contender.dtype))
    return compared(contenders, batch, context, timings, batch, peaks) | {
        "floor_s": floors,
        "of_floor": {name: timings[name]["median_s"] / floor for name, floor in floors.items()},
        "floor_ratio": {peer: floors[peer] / floors["dijiang"] for peer in PEERS},
    }


def compared(
    contenders: dict[str, Contender], batch: int, context: int, timings: dict, tokens: int, peaks: dict[str, int]
) -> dict:
    """The entries of a row in either phase; `tokens` is what one call handles."""
    return {
        "timings": timings,
        "tokens_per_s": {name: tokens / x["median_s"] for name, x in timings.items()},
        "ratio": {peer: ratios(timings, peer)["dijiang"] for peer in PEERS},
        "peak_bytes": peaks,
        "cache_bytes": {name: contender.cache_bytes(batch, context) for name, contender in contenders.items()},
    }


def flatness(rows: list[dict]) -> list[dict]:
    """Time of a decoding step at the longest measured context over that at the shortest, for each batch."""
    entries = []
    measured = [row for row in rows if row["phase"] == "decode" and "left_out" not in row]
    for batch in sorted({row["batch"] for row in measured}):
        own = sorted((row for row in measured if row["batch"] == batch), key=lambda row: row["context"])
        first, last = own[0], own[-1]
        if first is not last:
            medians = {name: [row["timings"][name]["median_s"] for row in (first, last)] for name in first["timings"]}
            growth = {name: after / before for name, (before, after) in medians.items()}
            entries.append({"batch": batch, "from": first["context"], "to": last["context"], "ratio": growth})
    return entries


def show_latency(result: dict, console: Console) -> None:
    """Print tables of times (ratios: to the growing cache / to the static one) and of memory, and the growth of a step."""
    titles = {"prefill": "time to the first token, s", "decode": "decoding step, ms"}
    for phase in dict.fromkeys(row["phase"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["phase"] == phase]
        measured = [row for row in rows if "left_out" not in row]
        columns = ["batch", "context", "softmax", "static", "DiJiang", "times faster"]
        columns += ["at floors", "paper"] if phase == "decode" else []
        console.print(f"{result['name']}, {result['dtype']}: {titles[phase]}")
        print_table(console, columns, [times_of(row) for row in measured])
        columns = ["batch", "context", "softmax cache", "state", "peak softmax", "peak static", "peak DiJiang"]
        console.print(f"memory of {phase} above the weights, MiB")
        print_table(console, columns, [memory_of(row) for row in measured])
        for row in rows:
            if "left_out" in row:
                console.print(f"batch {row['batch']}, context {row['context']:,} was left out: {row['left_out']}")
    for x in result["flatness"]:
        growth = ", ".join(f"{name} {value:.2f}" for name, value in x["ratio"].items())
        console.print(f"step at {x['to']:,} tokens over step at {x['from']:,}, batch {x['batch']}: {growth}")


def times_of(row: dict) -> list[str]:
    """Cells of a row: batch, context, medians, and the ratios to both kinds of cache."""
    decoding = row["phase"] == "decode"
    cells = [str(row["batch"]), f"{row['context']:,}"]
    cells += [f"{x['median_s'] * (1e3 if decoding else 1.0):,.2f}" for x in row["timings"].values()]
    for key in ("ratio", "floor_ratio") if decoding else ("ratio",):
        cells.append("/".join(f"{row[key][peer]:.2f}" for peer in PEERS))
    if decoding:
        cells.append(f"{row['paper_ratio']:.2f}" if "paper_ratio" in row else "")
    return cells


def memory_of(row: dict) -> list[str]:
    """Cells of a row: batch, context, bytes of caches and peaks."""
    sizes = [row["cache_bytes"]["softmax"], row["cache_bytes"]["dijiang"], *row["peak_bytes"].values()]
    return [str(row["batch"]), f"{row['context']:,}", *(f"{size / 2**20:,.1f}" for size in sizes)]
