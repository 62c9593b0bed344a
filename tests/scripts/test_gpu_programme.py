"""The GPU programme: what it passes over, ends and says; how a step's JSON grows; and a small run of it on this CPU."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "scripts" / "gpu"
HEAD = {"step", "complete", "small", "command", "machine", "device", "versions", "seconds"}


@pytest.fixture
def load(monkeypatch):
    """load("programme"), load("steps/op"): the module of a script."""

    def of(name: str):
        for folder in (GPU / "steps", ROOT / "benchmarks"):
            monkeypatch.syspath_prepend(str(folder))
        path = GPU / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"gpu_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return of


# --- the programme, with steps made up here ---

WRITE = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def write(name, **entries):
    with open(os.path.join(options["--results"], name + ".json"), "w") as file:
        json.dump({"small": True, **entries}, file)
"""


@pytest.fixture
def programme(load, tmp_path, monkeypatch):
    """programme({name: body of the step}, *options) -> exit code; `programme.module` is the module."""
    module = load("programme")
    folder = tmp_path / "steps"
    folder.mkdir()
    monkeypatch.setattr(module, "STEPS_FOLDER", folder)
    monkeypatch.setattr(module, "GRACE_S", 0.3)

    def call(steps: dict[str, str], *options: str) -> int:
        programme_steps = []
        for name, body in steps.items():
            (folder / f"{name}.py").write_text(WRITE + body, encoding="utf-8")
            inputs = ("corpus/train",) if name == "recovery" else ()
            programme_steps.append(module.Step(name=name, seconds=20, small_seconds=20, inputs=inputs))
        monkeypatch.setattr(module, "STEPS", tuple(programme_steps))
        monkeypatch.setattr(sys, "argv", ["programme.py", "--results", str(tmp_path / "results"), "--small", *options])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return int(ended.value.code)

    call.module, call.results = module, tmp_path / "results"
    return call


def state(out: str, name: str) -> str:
    """What the table at the end says of a step."""
    table = out.split("  state\n")[1]
    return next(line.split(maxsplit=2)[2] for line in table.splitlines() if line.startswith(f"{name} "))


def test_complete_steps_are_passed_over_and_fresh_forgets_them(programme, capsys):
    assert programme({"tests": 'write("tests", complete=True)', "op": 'write("op", complete=False)'}) == 0
    out = capsys.readouterr().out
    assert state(out, "tests") == "done" and state(out, "op") == "out of time; call again for the rest"
    assert programme(dict.fromkeys(("tests", "op"), "sys.exit('not again')")) == 1
    out = capsys.readouterr().out
    assert state(out, "tests") == "passed over: complete already"
    assert state(out, "op") == "FAILED: exit code 1; op.log ends with: not again"
    assert programme({"tests": 'write("tests", complete=True, new=True)'}, "--fresh") == 0
    assert json.loads((programme.results / "tests.json").read_text(encoding="utf-8"))["new"]


def test_a_step_past_its_limit_is_ended_with_its_children_and_leaves_what_it_reached(programme, capsys):
    stubborn = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
write("op", complete=False, reached=1, child=child.pid)
time.sleep(60)
"""
    steps = {"op": stubborn, "tests": "time.sleep(60)", "model": 'write("model", complete=True)'}
    limits = ("--limit", "op=2", "--limit", "tests=0.5")
    assert programme(steps, *limits) == 1  # because of tests, which wrote nothing
    out = capsys.readouterr().out
    assert state(out, "op") == "stopped at its limit" and state(out, "model") == "done"
    assert state(out, "tests") == "FAILED: stopped at its limit without a JSON"
    reached = json.loads((programme.results / "op.json").read_text(encoding="utf-8"))
    assert reached["reached"] == 1
    child = Path(f"/proc/{reached['child']}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
    assert programme({"op": 'write("op", complete=False); time.sleep(60)'}, "--limit", "op=2") == 0


def test_a_step_whose_inputs_have_not_arrived_waits(programme, tmp_path, capsys):
    arguments = {"small": False, "results": programme.results, "data": tmp_path}
    step = programme.module.Step(name="recovery", seconds=1, small_seconds=1, inputs=("weights", "corpus/train"))
    (programme.module.STEPS_FOLDER / "recovery.py").touch()
    (tmp_path / "weights").mkdir()
    reason = programme.module.why_passed_over(step, argparse.Namespace(**arguments))
    assert reason == "passed over: corpus/train not there yet"
    assert programme({"recovery": 'write("recovery", complete=True)'}) == 0  # a small run needs nothing
    assert state(capsys.readouterr().out, "recovery") == "done"


def test_a_step_may_ask_for_another_process(programme, capsys):
    twice = """
here = os.path.join(options["--results"], "op.json")
again = os.path.exists(here)
write("op", complete=again)
sys.exit(0 if again else 75)
"""
    assert programme({"op": twice}) == 0
    assert state(capsys.readouterr().out, "op") == "done"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "tests", "nix"], "step 'nix' is unknown; choose from tests, op, model, recovery_linear, recovery_window"),
        (["--limit", "nix=3"], "step 'nix' is unknown; choose from tests, op, model, recovery_linear, recovery_window"),
        (["--limit", "op"], "--limit op: give a step and its seconds, as in --limit op=120"),
        (["--limit", "op=soon"], "--limit op=soon: give a step and its seconds, as in --limit op=120"),
    ],
)
def test_wrong_words_are_refused_in_one_line(load, words, message):
    with pytest.raises(SystemExit) as ended:
        load("programme").parse_arguments(words)
    assert ended.value.code == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(load):
    with pytest.raises(SystemExit, match="torch finds no CUDA device; to try the programme on a CPU, add --small"):
        load("programme").default_results(small=False)


# --- the JSON of a step ---


@pytest.fixture
def record(load, tmp_path, monkeypatch):
    """record(seconds, before=0) -> a `Record` in a process that began so many seconds ago, with tiny sizes."""
    load("steps/shared")
    import shared

    def make(seconds: float, before: float = 0.0):
        monkeypatch.setattr(shared, "STARTED", time.time() - before)
        return shared.Record("op", argparse.Namespace(results=tmp_path, small=True, seconds=seconds))

    yield make
    sys.modules.pop("shared", None)


def test_rows_go_on_where_an_earlier_call_ended(record, tmp_path):
    plan, calls = [{"row": i} for i in range(4)], []

    def measure(row: dict) -> dict:
        calls.append(row["row"])
        if row["row"] == 1:
            raise ValueError("wrong\nin many ways")
        if row["row"] == 2:
            raise torch.OutOfMemoryError("full")
        return {"median_s": 1.0}

    def run(record_of_call, seconds=1.0) -> dict:
        cost = lambda row: 5.0 if row["row"] == 3 else seconds  # noqa: E731
        record_of_call.run(plan, measure, cost=cost, after=lambda rows: {"count": len(rows)})
        record_of_call.finish(note="n")
        return json.loads((tmp_path / "op.json").read_text(encoding="utf-8"))

    first = run(record(seconds=8))
    assert calls == [0, 1, 2] and first["not_reached"] == 1 and not first["complete"] and first["count"] == 3
    rows = first["rows"]
    assert rows[0]["median_s"] == 1.0 and rows[1]["error"] == "ValueError: wrong"
    assert rows[2]["left_out"] == "the GPU's memory ran out"
    assert run(record(seconds=100, before=95))["not_reached"] == 1  # time that went by before counts
    last = run(record(seconds=100))
    assert calls == [0, 1, 2, 3] and last["complete"] and last["not_reached"] == 0 and last["note"] == "n"
    assert last.keys() >= HEAD and [row["row"] for row in last["rows"]] == [0, 1, 2, 3]


def test_files_of_another_device_are_not_gone_on_with(record, tmp_path):
    (tmp_path / "op.json").write_text(json.dumps({"device": "another", "small": True, "rows": [1]}), encoding="utf-8")
    assert "rows" not in record(seconds=9).data


# --- the op's own oracle and targets ---


@pytest.mark.parametrize("features", [64, 128])
def test_the_oracle_of_the_op_is_the_formula(load, features):
    op = load("steps/op")
    layer = op.build_layer(features, 2, torch.device("cpu"))
    q, k, v = (torch.randn(1, 300, 2, op.HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with torch.no_grad():
        phi_q, phi_k = op.features_of(layer, q, k, torch.float64)
        weights = torch.einsum("bihm,bjhm->bhij", phi_q, phi_k).tril()
        expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.double())
        assert op.relative_error(op.oracle(layer, q, k, v), expected) < 1e-12
        assert op.relative_error(layer.attend(*(x.bfloat16() for x in (q, k, v)))[0], expected) < 2e-2


FUSED = """
import sys
sys.path[:0] = [{tests!r}, {steps!r}]
import fla_interpreter
fla_interpreter.fix_bfloat16()
import torch
import op
from fused_forward import fused_forward
for features in (64, 128):
    layer = op.build_layer(features, 2, torch.device("cpu"))
    with torch.no_grad():
        for phi in (layer.feature_map_q, layer.feature_map_k):
            for weight in phi.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        q, k, v = (torch.randn(2, 1300, 2, op.HEAD_DIM).bfloat16() for _ in "qkv")
        print(op.relative_error(fused_forward(layer, q, k, v), op.oracle(layer, q, k, v)))
"""


@pytest.mark.slow
def test_the_fused_kernels_compute_the_op_in_tritons_interpreter():
    code = FUSED.format(tests=str(ROOT / "tests" / "modeling"), steps=str(GPU / "steps"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [float(line) < 6e-3 for line in done.stdout.split()] == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 1000, 5000])
@pytest.mark.parametrize("features", [64, 128])
def test_the_fused_kernels_compute_the_op_on_a_gpu(load, features, tokens):
    op = load("steps/op")
    from fused_forward import fused_forward

    layer = op.build_layer(features, 4, torch.device("cuda"))
    q, k, v = (torch.randn(2, tokens, 4, op.HEAD_DIM, device="cuda").bfloat16() for _ in "qkv")
    with torch.no_grad():
        assert op.relative_error(fused_forward(layer, q, k, v), op.oracle(layer, q, k, v)) < 6e-3


def test_plans_name_every_row_once_and_begin_with_what_is_asked_for(load):
    for name in ("op", "model"):
        module = load(f"steps/{name}")
        for small in (True, False):
            rows = module.plan(small)
            assert len({json.dumps(row) for row in rows}) == len(rows)
    first = load("steps/op").plan(False)[0]
    assert (first["pass"], first["tokens"], first["variant"]) == ("forward", 16384, "flash")
    first = load("steps/model").plan(False)[:25]
    assert {(row["phase"], row["batch"], row["context"]) for row in first} == {("decode", 32, 2048)}
    assert len({row["shape"] for row in first}) == 5


def test_targets_compare_with_flash_attention_and_with_the_default_cache(load):
    op, shared_entries = load("steps/op"), {"pass": "forward", "tokens": 16384, "batch": 1}
    rows = [shared_entries | {"features": None, "variant": "flash", "median_s": 8.0}]
    rows += [shared_entries | {"features": 128, "variant": "dijiang", "median_s": 4.0, "of_floor": 3.0}]
    rows += [shared_entries | {"features": 128, "variant": "graph", "median_s": 1.0, "of_floor": 1.5}]
    rows += [shared_entries | {"features": 128, "variant": "fla", "left_out": "not there"}]
    outcomes = [(line["measured"], line["met"]) for line in op.targets(rows, 16384)]
    assert outcomes == [(2.0, False), (3.0, False), (8.0, True), (1.5, True)]
    model, shared_entries = load("steps/model"), {"phase": "decode", "shape": "pythia-70m", "batch": 32, "context": 2048}
    rows = [shared_entries | {"contender": name, "median_s": x} for name, x in (("softmax", 2.0), ("dijiang", 1.0))]
    assert [(line["target"], line["measured"], line["met"]) for line in model.targets(rows)] == [(">= 1.28", 2.0, True)]


# --- all of it, on this CPU ---


def test_a_checkout_that_is_only_linked_can_be_imported(load, tmp_path):
    load("../link_checkout").link(tmp_path / "site")
    code = "import dijiang.modeling, dijiang.configs, importlib.metadata as m; print(dijiang.__file__, m.version('dijiang'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=True)
    path, version = done.stdout.split()
    assert Path(path) == tmp_path / "site" / "dijiang" / "__init__.py" and version
    assert Path(path).resolve() == ROOT / "dijiang" / "__init__.py"


def run_small(folder: Path, *words: str) -> str:
    """stdout of `run.sh --small`, which must succeed."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(GPU / "run.sh"), "--small", "--data", str(folder / "data"), "--results", str(folder / "results"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_small_run_of_one_step_from_a_parcel(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "note.txt").write_text("brought along", encoding="utf-8")
    split = [sys.executable, str(GPU / "parcel.py"), "split", str(tmp_path / "packed"), str(tmp_path / "parts")]
    subprocess.run(split, check=True, capture_output=True)
    out = run_small(tmp_path, "--only", "model", "--parts", str(tmp_path / "parts"))
    assert (tmp_path / "data" / "note.txt").read_text(encoding="utf-8") == "brought along"
    assert state(out, "model") == "done"
    result = json.loads((tmp_path / "results" / "model.json").read_text(encoding="utf-8"))
    assert result.keys() >= HEAD and result["complete"] and result["small"] and result["not_reached"] == 0
    assert not [row for row in result["rows"] if "error" in row or "left_out" in row]
    assert all(row["agreement"] == 1.0 for row in result["rows"] if "agreement" in row)
    assert str(tmp_path) not in json.dumps(result)
    assert state(run_small(tmp_path, "--only", "model"), "model") == "passed over: complete already"


@pytest.mark.slow
def test_a_small_run_of_all_steps(tmp_path, load):
    began = time.monotonic()
    out = run_small(tmp_path)
    assert time.monotonic() - began < 360
    steps = [step for step in load("programme").STEPS if step.small_seconds]
    for step in steps:
        assert state(out, step.name) == "done"
        result = json.loads((tmp_path / "results" / f"{step.name}.json").read_text(encoding="utf-8"))
        assert result.keys() >= HEAD and result["complete"] and result["small"] and result["step"] == step.name
        assert not [row for row in result.get("rows", []) if "error" in row]
    assert json.loads((tmp_path / "results" / "tests.json").read_text(encoding="utf-8"))["collected"] > 0
    out = run_small(tmp_path)
    assert {state(out, step.name) for step in steps} == {"passed over: complete already"}
