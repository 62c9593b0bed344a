"""The benchmarks' arithmetic, and that each script runs on tiny sizes and writes what it promises."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
COMMON = {"command", "quick", "dtypes", "machine", "versions", "backend", "targets"}


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    return measure


@pytest.mark.parametrize("features", [4, 6])
def test_floor_counts_the_products_of_the_chunk_form(measure, features):
    """By hand: products of (rows, inner) and (inner, columns) cost 2 rows inner columns."""
    T, H, d, M, C = 12, 2, 5, features, 3
    product = lambda rows, inner, columns: 2 * rows * inner * columns  # noqa: E731
    maps = 2 * product(T, d, M)
    state = T // C * (product(M, C, d) + product(C, M, d))
    inside = T // C * (product(C, M, C) + product(C, C, d))
    assert measure.floor_flops(T, H, d, M, chunk=C) == H * (maps + state + inside)


def test_a_target_is_met_from_the_right_side(measure):
    assert measure.target("speed", 4, 4.0) == {"name": "speed", "target": ">= 4", "measured": 4.0, "met": True}
    assert not measure.target("speed", 4, 3.9)["met"]
    assert measure.target("bytes", 4, 3.9, at_most=True)["met"] and not measure.target("bytes", 4, 4.1, at_most=True)["met"]


def test_a_backend_can_be_chosen_at_any_time(measure, monkeypatch):
    from dijiang.modeling.linear_attention_native import native_is_usable

    monkeypatch.setenv("DIJIANG_NATIVE", "1")  # put back at the end
    measure.choose_backend("torch")
    assert native_is_usable() == (False, "DIJIANG_NATIVE=0 turns native code off")
    measure.choose_backend("native")
    assert "DIJIANG_NATIVE" not in os.environ


def test_backend_is_told_by_who_answered(measure):
    def native_step(result):
        return result

    assert measure.backend_of(lambda: native_step(1)) == "native"
    assert measure.backend_of(lambda: native_step(None)) == "torch"
    ran = {"forward": "native", "forward + backward": "torch"}
    assert measure.check_backend("native", ran) == ran
    with pytest.raises(SystemExit, match="what ran is"):
        measure.check_backend("torch", ran)


def test_json_is_written_at_once(measure, tmp_path):
    path = tmp_path / "folder" / "result.json"
    measure.write_json(path, {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_runs_of_an_earlier_call_are_kept_if_they_measured_the_same(measure, tmp_path):
    output, about = tmp_path / "result.json", {"texts": ("a", "b"), "tokens": 3, "machine": {}}
    assert measure.earlier_runs(output, about, ("texts", "tokens")) == {}
    measure.write_json(output, about | {"runs": {"x": 1}})
    assert measure.earlier_runs(output, about | {"machine": {"cores": 2}}, ("texts", "tokens")) == {"x": 1}
    with pytest.raises(SystemExit, match=r"result\.json is of another measurement \(tokens differ\); name another file"):
        measure.earlier_runs(output, about | {"tokens": 4}, ("texts", "tokens"))


def test_peers_compute_what_the_op_computes(measure):
    pytest.importorskip("triton", reason="fla's plain forms cannot be imported without it")
    pytest.importorskip("fla")
    import attention

    torch.manual_seed(0)
    layers = {f"softmax m={m}": attention.build_layer(m, "softmax", torch.float32) for m in attention.FEATURES}
    q, k, v = attention.random_inputs(128, torch.float32)
    with torch.no_grad():
        calls = {name: call for name, call in attention.other_calls(layers, q, k, v).items() if name.startswith("fla")}
        assert len(calls) == 4
        for name, call in calls.items():
            expected, _ = layers[f"softmax m={name.split('=')[1]}"].attend(q, k, v)
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def quick(measure, monkeypatch, tmp_path):
    """quick("model") -> the result of that script's quick run, in this process."""
    threads = torch.get_num_threads()

    def run(name: str) -> dict:
        path = tmp_path / "result.json"
        options = ["--quick", "--dtype", "float32", "--threads", "1", "--rounds", "2", "--output", str(path)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        monkeypatch.setattr(measure, "choose_backend", lambda name: None)  # which is for a process of its own
        importlib.import_module(name).main()
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["quick"] and result["targets"] == [], "tiny sizes say nothing about targets"
        assert result.keys() >= COMMON and str(tmp_path) not in json.dumps(result)
        assert {"cpu", "cores", "threads", "memory_bytes"} <= result["machine"].keys()
        return result

    yield run
    torch.set_num_threads(threads)


def test_attention_runs(quick):
    result = quick("attention")
    assert result.keys() >= {"shape", "limits", "peers"}
    assert [r["tokens"] for r in result["forward"]] == [128, 256]
    ours = {"softmax m=64", "exp m=64", "softmax m=128", "exp m=128"}
    for row in result["forward"] + result["backward"]:
        assert row["timings"].keys() >= {"sdpa"} | ours and row["ratios"].keys() == row["timings"].keys() - {"sdpa"}
    for row in result["growth"]:
        assert len(row["per_doubling"]) == 1 and all(x["time_per_floor"] > 0 for x in row["rows"])
    (memory,) = result["memory"]
    assert memory["input_output_bytes"] == 4 * 4 * memory["tokens"] * 9 * 64
    # pages of the imports may leave the memory meanwhile
    assert memory["peak_bytes"] >= memory["input_output_bytes"] / 2
    assert result["backend"]["float32"].keys() == {"forward", "forward + backward"}


def test_model_runs(quick):
    result = quick("model")
    for row in result["prefill"] + result["decode"] + result["train"]:
        assert row["timings"].keys() == row["tokens_per_s"].keys() >= {"llama", "dijiang"} and row["ratio"] > 0
    assert all("llama static" in row["timings"] and row["ratio_to_static_cache"] > 0 for row in result["decode"])
    short, long = result["decode"]
    assert short["state_bytes"] * long["batch"] == long["state_bytes"] * short["batch"], "a state knows no context"
    assert long["cache_bytes"] == 2 * 2 * 192 * 2 * 2 * 16 * 4
    assert result["backend"]["float32"].keys() == {"prefill", "decode", "training"}


def test_memories_run(quick):
    result = quick("memories")
    (read,), (decode,) = result["read"], result["decode"]
    assert read["timings"].keys() == {"sdpa", "memories"} and read["ratio"] > 0
    assert decode["timings"].keys() == decode["tokens_per_s"].keys() == {"window", "memories"}
    assert decode["cache_bytes"]["memories"] > decode["cache_bytes"]["window"]


def test_memories_mix_what_their_layers_do(measure):
    """`mix`, projected by hand, against the layer's own forward pass."""
    import memories

    model = memories.build(memories.TINY, ((0, 1), (1, 0)), 5, torch.float32)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(1, 90, memories.TINY["hidden_size"])
    positions = model.model.rotary_emb(hidden, torch.arange(90)[None])
    with torch.no_grad():
        mixed = memories.mix(layer, layer.project(hidden, positions))
        torch.testing.assert_close(layer.o_proj(mixed.flatten(2)), layer(hidden, positions)[0])


def test_training_runs(quick):
    result = quick("training")
    (row,) = result["steps"]
    steps = {"fine-tuning step", "teacher's pass", "distillation step", "attention alone", "align step"}
    assert row["timings"].keys() == row["tokens_per_s"].keys() == steps
    spent = {name: timing["median_s"] for name, timing in row["timings"].items()}
    assert row["ratios"] == {
        "distill": pytest.approx((spent["fine-tuning step"] + spent["teacher's pass"]) / spent["distillation step"]),
        "align": pytest.approx((spent["align step"] - spent["attention alone"]) / spent["teacher's pass"]),
    }


def test_what_attention_does_alone_is_part_of_an_align_step(measure):
    """It reaches the kernels' gradients and nothing else."""
    import argparse

    import model as shapes
    import training

    arguments = argparse.Namespace(tokens=32, trains="all", lora_rank=0, chunk_tokens=None)
    _, _, align = training.build(shapes.TINY, torch.float32, arguments)
    call = training.attention_alone(align, torch.randint(0, shapes.TINY["vocab_size"], (1, 32)))
    called = []
    for layer in align.student.model.layers:
        layer.self_attn.attend = lambda *x, attend=layer.self_attn.attend: called.append(x) or attend(*x)
    call()
    assert len(called) == shapes.TINY["num_hidden_layers"] and all(p.grad is None for p in align.parameters())
