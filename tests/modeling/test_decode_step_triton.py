"""
The decoding step in Triton against the same step in torch: on a CPU in Triton's interpreter, for which this file is run by
itself, in a process where triton is imported with TRITON_INTERPRET=1, and on a GPU.
"""

import copy
import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from dijiang_testing.model_checks import DECAYS, WINDOWS, random_ids, tiny_model

from dijiang.modeling import decode_step_triton, optional_kernel

MAPS_IN_TRITON = ("wdcf", "ldcf", "wpff", "pff", "prf", "hedgehog")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROMPT = 30


def torch_only():
    """Within the block decoding steps run on torch."""
    return patch.dict(os.environ, DIJIANG_NATIVE="0")


def settled_layer(*, dtype, B=2, seed=0, device="cpu", steps=1, heads=(4, 2), d=8, settings=None):
    """A layer in eval mode, its state after a prompt, and q, k, v of some steps as `project` gives them: views."""
    (H, G), settings = heads, settings or {}
    sizes = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": d}
    layer = tiny_model(seed, **sizes, **settings).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(seed)
    T = PROMPT + layer.window + layer.sinks
    qk = torch.randn(B, T + steps, H + G, d, generator=generator).to(device, dtype)
    v = torch.randn(B, T + steps, G, d, generator=generator).to(device, dtype)
    q, k = qk.split((H, G), dim=2)
    with torch.no_grad(), torch_only():
        _, state = layer.to(device).attend(q[:, :T], k[:, :T], v[:, :T])
    assert state.settled
    return layer, state.compact(), [tuple(x[:, t : t + 1] for x in (q, k, v)) for t in range(T, T + steps)]


@torch.no_grad()
def errors(*, reorder=None, tile=None, large=False, **run) -> dict[str, float]:
    """
    Largest error of each result after some steps, relative to the largest value expected.

    Args:
        reorder: rows of the batch that a beam search keeps after each step.
        tile: of `triton_step`, so that small sizes take several blocks.
        large: tokens and weights of keys so large that exponents are clamped.
    """
    layer, state, tokens = settled_layer(**run)
    if large:
        layer.key_scale.bias += 100.0
        tokens = [tuple(x * 40 for x in token) for token in tokens]
    kernel_state = expected_state = state
    outputs, expected = [], []
    with patch.object(decode_step_triton, "TILE", tile) if tile else nullcontext():
        for token in tokens:
            before = [x.clone() for x in kernel_state.tensors()]
            result = decode_step_triton.triton_step(layer.step_weights(), *token, kernel_state)
            assert result is not None, decode_step_triton.kernel.failure
            assert all(map(torch.equal, before, kernel_state.tensors())), "the old state has changed"
            with torch_only():
                o, expected_state = layer.attend_step(*token, expected_state)
            kernel_state = result[1]
            outputs.append(result[0])
            expected.append(o)
            if reorder:
                select = partial(torch.index_select, dim=0, index=torch.tensor(reorder, device=o.device))
                kernel_state, expected_state = kernel_state.map(select), expected_state.map(select)
    pairs = {"o": (torch.cat(outputs, 1), torch.cat(expected, 1))}
    for name, x in vars(expected_state).items():
        y = getattr(kernel_state, name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape and y.is_contiguous() >= x.is_contiguous(), name
            pairs[name] = (y, x)
        else:
            assert x == y, name
    for name in ("window_k", "window_v", "tokens"):
        assert torch.equal(*pairs.pop(name)), name
    assert all(torch.isfinite(x).all() for x in pairs["o"]) and pairs["o"][0].dtype == torch.float32
    return {
        name: ((y.double() - x.double()).abs().max() / x.double().abs().max().clamp_min(1e-6)).item()
        for name, (y, x) in pairs.items()
        if x.numel()
    }


def make_runs() -> dict[str, dict]:
    """Arguments of `errors` by name, small enough for Triton's interpreter."""
    runs = {}
    variants = ({}, {"feature_pairs": False, "key_scale": False, "scale_features": False}, {"feature_activation": "exp"})
    for i, (name, decay, window) in enumerate(itertools.product(MAPS_IN_TRITON, DECAYS, WINDOWS)):
        # every dtype and every variant meets each map, each decay and each window
        dtype, variant = DTYPES[(i + i // 3 + i // 9) % 3], variants[(i + 2 * (i // 3) + i // 27) % 3]
        if name == "prf" and variant is variants[2]:
            variant = {}  # not one matrix
        settings = {
            "feature_map": name,
            "decay": decay,
            "attention_window": window[0],
            "attention_sinks": window[1],
            **variant,
        }
        label = " ".join([name, decay, str(window), str(dtype)[6:], *variant])
        runs[label] = dict(dtype=dtype, heads=((4, 2), (3, 1), (2, 2))[i % 3], seed=i, settings=settings)
    plain = {"decay": "learned"}
    wide = plain | {"attention_window": 41, "attention_sinks": 3, "feature_dim": 37}
    runs |= {
        "several steps": dict(dtype=torch.float32, steps=5, settings=plain),
        "several steps, halves": dict(dtype=torch.bfloat16, steps=3, settings=plain),
        "beams": dict(dtype=torch.float32, B=3, steps=3, reorder=[2, 0, 0], heads=(2, 1), settings=plain),
        "several blocks and slices": dict(dtype=torch.float32, d=40, tile=256, heads=(3, 1), B=1, settings=wide),
        "several blocks, unpaired": dict(
            dtype=torch.bfloat16, d=12, tile=256, steps=2, settings=wide | {"feature_map": "ldcf", "feature_pairs": False}
        ),
        "no denominator": dict(
            dtype=torch.float32,
            steps=2,
            settings={"decay": "retnet", "normalize": False, "attention_window": 0, "attention_sinks": 0},
        ),
        "clamped": dict(dtype=torch.float32, large=True, settings={"feature_activation": "exp"}),
    }
    return runs


RUNS = make_runs()
LIMIT = 2e-5


def check(errors_by_run: dict[str, dict[str, float]], limit: float) -> None:
    wrong = {
        f"{run}: {part}": f"{x:.1e}" for run, parts in errors_by_run.items() for part, x in parts.items() if not x < limit
    }
    assert not wrong, f"relative errors above {limit}: {wrong}"


@torch.no_grad()
def generated(device: str = "cpu") -> dict[str, list]:
    """What a model writes with and without the kernel, and how often it was launched."""
    model = tiny_model(num_attention_heads=2, num_key_value_heads=1, decay="learned").to(device)
    ids = random_ids(2, 15).to(device)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with patch.object(decode_step_triton, "launch", wraps=decode_step_triton.launch) as launch:
        tokens = model.generate(ids, **options)
    with torch_only():
        expected = model.generate(ids, **options)
        cache = model(ids, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    logits = [model(ids[:, :1], past_key_values=x).logits for x in (cache, copied)]
    same = torch.equal(*logits)
    return {"tokens": tokens.tolist(), "expected": expected.tolist(), "launches": launch.call_count, "copies agree": same}


def check_generated(result: dict) -> None:
    assert result["tokens"] == result["expected"] and result["copies agree"]
    assert result["launches"] == 2 * 3  # layers, tokens after that of the prompt


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_equals_the_step_in_torch():
    done = subprocess.run(
        [sys.executable, Path(__file__)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DIJIANG_NATIVE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["errors"].keys() == RUNS.keys()
    check(result["errors"], LIMIT)
    check_generated(result["generated"])


def test_where_the_kernel_does_not_apply(monkeypatch):
    monkeypatch.setattr(decode_step_triton, "missing", "")
    monkeypatch.setattr(decode_step_triton, "launch", lambda *args: "launched")
    monkeypatch.setattr("dijiang.modeling.layer_step.native_step", lambda *args: None)
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)

    def step(settings=None, change=lambda layer: None, **options):
        layer, state, (token,) = settled_layer(**{"dtype": torch.float32, "settings": settings} | options)
        change(layer)
        return layer.fused_step(*token, state)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with torch.no_grad():
        assert step() is None  # no GPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert step() is None  # gradients are wanted
    with torch.no_grad():
        assert step() == "launched"
        for settings in (
            {"feature_map": "elu"},
            {"feature_map": "cosformer"},
            {"feature_map": "prf", "feature_activation": "exp"},
        ):
            assert step(settings) is None, settings
        assert step(d=258) is None
        assert step({"feature_dim": 1025}) is None
        with torch_only():
            assert step() is None


def test_offloaded_weights_are_left_to_torch():
    layer, state, (token,) = settled_layer(dtype=torch.float32)
    layer.key_scale.to("meta")
    with torch.no_grad():
        assert decode_step_triton.launch(layer.step_weights(), *token, state) is None


@torch.no_grad()
def test_a_failure_is_logged_once_and_torch_takes_over(monkeypatch):
    calls, lines = [], []

    def fails(*args):
        calls.append(args)
        raise RuntimeError("no ptxas")

    for name, value in {"missing": "", "launch": fails}.items():
        monkeypatch.setattr(decode_step_triton, name, value)
    monkeypatch.setattr(decode_step_triton.kernel, "failure", None)
    monkeypatch.setattr(optional_kernel.logger, "warning_once", lines.append)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)
    layer, state, (token,) = settled_layer(dtype=torch.float32)
    outputs = [layer.attend_step(*token, state)[0] for _ in range(2)]
    assert torch.equal(*outputs) and len(calls) == 1
    assert lines == ["decoding steps run on torch: the Triton kernel fails here (RuntimeError: no ptxas)"]

    def is_full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode_step_triton, "launch", is_full)
    monkeypatch.setattr(decode_step_triton.kernel, "failure", None)
    with pytest.raises(torch.OutOfMemoryError):
        layer.attend_step(*token, state)


@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 9), (4, 16), (32, 16)])
@pytest.mark.parametrize(
    ("d", "m", "N"), [(8, 11, 0), (64, 64, 68), (80, 512, 1), (128, 128, 68), (256, 512, 68), (256, 1024, 2000)]
)
def test_launch_sizes_cover_everything(B, H, d, m, N):
    sizes = decode_step_triton.launch_sizes(B, H, d, m, N)
    assert all(x & (x - 1) == 0 for x in sizes.values())
    assert sizes["BM"] * sizes["NB"] >= m and sizes["BD"] >= d and sizes["BV"] <= sizes["BD"]
    assert max(sizes["BM"], sizes["BN"] / 2, 16) * sizes["BD"] <= decode_step_triton.TILE
    assert B * H * -(-d // sizes["BV"]) >= decode_step_triton.PROGRAMS or sizes["BV"] == decode_step_triton.SMALLEST_SLICE


# exp is an approximation there
GPU_LIMIT = 1e-4
# each of them compiles a kernel of its own: a selection, and the last few, which are special
GPU_RUNS = dict.fromkeys([*list(RUNS)[::5], *list(RUNS)[-7:]])
LARGE_RUNS = {
    "pythia": dict(B=32, heads=(16, 16), d=64, window=64, feature_dim=64),
    "smollm": dict(B=1, heads=(9, 3), d=64, window=64, feature_dim=64),
    "wide": dict(B=3, heads=(8, 2), d=128, window=1, feature_dim=512),
    "80": dict(B=2, heads=(4, 4), d=80, window=64, feature_dim=100),
    "widest": dict(B=2, heads=(8, 1), d=256, window=64, feature_dim=256),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_RUNS)
def test_small_steps_on_a_gpu(name):
    check({name: errors(**RUNS[name], device="cuda")}, GPU_LIMIT)


@pytest.mark.gpu
@pytest.mark.parametrize(("pairs", "dtype"), [(True, torch.bfloat16), (False, torch.float16), (False, torch.float32)], ids=str)
@pytest.mark.parametrize("name", LARGE_RUNS)
def test_large_steps_on_a_gpu(name, pairs, dtype):
    run = dict(LARGE_RUNS[name])
    names = {"attention_window": run.pop("window"), "feature_dim": run.pop("feature_dim"), "attention_sinks": 4}
    settings = names | {"feature_pairs": pairs, "decay": "retnet"}
    check({name: errors(**run, dtype=dtype, steps=3, settings=settings, device="cuda")}, GPU_LIMIT)


@pytest.mark.gpu
def test_generation_on_a_gpu():
    check_generated(generated("cuda"))


@pytest.mark.gpu
@torch.no_grad()
def test_captured_as_a_cuda_graph():
    layer, state, (token,) = settled_layer(dtype=torch.bfloat16, device="cuda", settings={"decay": "learned"})
    start = state.map(torch.clone)

    def step():
        o, new = decode_step_triton.triton_step(layer.step_weights(), *token, state)
        for old, x in zip(state.tensors(), new.tensors(), strict=True):
            if old is not x:
                old.copy_(x)
        return o

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for old, x in zip(state.tensors(), start.tensors(), strict=True):
        old.copy_(x)
    expected_state = start
    for _ in range(3):
        graph.replay()
        with torch_only():
            expected, expected_state = layer.attend_step(*token, expected_state)
    torch.testing.assert_close(o, expected, atol=1e-4, rtol=1e-4)
    for x, y in zip(state.tensors(), expected_state.tensors(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"errors": {name: errors(**run) for name, run in RUNS.items()}, "generated": generated()}))
