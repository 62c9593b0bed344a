"""
Whole models: a decoding step and a prompt, beside transformers' own class with its default cache, a static one, CUDA graphs
and torch.compile. Random weights in known shapes, bfloat16.

    python scripts/gpu/steps/model.py --data DATA --results RESULTS [--small] [--seconds 120]

A decoding step takes one token of every sequence after so many tokens of context, until the next tokens are known to the host.
The paper's Table 1 is at 2,048 tokens (arXiv 2403.19928; its ratios are over the default cache, on an A800); longer contexts
are those of its Figure 4.
"""

import torch
from transformers import PreTrainedConfig

from common import Record, arguments, card_rates, device_of, measure, one_line
from dijiang.checkpoint.shapes import shape_config
from dijiang.evaluate.latency.contenders import Contender, contenders
from dijiang.evaluate.latency.graphs import InPlaceStep, agreement, graphed_step, short_cache
from dijiang.evaluate.latency.measure import PAPER_CONTEXT, PAPER_SPEEDS
from dijiang.evaluate.latency.models import SPARE_BYTES, config_pair, shortage
from dijiang.evaluate.latency.timing import PeakMemory, alternate, floor_seconds, trim, waiting_for
from dijiang.modeling.window_attention_flex import flex_is_broken

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


def plan(small: bool) -> list[dict]:
    """Every row, the most telling first."""
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
    """What the rows of one run share: models of a shape, and the card's rates."""

    def __init__(self, device: torch.device, small: bool, rates: dict):
        self.device, self.small, self.rates = device, small, rates
        self.sides: dict[str, dict[str, Contender]] = {}

    def measure_row(self, row: dict) -> dict:
        """Time one contender, alone on the card but for the models' weights."""
        side, batch, context = self.contender(row), row["batch"], row["context"]
        trim()
        needed = side.cache_bytes(batch, context) * (1 + 2 / side.model.config.num_hidden_layers) + SPARE_BYTES
        if not self.small and shortage(needed, self.device):
            self.sides = {row["shape"]: self.sides[row["shape"]]}  # the weights of other shapes can be made again
            trim()
            torch.cuda.empty_cache()
            if reason := shortage(needed, self.device):
                return {"left_out": reason}
        facts = {"cache_bytes": side.cache_bytes(batch, context)}
        with PeakMemory(self.device) as peak:
            found = self.prefill(side, row) if row["phase"] == "prefill" else self.decode(side, row)
        return found | facts | {"peak_bytes": peak.bytes}

    def contender(self, row: dict) -> Contender:
        """The model and cache of a row; models are kept for the rows to come."""
        shape = row["shape"]
        if shape not in self.sides:
            config = tiny_config(shape) if self.small else shape_config(shape)
            where = {"device": self.device.type, "dtype": "float32" if self.small else "bfloat16"}
            try:
                pair = config_pair(shape, config, longest=LONGEST, **where)
            except ValueError:  # no room: those of other shapes can be made again
                self.sides.clear()
                trim()
                torch.cuda.empty_cache()
                pair = config_pair(shape, config, longest=LONGEST, **where)
            self.sides[shape] = contenders(pair)
        name = row["contender"].removesuffix(" graph").removesuffix(" compiled")
        return self.sides[shape][name]

    def pace(self) -> dict:
        wait = waiting_for(self.device)
        return {"rounds": 2, "seconds": 0.0, "wait": wait} if self.small else {"rounds": 5, "seconds": 0.3, "wait": wait}

    def prefill(self, side: Contender, row: dict) -> dict:
        """Read a prompt of random tokens into a new cache, until the first token is known."""
        ids = side.random_ids(row["batch"], row["context"])
        flex_is_broken.clear()  # by another shape
        found = alternate({"call": lambda: side.prefill(ids)}, **self.pace() | ({} if self.small else {"rounds": 3}))["call"]
        facts = {"flex_attention": one_line(flex_is_broken[0])} if flex_is_broken else {}
        return found | facts | {"tokens_per_s": ids.numel() / found["median_s"]}

    def decode(self, side: Contender, row: dict) -> dict:
        """One token of every sequence, as often as the time allows."""
        name, batch, context = row["contender"], row["batch"], row["context"]
        own = name.startswith("dijiang")
        cache = short_cache(side, batch, min(context, STATE_TOKENS)) if own else side.filled_cache(batch, context)
        ids, facts = side.random_ids(batch, 1), {}
        if name.endswith(("graph", "compiled")):
            forward = None
            if name.endswith("compiled"):
                torch.compiler.reset()
                forward = torch.compile(side.model.forward, dynamic=False, backend="eager" if self.small else "inductor")
            step = InPlaceStep(side, cache, ids, context, forward)
            call = graphed_step(step)
            facts, calls = {"agreement": agreement(step, call)}, {"call": call}
            found = alternate(calls, warmup=2, **self.pace())["call"]
        else:
            calls, after = {"call": lambda: side.step(ids, cache)}, {"call": lambda: side.step_back(cache)}
            found = alternate(calls, after=after, warmup=3, **self.pace())["call"]
        floor = floor_seconds(*side.least_work(batch, context), self.rates, "bfloat16")
        return found | facts | {
            "tokens_per_s": batch / found["median_s"],
            "floor_s": floor,
            "of_floor": found["median_s"] / floor,
        }  # fmt: skip


def tiny_config(shape: str) -> PreTrainedConfig:
    """The config of a shape, of hardly any size."""
    config = shape_config(shape)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return type(config)(**{key: heads.get(key, value) for key, value in (config.to_dict() | SMALL_SIZES).items()})


def targets(rows: list[dict]) -> list[dict]:
    """Speeds over the default cache at the paper's context, batch 32 and more, against the paper's."""
    at = {(row["shape"], row["batch"], row["contender"]): row["median_s"] for row in rows
          if row["phase"] == "decode" and row["context"] == PAPER_CONTEXT and "median_s" in row}  # fmt: skip
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


def main() -> None:
    options = arguments(__doc__)
    record, device = Record("model", options), device_of(options.small)
    torch.manual_seed(0)
    rates = record.data.get("limits") or card_rates(device, options.small)
    record.data |= {"dtype": "float32" if options.small else "bfloat16", "preset": "recommended", "contenders": WORDS}
    record.data |= {"limits": rates}
    record.save()
    bench = Bench(device, options.small, rates)
    record.run(
        plan(options.small),
        bench.measure_row,
        cost=cost,
        after=lambda rows: {"targets": [] if options.small else targets(rows)},
    )
    record.finish()


if __name__ == "__main__":
    main()
