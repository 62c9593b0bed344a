import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dijiang.modeling import linear_attention_fla
from dijiang.modeling.linear_attention import naive_linear_attention
from dijiang.modeling.linear_attention_fla import fla_linear_attention, gated_backward_is_refused, takes_single_steps

ARGUMENTS = ("q", "k", "v", "log_decay", "state")
DECAYS = ("none", "constant", "constant learned", "per token")


def make_inputs(shape, decay, lengths, seed, device="cpu", dtype=torch.float32, strength=1 / 8) -> dict[str, torch.Tensor]:
    """Arguments of fla_linear_attention for shape (B, T, H, G, m, e); those that get a gradient require it."""
    B, T, H, G, m, e = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    tensors = {"q": draw(B, T, H, m), "k": draw(B, T, G, m), "v": 2 * draw(B, T, G, e) - 1}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    if decay != "none":
        tensors["log_decay"] = -draw(*((B, T, G) if decay == "per token" else (G,))) * strength
    tensors["state"] = 2 * draw(len(lengths) if lengths else B, G, m, e) - 1
    return {name: x.to(device).requires_grad_(name != "log_decay" or decay != "constant") for name, x in tensors.items()}


def definition(q, k, v, log_decay, state, lengths=None):
    """The same by `naive_linear_attention` in float64, and packed sequences one by one."""
    if lengths:
        split = [[None] * len(lengths) if x is None else x.split(lengths, 1) for x in (q, k, v)]
        decays = log_decay.split(lengths, 1) if log_decay is not None and log_decay.dim() == 3 else [log_decay] * len(lengths)
        pairs = [definition(*parts) for parts in zip(*split, decays, state.split(1), strict=True)]
        return torch.cat([o for o, _ in pairs], 1), torch.cat([final for _, final in pairs])
    (B, T, H, m), G = q.shape, k.shape[2]
    q = q.double().view(B, T, G, H // G, m).permute(0, 2, 3, 1, 4)
    k, v = (x.double().transpose(1, 2) for x in (k, v))
    log_decay = None if log_decay is None else log_decay.double().expand(B, T, G).transpose(1, 2)
    o, _, final = naive_linear_attention(q, k, v, log_decay, state.double(), sums=False)
    return o.permute(0, 3, 1, 2, 4).reshape(B, T, H, -1), final


def errors(
    shape, decay, *, seed=0, lengths=None, backward=True, device="cpu", dtype=torch.float32, strength=1 / 8
) -> dict[str, float]:
    """Largest error of each result relative to the largest value expected. Gradients: of random sums of o and state."""
    tensors = make_inputs(shape, decay, lengths, seed, device, dtype, strength)
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    starts = None if lengths is None else torch.tensor([0, *lengths], device=device).cumsum(0)
    results = []
    for form, packing in ((fla_linear_attention, starts), (definition, lengths)):
        with torch.set_grad_enabled(backward):
            o, final = form(*(tensors.get(name) for name in ARGUMENTS), packing)
        outputs = {"o": o, "final state": final}
        if backward:
            generator = torch.Generator().manual_seed(seed + 1)
            cotangents = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in (o, final)]
            gradients = torch.autograd.grad((o, final), list(wanted.values()), cotangents)
            outputs |= {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}
        results.append(outputs)
    outputs, expected = results
    assert outputs["o"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert outputs["final state"].dtype == torch.float32 and outputs["final state"].is_contiguous()
    assert all(outputs[name].shape == x.shape for name, x in expected.items())
    return {n: ((outputs[n].double() - x).abs().max() / x.double().abs().max()).item() for n, x in expected.items()}


def make_runs() -> dict[str, dict]:
    """Arguments of `errors` by name, small enough for Triton's interpreter. Shapes: (B, T, H, G, m, e)."""
    runs = {}
    for decay in DECAYS:
        for shape in ((2, 1, 4, 2, 16, 17), (1, 17, 6, 2, 11, 33), (1, 70, 4, 2, 16, 17)):
            for seed in range(2 if shape[1] < 70 else 1):
                runs[f"{decay} {shape} seed {seed}"] = dict(shape=shape, decay=decay, seed=seed)
        runs[f"{decay} packed"] = dict(shape=(1, 90, 4, 2, 16, 17), decay=decay, lengths=(3, 66, 21))
        runs[f"{decay} inference"] = dict(shape=(2, 17, 4, 2, 16, 17), decay=decay, backward=False)
        runs[f"{decay} long inference"] = dict(shape=(1, 130, 2, 2, 16, 17), decay=decay, backward=False)
        runs[f"{decay} packed inference"] = dict(shape=(1, 13, 2, 1, 16, 17), decay=decay, lengths=(1, 8, 4), backward=False)
        runs[f"{decay} bfloat16"] = dict(shape=(1, 70, 2, 1, 11, 17), decay=decay, dtype=torch.bfloat16)
    runs["constant, whole chunks"] = dict(shape=(1, 128, 4, 2, 16, 17), decay="constant")
    runs["constant, strong"] = dict(shape=(1, 80, 2, 2, 16, 17), decay="constant", strength=8.0)
    runs["constant, float16"] = dict(shape=(1, 17, 2, 1, 11, 17), decay="constant", dtype=torch.float16)
    return runs


RUNS = make_runs()


def check(errors_by_part: dict[str, float], tolerance: float) -> None:
    wrong = {name: f"{error:.1e}" for name, error in errors_by_part.items() if not error < tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


@pytest.mark.skipif(find_spec("fla") is None or find_spec("triton") is None, reason="flash-linear-attention is not installed")
def test_equals_the_definition_forward_and_backward():
    """On the CPU, through Triton's interpreter, which has to be chosen before triton is imported."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fla_interpreter.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["usable"] == [True, ""]
    assert result["errors"].keys() == RUNS.keys()
    limits = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 3e-2}
    for dtype, limit in limits.items():
        names = [name for name, run in RUNS.items() if run.get("dtype", torch.float32) == dtype]
        check({f"{name}: {part}": x for name in names for part, x in result["errors"][name].items()}, limit)


# float32 products are TF32 there; both bounds are some three times the most that emulated TF32 and bfloat16 lost
GPU_LIMITS = {torch.float32: 6e-3, torch.bfloat16: 4e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", GPU_LIMITS, ids=str)
def test_2000_tokens_on_a_gpu(dtype, decay):
    check(errors((2, 2000, 9, 3, 128, 65), decay, device="cuda", dtype=dtype), GPU_LIMITS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_small_inputs_on_a_gpu(name):
    run = {"dtype": torch.float32} | RUNS[name]
    check(errors(**run, device="cuda"), GPU_LIMITS.get(run["dtype"], GPU_LIMITS[torch.float32]))


@pytest.mark.parametrize(
    ("expected", "T", "decay", "options"),
    [
        ("recurrent g", 1, "per token", {}),
        ("recurrent g", 1, "constant learned", {}),
        ("recurrent g_gamma", 64, "constant learned", {"backward": False}),
        ("chunk g", 64, "constant learned", {}),
        ("chunk g_gamma", 64, "constant", {}),
        ("chunk g", 64, "constant", {"lengths": (30, 34)}),
        ("chunk g", 65, "constant", {"backward": False}),
        ("chunk", 65, "none", {"backward": False}),
        ("recurrent g", 65, "per token", {"refused": True}),
        ("chunk g", 65, "per token", {"refused": True, "backward": False}),
        ("chunk g_gamma", 64, "constant", {"refused": True}),
    ],
)
def test_which_kernel_is_chosen(expected, T, decay, options, monkeypatch):
    calls = []

    def fake_op(name, q, k, v, *, scale, initial_state, output_final_state, cu_seqlens, **decays):
        assert scale == 1.0 and output_final_state and q.dtype == k.dtype == v.dtype == torch.float32
        assert name == "recurrent" or q.shape[-1] % 16 == k.shape[-1] % 16 == v.shape[-1] % 16 == 0
        calls.append(" ".join([name, *decays]))
        return torch.zeros_like(v), torch.zeros_like(initial_state)

    monkeypatch.setattr(
        linear_attention_fla, "load_ops", lambda: (partial(fake_op, "chunk"), partial(fake_op, "recurrent"), "")
    )
    monkeypatch.setattr(linear_attention_fla, "gated_backward_is_refused", lambda device: options.get("refused", False))
    lengths = options.get("lengths")
    tensors = make_inputs((1, T, 4, 2, 11, 17), decay, lengths, seed=0, dtype=torch.float16)
    with torch.set_grad_enabled(options.get("backward", True)):
        o, final = fla_linear_attention(
            *(tensors.get(name) for name in ARGUMENTS), None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        )
    assert calls == [expected]
    assert o.shape == (1, T, 4, 17) and final.shape == tensors["state"].shape


@pytest.mark.parametrize("refused", [True, False])
def test_a_decay_that_trains_is_left_to_torch_where_fla_would_go_token_by_token(refused, monkeypatch):
    monkeypatch.setattr(linear_attention_fla, "gated_backward_is_refused", lambda device: refused)
    q = torch.zeros(1, 128, 2, 4, requires_grad=True)
    fixed, trained, bounds = -torch.ones(2), (-torch.ones(2)).requires_grad_(), torch.tensor([0, 64, 128])
    assert takes_single_steps(q, trained, None) is takes_single_steps(q, fixed.expand(1, 128, 2), None) is refused
    assert takes_single_steps(q, fixed, bounds) is takes_single_steps(q[:, :100], fixed, None) is refused
    assert not takes_single_steps(q, None, None) and not takes_single_steps(q, fixed, None)
    assert not takes_single_steps(q.detach(), fixed.expand(1, 128, 2), None)
    with torch.no_grad():
        assert not takes_single_steps(q, trained, None)


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [
        ((9, 0), "3.3.1", False),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.6.0+git9844da95", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0", False),
        ((8, 0), "3.6.0", False),
    ],
)
def test_refused_backward_of_hopper(capability, version, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert gated_backward_is_refused.__wrapped__(torch.device("cuda")) is refused
    assert gated_backward_is_refused.__wrapped__(torch.device("cpu")) is False


WITHOUT = """
import importlib.util, sys

class Blocked:
    def find_spec(name, *args):
        if name.split(".")[0] == sys.argv[2]:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked)
spec = importlib.util.spec_from_file_location("linear_attention_fla", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.fla_is_usable("cpu") == (False, "flash-linear-attention needs a CUDA device, not cpu")
assert "fla" not in sys.modules and "triton" not in sys.modules, "loaded before any use"
print(module.fla_is_usable("cuda"))
"""


@pytest.mark.parametrize("missing", ["fla", "triton"])
def test_without_it_the_file_loads_and_says_what_is_missing(missing):
    if missing == "triton" and find_spec("fla") is None:
        missing = "fla"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, linear_attention_fla.__file__, missing],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reason = f"flash-linear-attention cannot be imported: No module named '{missing}'"
    assert done.stdout.strip() == str((False, reason))
