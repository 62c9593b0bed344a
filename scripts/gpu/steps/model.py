"""
Whole models: a decoding step and a prompt, next to transformers' own class with its default cache, a static one, CUDA graphs
and torch.compile. Random weights in known shapes, bfloat16.

    python scripts/gpu/steps/model.py --data DATA --results RESULTS [--small] [--seconds 120]

A decoding step reads one token of every sequence after a number of tokens of context, and ends when the next tokens are on the
host. The paper's Table 1 is at 2,048 tokens (arXiv 2403.19928; its ratios are over the default cache, on an A800); longer
contexts are those of its Figure 4.
"""

import torch
from shared import describe_error, measure, run_bench
from transformers import PreTrainedConfig

from dijiang.checkpoint.shapes import shape_config
from dijiang.common.memory import PeakMemory, trim
from dijiang.evaluate.latency.config import LatencyConfig
from dijiang.evaluate.latency.contenders import Contender, contenders_of
from dijiang.evaluate.latency.graphs import InPlaceStep, agreement, graphed_step, short_cache
from dijiang.evaluate.latency.measure import PAPER_CONTEXT, PAPER_SPEEDS
from dijiang.evaluate.latency.models import SPARE_BYTES, random_pair, shortage
from dijiang.evaluate.latency.timing import alternate, floor_seconds, waiting_for
from dijiang.modeling.window_attention_flex import kernel as flex_kernel

SHAPES = (*PAPER_SPEEDS, "smollm2-135m")
LONGEST = 65536
STATE_TOKENS = 128  # read before our model decodes: more than its window and sinks hold
DECODING = ("softmax", "dijiang graph", "dijiang", "softmax static graph", "softmax static")
WORDS = {
    "softmax": "transformers' own class with its default cache (DynamicCache), filled at random",
    "softmax static": "the same with StaticCache of just the size needed",
    "softmax static graph": "that step captured as a CUDA graph",
    "softmax static compiled": "that step compiled by torch.compile, then captured as a CUDA graph",
    "dijiang": "the DiJiang model with its own cache, preset `recommended`; its state after "
    f"{STATE_TOKENS} tokens, as large as after any other number",
    "dijiang graph": "that step captured as a CUDA graph, its states copied back into the tensors they came from",
    "dijiang compiled": "that step compiled by torch.compile, then captured as a CUDA graph",
}
SMALL = ("pythia-70m", "smollm2-135m")
SMALL_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}


def facts(device: torch.device, small: bool) -> dict:
    """Entries of the JSON."""
    return {"dtype": "float32" if small else "bfloat16", "preset": "recommended", "contenders": WORDS}


def plan(small: bool) -> list[dict]:
    """Every row, the most informative first."""
    rows = []

    def add(phase: str, shape: str, batch: int, context: int, *names: str) -> None:
        for name in names:
            row = {"phase": phase, "shape": shape, "batch": batch, "context": context, "contender": name}
            rows.extend([] if row in rows else [row])

    if small:
        for shape in SMALL:
            add("decode", shape, 2, 160, *DECODING)
            add("prefill", shape, 2, 48, "softmax", "dijiang")
        add("decode", SMALL[0], 2, 160, "softmax static compiled", "dijiang compiled")
        return rows
    for batch in (32, 128, 1):
        for shape in SHAPES:
            add("decode", shape, batch, PAPER_CONTEXT, *DECODING)
    for batch, context in ((1, 2048), (1, 16384), (32, 2048)):
        for shape in ("smollm2-135m", "pythia-410m", "pythia-2.8b", "pythia-1b"):
            add("prefill", shape, batch, context, "softmax", "dijiang")
    for context in (8192, 32768, 512):
        for shape, batch in (("pythia-2.8b", 1), ("pythia-410m", 8)):
            add("decode", shape, batch, context, "softmax", "dijiang graph", "softmax static graph")
    for shape in ("pythia-70m", "smollm2-135m", "pythia-160m", "pythia-410m"):
        add("decode", shape, 32, PAPER_CONTEXT, "softmax static compiled", "dijiang compiled")
    return rows


def cost(row: dict) -> float:
    """Seconds that a row may take."""
    if "compiled" in row["contender"]:
        return 40.0
    return 15.0 if row["phase"] == "prefill" and row["contender"] == "dijiang" else 4.0


class Bench:
    """Measures the rows of one run, which share the models of a shape and the card's rates."""

    def __init__(self, device: torch.device, small: bool, rates: dict):
        self.device = device
        self.small = small
        self.rates = rates
        self.contenders: dict[str, dict[str, Contender]] = {}  # by shape

    def measure_row(self, row: dict) -> dict:
        """Time one contender, alone on the card except for the models' weights."""
        contender = self.contender(row)
        batch, context = row["batch"], row["context"]
        trim()
        needed = contender.cache_bytes(batch, context) * (1 + 2 / contender.model.config.num_hidden_layers) + SPARE_BYTES
        if not self.small and shortage(needed, self.device):
            self.drop_all_but(row["shape"])
            if reason := shortage(needed, self.device):
                return {"left_out": reason}
        with PeakMemory(self.device) as peak:
            result = self.prefill(contender, row) if row["phase"] == "prefill" else self.decode(contender, row)
        return result | {"cache_bytes": contender.cache_bytes(batch, context), "peak_bytes": peak.bytes}

    def contender(self, row: dict) -> Contender:
        """The model and cache of a row; models are kept for later rows."""
        shape = row["shape"]
        if shape not in self.contenders:
            softmax_config = tiny_config(shape) if self.small else shape_config(shape)
            dtype = "float32" if self.small else "bfloat16"
            config = LatencyConfig(contexts=(LONGEST,), device=self.device.type, dtype=dtype)
            try:
                pair = random_pair(shape, softmax_config, config)
            except ValueError:  # there is no room
                self.drop_all_but(shape)
                pair = random_pair(shape, softmax_config, config)
            self.contenders[shape] = contenders_of(pair)
        name = row["contender"].removesuffix(" graph").removesuffix(" compiled")
        return self.contenders[shape][name]

    def drop_all_but(self, shape: str) -> None:
        """Free the models of other shapes, which can be built again."""
        self.contenders = {shape: self.contenders[shape]} if shape in self.contenders else {}
        trim()
        torch.cuda.empty_cache()

    def pace(self) -> dict:
        wait = waiting_for(self.device)
        return {"rounds": 2, "seconds": 0.0, "wait": wait} if self.small else {"rounds": 5, "seconds": 0.3, "wait": wait}

    def prefill(self, contender: Contender, row: dict) -> dict:
        """Time reading a prompt of random tokens into a new cache until the first token is known."""
        ids = contender.random_ids(row["batch"], row["context"])
        flex_kernel.failure = None  # another shape may have set it
        pace = self.pace() | ({} if self.small else {"rounds": 3})
        times = alternate({"call": lambda: contender.prefill(ids)}, **pace)["call"]
        facts = {"flex_attention": describe_error(flex_kernel.failure)} if flex_kernel.failure else {}
        return times | facts | {"tokens_per_s": ids.numel() / times["median_s"]}

    def decode(self, contender: Contender, row: dict) -> dict:
        """Time one token of every sequence, as often as the time allows."""
        name = row["contender"]
        batch, context = row["batch"], row["context"]
        if name.startswith("dijiang"):
            cache = short_cache(contender, batch, min(context, STATE_TOKENS))
        else:
            cache = contender.filled_cache(batch, context)
        ids = contender.random_ids(batch, 1)
        facts = {}
        if name.endswith(("graph", "compiled")):
            forward = None
            if name.endswith("compiled"):
                torch.compiler.reset()
                backend = "eager" if self.small else "inductor"
                forward = torch.compile(contender.model.forward, dynamic=False, backend=backend)
            step = InPlaceStep(contender, cache, ids, context, forward)
            call = graphed_step(step)
            facts = {"agreement": agreement(step, call)}
            times = alternate({"call": call}, warmup=2, **self.pace())["call"]
        else:
            after = {"call": lambda: contender.step_back(cache)}
            times = alternate({"call": lambda: contender.step(ids, cache)}, after=after, warmup=3, **self.pace())["call"]
        floor = floor_seconds(*contender.least_work(batch, context), self.rates, "bfloat16")
        speed = {"tokens_per_s": batch / times["median_s"], "floor_s": floor, "of_floor": times["median_s"] / floor}
        return times | facts | speed


def tiny_config(shape: str) -> PreTrainedConfig:
    """The config of a shape with tiny sizes."""
    config = shape_config(shape)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return type(config)(**{key: heads.get(key, value) for key, value in (config.to_dict() | SMALL_SIZES).items()})


def targets(rows: list[dict]) -> list[dict]:
    """Speeds over the default cache at the paper's context with batches of 32 and more, against the paper's."""
    decoded = [row for row in rows if row["phase"] == "decode" and row["context"] == PAPER_CONTEXT and "median_s" in row]
    at = {(row["shape"], row["batch"], row["contender"]): row["median_s"] for row in decoded}
    lines = []
    for shape, (softmax, dijiang) in PAPER_SPEEDS.items():
        for batch in (32, 128):
            for name in ("dijiang", "dijiang graph"):
                if (shape, batch, name) in at and (shape, batch, "softmax") in at:
                    gain = at[shape, batch, "softmax"] / at[shape, batch, name]
                    where = (
                        f"decode, {shape}, {PAPER_CONTEXT:,} tokens, batch {batch}, {name}: times the default cache's speed"
                    )
                    lines.append(measure.target(where, round(dijiang / softmax, 2), gain))
    return lines


if __name__ == "__main__":
    run_bench("model", __doc__, Bench, plan=plan, cost=cost, targets=targets, facts=facts)
