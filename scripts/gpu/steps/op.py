"""
The linear-attention op, feature maps included, next to FlashAttention, forward and backward, against the card's rates.

    python scripts/gpu/steps/op.py --data DATA --results RESULTS [--small] [--seconds 90]

The op is `DiJiangLinearAttention.attend` without window, sinks and key weights, as in benchmarks/attention.py, in bfloat16
with 16 heads of 64. FlashAttention is torch's SDPA, restricted to that kernel. Our outputs and gradients are first compared
with an oracle: float32 features, sums in float64.

The floor is max(flops / rate of a large product, bytes / rate of a large copy or sum), both measured in the same call. A
forward pass moves q, k, v and o once and computes what the chunk form must (`measure.floor_flops`); forward and backward
together compute three times as much and move eleven such tensors: the four, again q, k, v and the gradient of o, and the
gradients of q, k and v.

B batch, T tokens, H heads, d head size, M features.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from shared import measure, run_bench, seconds_per_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dijiang.evaluate.latency.graphs import capture
from dijiang.evaluate.latency.timing import floor_seconds
from dijiang.modeling import DiJiangConfig, DiJiangModel
from dijiang.modeling.linear_attention import linear_attention, prefer_backend
from dijiang.modeling.linear_attention_fla import fla_is_usable

HEADS, SMALL_HEADS = 16, 2
HEAD_DIM = 64
DTYPE = torch.bfloat16
PAIRS = {128: True, 64: False}  # by number of features, whether they come in pairs
LENGTHS, MAIN = (65536, 2048, 4096, 8192, 32768), 16384  # the most informative first
SMALL_LENGTHS, SMALL_MAIN = (32,), 64
ORACLE_BLOCK = 256  # tokens per block
GRADIENTS_UP_TO = 16384  # tokens for which the oracle's gradients are taken
VARIANTS = {
    "flash": "scaled_dot_product_attention(is_causal=True), FlashAttention only",
    "dijiang": "our op as a model calls it, by the backend that it chooses for itself",
    "graph": "the same, captured as a CUDA graph, so that launches cost nothing",
    "fused": "an experiment, not what a model calls: the op in three Triton kernels of our own, features in registers",
    "fused graph": "the same, captured as a CUDA graph",
    "fla": "our op, its sums by flash-linear-attention's kernels",
    "torch": "our op, its sums by torch's matrix products",
    "tf32": "our op with TF32 for the float32 products of the feature maps",
    "compiled": "our op under torch.compile",
    "compiled tf32": "the same with TF32",
    "maps": "the feature maps of q and k alone",
    "maps tf32": "the same with TF32",
    "maps compiled": "the feature maps under torch.compile",
    "sums fla": "the sums alone, by flash-linear-attention's kernels, on features that are there already",
    "sums torch": "the same by torch's matrix products",
}
FUSED = ({"block": 32, "warps": 4, "stages": 1}, {"block": 32, "warps": 2, "stages": 1})
SPEED_GOAL, FLOOR_GOAL = 4, 2


def facts(device: torch.device, small: bool) -> dict:
    """Entries of the JSON."""
    return {
        "shape": {"heads": SMALL_HEADS if small else HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "variants": VARIANTS,
        "fla": dict(zip(("usable", "reason"), fla_is_usable(device), strict=True)),
    }


def cost(row: dict) -> float:
    """Seconds that a row may take."""
    return 20.0 if "compiled" in row["variant"] else 10.0 if row["variant"] == "fused" else 2.0


def plan(small: bool) -> list[dict]:
    """Every row, the most informative first."""
    main = SMALL_MAIN if small else MAIN
    lengths = SMALL_LENGTHS if small else LENGTHS
    rows = []

    def add(kind: str, tokens: int, batch: int, *variants: str) -> None:
        for features in PAIRS:
            for variant in variants:
                row = {"pass": kind, "tokens": tokens, "batch": batch, "features": features, "variant": variant}
                row |= {"features": None} if variant == "flash" else {}
                rows.extend([] if row in rows else [row])

    add("forward", main, 1, "flash", "dijiang", "graph", "fused", "fused graph", "fla", "torch", "tf32")
    add("forward + backward", main, 1, "flash", "dijiang", "fla", "torch", "tf32")
    add("parts", main, 1, "maps", "maps tf32", "sums fla", "sums torch")
    add("forward", main, 1, "compiled")
    for tokens in lengths:
        add("forward", tokens, 1, "flash", "dijiang", "graph", "fused graph", "fla", "torch")
    for tokens in lengths:
        add("forward + backward", tokens, 1, "flash", "dijiang", "fla", "torch")
    for kind in ("forward", "forward + backward"):
        for tokens in (main, *lengths):
            if tokens <= main:
                add(kind, tokens, 4, "flash", "dijiang", "fla", "torch")
    add("parts", main, 1, "maps compiled")
    add("forward + backward", main, 1, "compiled")
    add("forward", main, 1, "compiled tf32")
    return rows


def features_of(layer, q, k, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(q) and phi(k), (B, T, H, M), in the form that the sums take."""
    return layer.feature_map_q(q, None, layer.feature_scale).to(dtype), layer.key_features(k).to(dtype)


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Compute float32 products in TF32, or in full, for the length of a `with` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.compiler.disable
def oracle(layer, q, k, v) -> torch.Tensor:
    """The op on float32 features with sums in float64, (B, T, H, d)."""
    phi_q, phi_k = (x.double().transpose(1, 2) for x in features_of(layer, q.float(), k.float(), torch.float32))
    values = F.pad(v.double(), (0, 1), value=1.0).transpose(1, 2)  # a column of ones sums the weights
    state = 0.0
    outputs = []
    for start in range(0, q.shape[1], ORACLE_BLOCK):
        a, b, x = (y[:, :, start : start + ORACLE_BLOCK] for y in (phi_q, phi_k, values))
        o = (a @ b.transpose(-1, -2)).tril() @ x
        outputs.append(o if start == 0 else o + a @ state)
        state = state + b.transpose(-1, -2) @ x
    o = torch.cat(outputs, dim=2)
    return (o[..., :-1] / o[..., -1:]).transpose(1, 2)


def expected(layer, inputs: list[torch.Tensor], cotangent: torch.Tensor | None) -> list[torch.Tensor]:
    """The oracle's output for the first sequence or, with a cotangent, its gradients by q, k and v."""
    with precision(False):
        if cotangent is None:
            return [oracle(layer, *(x[:1] for x in inputs))]
        first = [x[:1].detach().clone().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(oracle(layer, *first), first, cotangent[:1].double()))


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """|output - reference| / |reference|, Euclidean norms."""
    reference = reference.detach().double()
    return float((output.detach().double() - reference).norm() / reference.norm())


class Bench:
    """Measures the rows of one run, which share layers, rates and the last output of the oracle."""

    def __init__(self, device: torch.device, small: bool, rates: dict):
        self.device = device
        self.small = small
        self.rates = rates
        self.heads = SMALL_HEADS if small else HEADS
        self.layers = {features: build_layer(features, self.heads, device) for features in PAIRS}
        self.reference: tuple = (None, None)  # what it is for, and the oracle's tensors
        self.tried: dict[str, float] = {}  # seconds of the fused kernels by their options, written as JSON

    def measure_row(self, row: dict) -> dict:
        """Time one variant, after a comparison of its output with the oracle's."""
        variant = row["variant"]
        if "fla" in variant.split() and not (usable := fla_is_usable(self.device))[0]:
            return {"left_out": usable[1]}
        if {"graph", "fused"} & set(variant.split()) and self.device.type != "cuda":
            return {"left_out": "it needs a GPU"}
        layer = self.layers.get(row["features"])
        inputs = self.inputs(row)
        backward = row["pass"] == "forward + backward"
        weights = [] if layer is None else [*layer.feature_map_q.parameters(), *layer.feature_map_k.parameters()]
        with torch.set_grad_enabled(backward), precision("tf32" in variant), chosen_backend(variant):
            call = forward = self.forward_of(row, layer, inputs)
            result = {}
            if backward:
                leaves, cotangent = inputs + weights, random_like(inputs[0])
                call = lambda: torch.autograd.grad(forward(), leaves, cotangent)  # noqa: E731
            if row["pass"] != "parts" and layer is not None:
                result = self.errors(row, layer, inputs, call, cotangent if backward else None)
            options = {"rounds": 2, "seconds": 0.0, "warmup": 1} if self.small else {}
            result |= seconds_per_call(call, self.device, **options)
        if row["pass"] == "parts" or layer is None:
            return result
        if "fused" in variant:
            result["tried"] = self.tried
        count = row["batch"] * row["tokens"]
        flops = measure.floor_flops(count, self.heads, HEAD_DIM, row["features"]) * (3 if backward else 1)
        moved = inputs[0].nbytes * (11 if backward else 4)
        floor = floor_seconds(flops, moved, self.rates, "bfloat16")
        return result | {"flops": flops, "bytes": moved, "floor_s": floor, "of_floor": result["median_s"] / floor}

    def inputs(self, row: dict) -> list[torch.Tensor]:
        """q, k, v (B, T, H, d), in the layout that projections leave; always the same for a shape."""
        generator = torch.Generator(self.device).manual_seed(row["tokens"])
        shape = (row["batch"], row["tokens"], self.heads, HEAD_DIM)
        inputs = [torch.randn(shape, generator=generator, device=self.device).to(DTYPE) for _ in "qkv"]
        return [x.requires_grad_(row["pass"] == "forward + backward") for x in inputs]

    def forward_of(self, row: dict, layer, inputs: list[torch.Tensor]) -> Callable:
        """The forward call of a row."""
        variant = row["variant"].removesuffix(" tf32")
        if variant == "flash":
            return lambda: flash_attention(*inputs)
        plain = self.fused(layer, inputs) if "fused" in variant else lambda: layer.attend(*inputs)[0]
        if "graph" in variant:
            graph, outputs = capture(plain, self.device)
            return lambda: (graph.replay(), outputs)[1]
        if variant == "compiled":
            attend = self.compiled(layer.attend)
            return lambda: attend(*inputs)[0]
        if row["pass"] == "parts":
            maps = lambda: features_of(layer, *inputs[:2], DTYPE)  # noqa: E731
            if variant == "maps":
                return maps
            if variant == "maps compiled":
                compiled = self.compiled(lambda q, k: features_of(layer, q, k, DTYPE))
                return lambda: compiled(*inputs[:2])
            phi = maps()
            return lambda: linear_attention(*phi, inputs[2])
        return plain

    def fused(self, layer, inputs: list[torch.Tensor]) -> Callable:
        """A call of the fused kernels with the options that were fastest when they were first tried."""
        from fused_forward import fused_forward

        if not self.tried:
            for options in FUSED:
                call = lambda options=options: fused_forward(layer, *inputs, **options)  # noqa: E731
                with contextlib.suppress(Exception):  # options that do not fit this card
                    self.tried[json.dumps(options)] = seconds_per_call(call, self.device)["median_s"]
        if not self.tried:
            return lambda: fused_forward(layer, *inputs, **FUSED[0])
        best = json.loads(min(self.tried, key=self.tried.get))
        return lambda: fused_forward(layer, *inputs, **best)

    def compiled(self, function: Callable) -> Callable:
        """Compile; a small run only traces, because generating code takes long on a CPU."""
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, backend="eager" if self.small else "inductor")

    def errors(self, row: dict, layer, inputs: list, call: Callable, cotangent: torch.Tensor | None) -> dict:
        """Relative errors of the first sequence's output or gradients against the oracle's."""
        if cotangent is not None and row["tokens"] > GRADIENTS_UP_TO:
            return {}
        key = (row["pass"], row["tokens"], row["batch"], row["features"])
        if self.reference[0] != key:
            self.reference = (None, None)  # frees its memory first
            self.reference = (key, expected(layer, inputs, cotangent))
        results = [call()] if cotangent is None else call()[:3]
        names = ["o"] if cotangent is None else ["dq", "dk", "dv"]
        pairs = zip(names, results, self.reference[1], strict=True)
        return {"relative_error": {name: relative_error(x[:1], reference) for name, x, reference in pairs}}


def build_layer(features: int, heads: int, device: torch.device):
    config = DiJiangConfig(
        hidden_size=heads * HEAD_DIM, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        attention_window=0, attention_sinks=0, key_scale=False, feature_pairs=PAIRS[features], feature_seed=1,
    )  # fmt: skip
    layer = DiJiangModel(config).layers[0].self_attn.to(device, DTYPE).eval()
    layer.feature_map_q.float()  # as in a checkpoint
    layer.feature_map_k.float()
    return layer


def flash_attention(q, k, v) -> torch.Tensor:
    """Output (B, T, H, d), from transposed views as in a transformers model."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def chosen_backend(variant: str) -> contextlib.AbstractContextManager:
    """Have sums computed by `fla` or `torch` if the variant names one, else by the op's own choice."""
    return prefer_backend(next((word for word in variant.split() if word in ("fla", "torch")), "auto"))


def random_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device).to(x.dtype)


def targets(rows: list[dict], main: int = MAIN) -> list[dict]:
    """The goals at the main length, for the op as a model calls it and for the fastest variant."""
    at_main = [row for row in rows if (row["pass"], row["tokens"], row["batch"]) == ("forward", main, 1) and "median_s" in row]
    flash = next((row["median_s"] for row in at_main if row["variant"] == "flash"), None)
    lines = []
    for features in PAIRS:
        own = {row["variant"]: row for row in at_main if row["features"] == features}
        if not own:
            continue
        best = min(own, key=lambda name: own[name]["median_s"])
        for name in dict.fromkeys([*(["dijiang"] if "dijiang" in own else []), best]):
            where = f"op forward, {main:,} tokens, m={features}, {name}"
            if flash:
                gain = flash / own[name]["median_s"]
                lines.append(measure.target(f"{where}: times FlashAttention's speed", SPEED_GOAL, gain))
            lines.append(measure.target(f"{where}: time / floor", FLOOR_GOAL, own[name]["of_floor"], at_most=True))
    return lines


if __name__ == "__main__":
    run_bench("op", __doc__, Bench, plan=plan, cost=cost, targets=targets, facts=facts)
