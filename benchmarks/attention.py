"""
The linear-attention op, feature map included, against softmax attention and other linear attentions, at SmolLM2-135M's heads.

    python benchmarks/attention.py [--dtype float32 bfloat16] [--tokens 2048 8192 32768] [--threads 2] [--quick]
        [--backend auto|torch|native] [--pieces | --compile] [--output benchmarks/results/attention.json]

The op is `DiJiangLinearAttention.attend` without window, sinks and key weights: maps of queries and keys, then the chunk form,
then the division by the sum of weights. All contenders of a comparison take turns.

The floor at T tokens is max(flops / rate of a large matrix product, bytes of q, k, v and o / rate of a large copy), both rates
measured in the same run; `measure.floor_flops` counts the flops.

Inputs are (B, T, H, d) in memory, as projections leave them; SDPA sees transposed views, as it does in a transformers model.
"""

import argparse
import contextlib
import io
import itertools
import json
import shutil
import warnings

import measure
import torch
import torch.nn.functional as F

from dijiang.common.memory import PeakMemory
from dijiang.evaluate.latency.timing import alternate, floor_seconds, machine_limits, ratios
from dijiang.modeling import DiJiangConfig, DiJiangModel, layer_linear_heads, linear_attention_chunk

HEADS, HEAD_DIM = 9, 64  # of SmolLM2-135M, every query head with keys and values of its own
FEATURES = {64: False, 128: True}  # by number of features m, whether they come in pairs
FORWARD_GOALS = {64: {2048: 1.5, 8192: 9, 32768: 25}, 128: {2048: 1.1, 8192: 5, 32768: 14}}
BACKWARD_TOKENS = OTHERS_TOKENS = (2048, 8192)
GROWTH_TOKENS = tuple(1 << i for i in range(12, 17))
PIECES, BLOCKS = (128, 256, 512, 1024, 2048, 4096), (32, 64, 128)
PEERS = {
    "sdpa": "torch.nn.functional.scaled_dot_product_attention(is_causal=True)",
    "fla linear_attn": "fla.ops.linear_attn.naive.naive_chunk_linear_attn(scale=1, normalize=True) on our softmax features in "
    "the dtype of the values; the time of the feature maps is included",
    "fla simple_gla": "fla.ops.simple_gla.naive.naive_chunk_simple_gla(scale=1) in float32 on our softmax features, no decay "
    "(g = 0), a column of ones in v for the sum of weights and the division by it; the time of the feature maps is included",
    "performer": "performer_pytorch.FastAttention(causal=True, nb_features=m), its own softmax kernel features, on its "
    "causal_linear_attention_noncuda, since its CUDA product is not there",
}


def random_inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v of shape (1, tokens, heads, d)."""
    return [torch.randn(1, tokens, HEADS, HEAD_DIM, dtype=dtype) for _ in range(3)]


def build_layer(features: int, activation: str, dtype: torch.dtype):
    config = DiJiangConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        attention_window=0, attention_sinks=0, key_scale=False, feature_pairs=FEATURES[features],
        feature_activation=activation, feature_seed=1,
    )  # fmt: skip
    layer = DiJiangModel(config).layers[0].self_attn.to(dtype)
    layer.feature_map_q.float()  # as in a checkpoint
    layer.feature_map_k.float()
    return layer


def softmax_attention(q, k, v) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)


def other_calls(layers: dict, q, k, v) -> dict:
    """Calls of other linear attentions, as far as they are installed."""
    calls = {}
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla warns that there is no GPU
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla

        def linear_attn(layer):
            phi = layer.feature_map_q(q, None, layer.feature_scale), layer.key_features(k)
            return naive_chunk_linear_attn(*(x.to(v.dtype) for x in phi), v, scale=1.0, normalize=True)

        def simple_gla(layer):
            phi = layer.feature_map_q(q, None, layer.feature_scale), layer.key_features(k)
            o, _ = naive_chunk_simple_gla(*phi, F.pad(v, (0, 1), value=1.0), q.new_zeros(q.shape[:3]), scale=1.0)
            return (o[..., :-1] / o[..., -1:]).to(v.dtype)

        for m in FEATURES:
            layer = layers[f"softmax m={m}"]
            calls[f"fla linear_attn m={m}"] = lambda layer=layer: linear_attn(layer)
            calls[f"fla simple_gla m={m}"] = lambda layer=layer: simple_gla(layer)
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # performer uses names that Python has deprecated
        from performer_pytorch import FastAttention

        for m in FEATURES:
            attention = FastAttention(dim_heads=HEAD_DIM, nb_features=m, causal=True)
            calls[f"performer m={m}"] = lambda f=attention: f(*(x.transpose(1, 2) for x in (q, k, v)))
    return calls


@torch.no_grad()
def compare_forward(layers: dict, dtype: str, tokens: int, others: bool, rounds: int, seconds: float) -> dict:
    q, k, v = random_inputs(tokens, getattr(torch, dtype))
    calls = {"sdpa": lambda: softmax_attention(q, k, v)}
    calls |= {name: lambda layer=layer: layer.attend(q, k, v) for name, layer in layers.items()}
    calls |= other_calls(layers, q, k, v) if others else {}
    return row(f"forward, {dtype}, {tokens:,} tokens", dtype, tokens, alternate(calls, rounds=rounds, seconds=seconds))


def row(title: str, dtype: str, tokens: int, timings: dict, peer: str = "sdpa") -> dict:
    measure.show_timings(title, timings, peer)
    return {"dtype": dtype, "tokens": tokens, "timings": timings, "ratios": ratios(timings, peer)}


def compare_backward(layers: dict, dtype: str, tokens: int, rounds: int, seconds: float) -> dict:
    """Time forward and backward, ours including the gradients of the feature maps' weights."""
    inputs = [x.requires_grad_() for x in random_inputs(tokens, getattr(torch, dtype))]
    cotangent = torch.randn_like(inputs[0])

    def ours(layer):
        weights = [*layer.feature_map_q.parameters(), *layer.feature_map_k.parameters()]
        return torch.autograd.grad(layer.attend(*inputs)[0], inputs + weights, cotangent)

    calls = {"sdpa": lambda: torch.autograd.grad(softmax_attention(*inputs), inputs, cotangent.transpose(1, 2))}
    calls |= {name: lambda layer=layer: ours(layer) for name, layer in layers.items()}
    timings = alternate(calls, rounds=rounds, seconds=seconds)
    return row(f"forward + backward, {dtype}, {tokens:,} tokens", dtype, tokens, timings)


@torch.no_grad()
def growth(layer, features: int, dtype: str, lengths, limits: dict, rounds: int, seconds: float) -> dict:
    """Measure the time against the length and against the floor."""
    inputs = {tokens: random_inputs(tokens, getattr(torch, dtype)) for tokens in lengths}
    calls = {tokens: lambda x=x: layer.attend(*x) for tokens, x in inputs.items()}
    timings = alternate(calls, rounds=rounds, seconds=seconds)
    times = [timings[tokens]["median_s"] for tokens in lengths]
    rows = []
    for tokens, time in zip(lengths, times, strict=True):
        moved = 4 * inputs[tokens][0].nbytes
        flops = measure.floor_flops(tokens, HEADS, HEAD_DIM, features)
        floor = floor_seconds(flops, moved, limits, dtype)
        costs = {"flops": flops, "bytes": moved, "floor_s": floor, "time_per_floor": time / floor}
        rows.append({"tokens": tokens, "timing": timings[tokens], **costs})
    doublings = [after / before for before, after in itertools.pairwise(times)]
    shown = [[r["tokens"], 1e3 * t, *d, 1e3 * r["floor_s"], r["time_per_floor"]]
             for r, t, d in zip(rows, times, [["-"], *([d] for d in doublings)], strict=True)]  # fmt: skip
    title = f"Growth and floor, {dtype}, m={features}"
    measure.show(title, ["tokens", "median ms", "times the one above", "floor ms", "time / floor"], shown)
    return {"dtype": dtype, "features": features, "rows": rows, "per_doubling": doublings}


@torch.no_grad()
def memory_of_one(tokens: int, features: int, dtype: str) -> dict[str, int]:
    """Peak of one forward pass in this process, including its inputs and outputs."""
    layer = build_layer(features, "softmax", getattr(torch, dtype))
    layer.attend(*random_inputs(256, getattr(torch, dtype)))  # libraries allocate their buffers
    with PeakMemory() as peak:
        inputs = random_inputs(tokens, getattr(torch, dtype))
        o, _ = layer.attend(*inputs)
    return {"peak_bytes": peak.bytes, "input_output_bytes": sum(x.nbytes for x in (*inputs, o))}


@torch.no_grad()
def try_pieces(dtype: str, tokens: int, rounds: int) -> list[dict]:
    """Measure the time against tokens per piece and per block, which are constants of the modules."""
    inputs = random_inputs(tokens, getattr(torch, dtype))
    rows = []
    defaults = (linear_attention_chunk.PIECE, linear_attention_chunk.CHUNK_SIZE)

    def run(layer, piece, block):
        linear_attention_chunk.PIECE = layer_linear_heads.PIECE = piece
        linear_attention_chunk.CHUNK_SIZE = block
        return layer.attend(*inputs)

    for m in FEATURES:
        layer = build_layer(m, "softmax", getattr(torch, dtype))
        calls = {(p, b): lambda layer=layer, p=p, b=b: run(layer, p, b) for p in PIECES for b in BLOCKS}
        timings = alternate(calls, rounds=rounds, seconds=10.0)
        ms = {pair: 1e3 * x["median_s"] for pair, x in timings.items()}
        title = f"ms at {tokens:,} tokens, {dtype}, m={m}; in use: pieces of {defaults[0]}, blocks of {defaults[1]}"
        measure.show(title, ["piece", *(f"block {b}" for b in BLOCKS)], [[p, *(ms[p, b] for b in BLOCKS)] for p in PIECES])
        common = {"dtype": dtype, "tokens": tokens, "features": m}
        rows += [{**common, "piece": p, "block": b, "timing": timings[p, b]} for p, b in calls]
    return rows


@torch.no_grad()
def try_compile(layers: dict, dtype: str, tokens: int, rounds: int) -> dict:
    """Time the op without and with torch.compile."""
    inputs = random_inputs(tokens, getattr(torch, dtype))
    calls = {}
    for name, layer in layers.items():
        compiled = torch.compile(layer.attend, dynamic=False)
        calls |= {name: lambda f=layer.attend: f(*inputs)[0], f"{name} compiled": lambda f=compiled: f(*inputs)[0]}
    timings = alternate(calls, rounds=rounds, seconds=3.0, warmup=2)
    gains = {name: timings[name]["median_s"] / timings[f"{name} compiled"]["median_s"] for name in layers}
    rows = [[n, 1e3 * timings[n]["median_s"], 1e3 * timings[f"{n} compiled"]["median_s"], g] for n, g in gains.items()]
    measure.show(f"torch.compile, {dtype}, {tokens:,} tokens", ["", "ms", "ms compiled", "times faster"], rows)
    return {"dtype": dtype, "tokens": tokens, "timings": timings, "ratios": gains}


def targets(result: dict) -> list[dict]:
    """The goals that this run measured, and whether they are met."""
    lines = []
    for r in result["forward"]:
        times = {name: x["median_s"] for name, x in r["timings"].items()}
        for m, goals in FORWARD_GOALS.items():
            where = f"{r['dtype']}, {r['tokens']:,} tokens"
            for name in (f"softmax m={m}", f"exp m={m}"):
                if r["tokens"] in goals:
                    lines.append(measure.target(f"forward, {where}, {name}, vs SDPA", goals[r["tokens"]], r["ratios"][name]))
            for peer in ("fla", "performer") if r["tokens"] == 8192 else ():
                peer_times = [t for name, t in times.items() if name.startswith(peer) and name.endswith(f" m={m}")]
                if peer_times:
                    gain = min(peer_times) / times[f"softmax m={m}"]
                    lines.append(measure.target(f"forward, {where}, softmax m={m}, vs the fastest {peer}", 3, gain))
    for r in result["backward"]:
        for m in FEATURES if r["tokens"] == 8192 else ():
            name = f"forward + backward, {r['dtype']}, 8,192 tokens, softmax m={m}, vs SDPA"
            lines.append(measure.target(name, 4, r["ratios"][f"softmax m={m}"]))
    for r in result["growth"]:
        what = f"{r['dtype']}, softmax m={r['features']}"
        floors = [x["time_per_floor"] for x in r["rows"]]
        name = f"worst growth of time per doubling, 4k to 64k, {what}"
        lines.append(measure.target(name, 2.1, max(r["per_doubling"]), at_most=True))
        lines.append(measure.target(f"worst time / floor, 4k to 64k, {what}", 2, max(floors), at_most=True))
    for r in result["memory"]:
        name = f"peak memory / (inputs + outputs), 32,768 tokens, {r['dtype']}, softmax m={r['features']}"
        lines.append(measure.target(name, 4, r["peak_bytes"] / r["input_output_bytes"], at_most=True))
    return lines


def run(arguments: argparse.Namespace) -> dict:
    """Run every comparison but those of `--pieces` and `--compile`."""
    quick = arguments.quick
    rounds = arguments.rounds
    seconds = 0.0 if quick else 3.0
    lengths, others = ((128, 256), (128,)) if quick else (arguments.tokens, OTHERS_TOKENS)
    result = {"peers": PEERS, "limits": machine_limits(arguments.dtype, quick), "backend": {}}
    result |= {"forward": [], "backward": [], "growth": [], "memory": []}
    for dtype in arguments.dtype:
        layers = {f"{a} m={m}": build_layer(m, a, getattr(torch, dtype)) for m in FEATURES for a in ("softmax", "exp")}
        first, sample = layers["softmax m=64"], random_inputs(256, getattr(torch, dtype))
        with torch.no_grad():
            ran = {"forward": measure.backend_of(lambda f=first, x=sample: f.attend(*x))}
        ran["forward + backward"] = measure.backend_of(lambda f=first, x=sample: f.attend(*x))
        result["backend"][dtype] = measure.check_backend(arguments.backend, ran)
        for tokens in lengths:
            result["forward"].append(compare_forward(layers, dtype, tokens, tokens in others, rounds, seconds))
        for tokens in (128,) if quick else BACKWARD_TOKENS:
            result["backward"].append(compare_backward(layers, dtype, tokens, rounds, seconds))
        for m in FEATURES:
            sizes = (128, 256) if quick else GROWTH_TOKENS
            pace = (rounds, 2 * seconds)
            result["growth"].append(growth(layers[f"softmax m={m}"], m, dtype, sizes, result["limits"], *pace))
        for m in (64,) if quick else FEATURES:
            tokens, options = 1024 if quick else 32768, ("--backend", arguments.backend, "--threads", arguments.threads)
            sizes = measure.run_fresh(__file__, *options, "--one", tokens, m, dtype)
            result["memory"].append({"dtype": dtype, "features": m, "tokens": tokens} | sizes)
    shown = [[f"{r['dtype']} m={r['features']}", r["tokens"], r["peak_bytes"], r["input_output_bytes"],
              r["peak_bytes"] / r["input_output_bytes"]] for r in result["memory"]]  # fmt: skip
    measure.show("Peak memory of a forward, inputs included", ["", "tokens", "peak bytes", "in + out", "ratio"], shown)
    return result | {"targets": [] if quick else targets(result)}


def main() -> None:
    parser = measure.common_arguments(__doc__, ["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 32768], help="of the forward comparison")
    parser.add_argument("--pieces", action="store_true", help="only time against tokens per piece and block")
    parser.add_argument("--compile", action="store_true", help="only the op under torch.compile")
    parser.add_argument("--one", nargs=3, metavar=("TOKENS", "FEATURES", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pieces:
        arguments.backend = "torch"  # only torch's form has pieces
    measure.prepare(arguments)
    if arguments.one:
        tokens, features, dtype = arguments.one
        print(json.dumps(memory_of_one(int(tokens), int(features), dtype)))
        return
    result = measure.header(arguments, "attention", "flash-linear-attention", "performer-pytorch", "triton")
    result["shape"] = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM}
    if arguments.pieces:
        tokens = 256 if arguments.quick else 8192
        result["pieces"] = [x for dtype in arguments.dtype for x in try_pieces(dtype, tokens, arguments.rounds)]
    elif arguments.compile:
        if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
            raise SystemExit("torch.compile needs a C++ compiler, and none is on the path")
        result["compile"] = []
        for dtype in arguments.dtype:
            layers = {f"softmax m={m}": build_layer(m, "softmax", getattr(torch, dtype)) for m in FEATURES}
            for tokens in (256,) if arguments.quick else (2048, 8192):
                result["compile"].append(try_compile(layers, dtype, tokens, arguments.rounds))
    else:
        result |= run(arguments)
    if arguments.output or not (arguments.pieces or arguments.compile):
        measure.finish(arguments, "attention", result)


if __name__ == "__main__":
    main()
