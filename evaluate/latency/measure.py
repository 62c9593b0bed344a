"""
Latency and memory of a DiJiang model beside its softmax model: the time to the first token and that of a decoding step, over
contexts and batches, and the least time that the machine allows for a step (as Table 1 and Figure 4 of arXiv 2403.19928).
"""

from collections.abc import Callable, Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dijiang.checkpoint.provenance import versions
from dijiang.modeling.linear_attention_native import native_is_usable

from .contenders import WORDS, Contender, contenders
from .models import SPARE_BYTES, LatencyPair, shortage
from .timing import (
    PeakMemory,
    alternate,
    floor_seconds,
    machine,
    machine_limits,
    own_command,
    ratios,
    trim,
    waiting_for,
)

PHASES = ("prefill", "decode")
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


def measure_latency(
    pair: LatencyPair,
    *,
    contexts: Sequence[int],
    batches: Sequence[int] = (1,),
    phases: Sequence[str] = PHASES,
    rounds: int = 7,
    seconds: float = 2.0,
    advance: Callable[[int], None] = lambda done: None,
) -> dict:
    """
    Time both models, the softmax one with two kinds of cache; all take their turn in every round.

    Args:
        pair: of `shape_pair` or `checkpoint_pair`, for contexts as long as these.
        contexts: tokens; batches: sequences.
        phases: of `PHASES`.
        rounds: at least so many per row; more follow until `seconds` have passed.
        advance: is told how many rows are done, of len(phases) * len(contexts) * len(batches).

    Returns:
        The result, ready for JSON; what its numbers are stands under `meanings`. A row that does not fit into memory says
        so under `left_out`.

    Raises:
        ValueError: on contexts, batches, phases or rounds that cannot be measured.
    """
    check(contexts, batches, phases, rounds)
    sides, device = contenders(pair), pair.dijiang.device
    dtype = str(pair.dijiang.dtype).removeprefix("torch.")
    limits = machine_limits([dtype], device=device)
    usable, reason = native_is_usable()
    rows = []
    for phase in phases:
        for context in sorted(contexts):
            for batch in sorted(batches):
                rows.append(measure_row(phase, sides, batch, context, limits, rounds=rounds, seconds=seconds))
                if phase == "decode" and context == PAPER_CONTEXT and pair.shape in PAPER_SPEEDS:
                    softmax, dijiang = PAPER_SPEEDS[pair.shape]
                    rows[-1]["paper_ratio"] = round(dijiang / softmax, 2)
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
        "weights_bytes": {name: sides[name].weights_bytes for name in ("softmax", "dijiang")},
        "limits": limits,
        "rows": rows,
        "flatness": flatness(rows),
    }


def check(contexts: Sequence[int], batches: Sequence[int], phases: Sequence[str], rounds: int) -> None:
    """Raise ValueError on what cannot be measured."""
    for name, values in (("contexts", contexts), ("batches", batches)):
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise ValueError(f"{name} {', '.join(map(str, values)) or '(none)'} must be numbers of at least 1, each once")
    if not phases or set(phases) - set(PHASES) or len(set(phases)) < len(phases):
        raise ValueError(f"phases {', '.join(phases) or '(none)'} are unknown; choose from {', '.join(PHASES)}, each once")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")


def measure_row(
    phase: str, sides: dict[str, Contender], batch: int, context: int, limits: dict, *, rounds: int, seconds: float
) -> dict:
    """One row of the result."""
    row = {"phase": phase, "batch": batch, "context": context}
    device = sides["dijiang"].device
    trim()
    if reason := shortage(needed_bytes(phase, sides, batch, context), device):
        return row | {"left_out": reason}
    options = {"rounds": rounds, "seconds": seconds, "wait": waiting_for(device)}
    try:
        if phase == "prefill":
            return row | prefill_row(sides, batch, context, options)
        return row | decode_row(sides, batch, context, limits, options)
    except torch.OutOfMemoryError:  # of a GPU
        return row | {"left_out": "the GPU's memory ran out"}


def needed_bytes(phase: str, sides: dict[str, Contender], batch: int, context: int) -> float:
    """A generous estimate of what a row takes beside the weights."""
    config, caches = sides["dijiang"].model.config, {name: side.cache_bytes(batch, context) for name, side in sides.items()}
    # a layer's inputs and outputs while a prompt is read; ours reads its context with a batch of one before it decodes
    prompt = 4 * context * (8 * config.hidden_size + 3 * config.intermediate_size) * (batch if phase == "prefill" else 1)
    if phase == "prefill":  # one after the other, keys and values once more while they are written
        return prompt + 2 * max(caches.values()) + SPARE_BYTES
    # all at once, the growing one with a copy of one layer
    return prompt + sum(caches.values()) * (1 + 2 / config.num_hidden_layers) + SPARE_BYTES


def prefill_row(sides: dict[str, Contender], batch: int, context: int, options: dict) -> dict:
    """Read a prompt of random tokens, one length for all sequences."""
    ids = sides["dijiang"].random_ids(batch, context)
    timings = alternate({name: lambda side=side: side.prefill(ids) for name, side in sides.items()}, **options)
    peaks = {}
    for name, side in sides.items():
        trim()
        with PeakMemory(side.device) as peak:
            side.prefill(ids)
        peaks[name] = peak.bytes
    return compared(sides, batch, context, timings, batch * context, peaks)


def decode_row(sides: dict[str, Contender], batch: int, context: int, limits: dict, options: dict) -> dict:
    """One token after `context` tokens."""
    caches = {name: side.filled_cache(batch, context) for name, side in sides.items()}
    ids = sides["dijiang"].random_ids(batch, 1)
    steps = {name: lambda side=side, name=name: side.step(ids, caches[name]) for name, side in sides.items()}
    after = {name: lambda side=side, name=name: side.step_back(caches[name]) for name, side in sides.items()}
    timings = alternate(steps, after=after, warmup=2, **options)
    peaks, floors = {}, {}
    dtype = str(sides["dijiang"].dtype).removeprefix("torch.")
    for name, side in sides.items():
        trim()
        with PeakMemory(side.device) as peak:
            for _ in range(2):
                steps[name]()
                after[name]()
        peaks[name] = side.cache_bytes(batch, context) + peak.bytes
        floors[name] = floor_seconds(*side.least_work(batch, context), limits, dtype)
    return compared(sides, batch, context, timings, batch, peaks) | {
        "floor_s": floors,
        "of_floor": {name: timings[name]["median_s"] / floor for name, floor in floors.items()},
        "floor_ratio": {peer: floors[peer] / floors["dijiang"] for peer in PEERS},
    }


def compared(sides: dict[str, Contender], batch: int, context: int, timings: dict, tokens: int, peaks: dict) -> dict:
    """What rows of both phases hold; `tokens` is what one call handles."""
    return {
        "timings": timings,
        "tokens_per_s": {name: tokens / x["median_s"] for name, x in timings.items()},
        "ratio": {peer: ratios(timings, peer)["dijiang"] for peer in PEERS},
        "peak_bytes": peaks,
        "cache_bytes": {name: side.cache_bytes(batch, context) for name, side in sides.items()},
    }


def flatness(rows: list[dict]) -> list[dict]:
    """By batch, how much longer a decoding step takes at the longest context measured than at the shortest."""
    found = []
    measured = [row for row in rows if row["phase"] == "decode" and "left_out" not in row]
    for batch in sorted({row["batch"] for row in measured}):
        own = sorted((row for row in measured if row["batch"] == batch), key=lambda row: row["context"])
        first, last = own[0], own[-1]
        if first is not last:
            medians = {name: [row["timings"][name]["median_s"] for row in (first, last)] for name in first["timings"]}
            growth = {name: after / before for name, (before, after) in medians.items()}
            found.append({"batch": batch, "from": first["context"], "to": last["context"], "ratio": growth})
    return found


def show_latency(result: dict, console: Console) -> None:
    """Print tables of times (ratios: to the growing cache / to the static one) and of memory, and how flat decoding is."""
    titles = {"prefill": "time to the first token, s", "decode": "decoding step, ms"}
    for phase in dict.fromkeys(row["phase"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["phase"] == phase]
        measured = [row for row in rows if "left_out" not in row]
        columns = ["softmax", "static", "DiJiang", "times faster"]
        columns += ["at floors", "paper"] if phase == "decode" else []
        times = [(row, times_of(row)) for row in measured]
        print_table(console, f"{result['name']}, {result['dtype']}: {titles[phase]}", columns, times)
        columns = ["softmax cache", "state", "peak softmax", "peak static", "peak DiJiang"]
        print_table(console, f"memory of {phase} above the weights, MiB", columns, [(row, memory_of(row)) for row in measured])
        for row in rows:
            if "left_out" in row:
                console.print(f"batch {row['batch']}, context {row['context']:,} was left out: {row['left_out']}")
    for x in result["flatness"]:
        grown = ", ".join(f"{name} {value:.2f}" for name, value in x["ratio"].items())
        console.print(f"step at {x['to']:,} tokens over step at {x['from']:,}, batch {x['batch']}: {grown}")


def print_table(console: Console, title: str, columns: list[str], rows: list[tuple[dict, list[str]]]) -> None:
    """A table of rows of a result and their cells, beside batch and context."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("batch", "context", *columns):
        table.add_column(column, justify="right")
    for row, found in rows:
        table.add_row(str(row["batch"]), f"{row['context']:,}", *found)
    console.print(table)


def times_of(row: dict) -> list[str]:
    """Medians, and the ratios to both kinds of cache."""
    decoding = row["phase"] == "decode"
    found = [f"{x['median_s'] * (1e3 if decoding else 1.0):,.2f}" for x in row["timings"].values()]
    for key in ("ratio", "floor_ratio") if decoding else ("ratio",):
        found.append("/".join(f"{row[key][peer]:.2f}" for peer in PEERS))
    return [*found, f"{row['paper_ratio']:.2f}" if "paper_ratio" in row else ""] if decoding else found


def memory_of(row: dict) -> list[str]:
    sizes = [row["cache_bytes"]["softmax"], row["cache_bytes"]["dijiang"], *row["peak_bytes"].values()]
    return [f"{size / 2**20:,.1f}" for size in sizes]
