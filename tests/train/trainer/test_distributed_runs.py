"""
Several processes, with DeepSpeed and without, compute what one does; killed runs end in the bits of one that was left alone.
This file is also what the processes of the first test run: `torchrun test_distributed_runs.py FOLDER`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from dijiang_testing.training import FakeModel, build_trainer, metrics, run_config, stage_config
from safetensors.torch import load_file, save_file

from dijiang.train import load_recipe, recover
from dijiang.train.stages.build import gathered_parameters
from dijiang.train.trainer import distributed

WEIGHTS = "model.safetensors"
PLAIN, ZERO = "plain", ("zero0", "zero1", "zero2", "zero3")
STAGE = stage_config(weight_decay=0.1, clip=0.5)


# --- what each process of the first launch does ---


def sharded(folder: Path) -> str:
    """ZeRO-3 settings that shard even the smallest parameters, as large models' are."""
    path = folder / "zero3.json"
    if distributed.is_main():
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        path.write_text(json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": zero}))
    distributed.barrier()
    return str(path)


def work(folder: Path) -> None:
    distributed.prepare_process(run_config(deepspeed="zero2"))
    assert distributed.world_size() == 2
    settings = {PLAIN: None, **{name: name for name in ZERO}, "zero3": sharded(folder)}
    for name, deepspeed in settings.items():
        run, out = run_config(deepspeed=deepspeed), folder / name
        trainer = build_trainer(out, STAGE, run)
        assert trainer.run(None)
        values = gathered_parameters(trainer.model.student)
        if distributed.is_main():
            save_file({key: value.detach() for key, value in values.items()}, out / WEIGHTS)
            shutil.copyfile(out / "metrics.jsonl", out / "first.jsonl")
        again = build_trainer(out, STAGE, run, FakeModel(seed=5) if deepspeed is None else None)
        if deepspeed is None:
            again.model.student.embed = trainer.model.student.embed
        assert again.run(out / "checkpoints" / "checkpoint-4")
        distributed.forget_deepspeed()

    resumed = build_trainer(folder / "of-one", STAGE, run_config())  # begun by one process
    assert resumed.run(folder / "of-one" / "checkpoints" / "checkpoint-4")

    messages = []
    try:  # place 11 is of the other process
        build_trainer(folder / "broken", STAGE, run_config(), FakeModel(broken_at=11)).run(None)
    except ValueError as error:
        messages.append(str(error))
    try:
        with distributed.share_errors():
            if not distributed.is_main():
                raise ValueError("what the other process found")
    except ValueError as error:
        messages.append(str(error))
    asked = iter([False, distributed.rank() == 1] + [False] * 9)  # one process is interrupted
    stopped = build_trainer(folder / "stopped", STAGE, run_config(), stop_wanted=lambda: next(asked))
    assert stopped.run(None) is False
    messages.append(stopped.state.global_step)
    messages.append(distributed.from_main(distributed.rank()))
    (folder / f"messages-{distributed.rank()}.json").write_text(json.dumps(messages))


# --- tests ---


def environment(**more) -> dict:
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launched}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"} | more


def torchrun(*arguments) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return [*start, *map(str, arguments)]


def call(command: list[str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes have worked, and the folder of one process that did the same alone."""
    folder, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    trainer = build_trainer(alone, STAGE, run_config())
    trainer.run(None)
    save_file({name: p.detach() for name, p in gathered_parameters(trainer.model.student).items()}, alone / WEIGHTS)
    build_trainer(folder / "of-one", STAGE, run_config(save_every=4)).run(None)
    done = call(torchrun(__file__, folder))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, alone


def losses(lines: list[dict]) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize("name", [PLAIN, *ZERO])
def test_two_processes_train_as_one(launched, name):
    folder, alone = launched
    first = [json.loads(line) for line in (folder / name / "first.jsonl").read_text().splitlines()]
    assert [line["step"] for line in first] == [line["step"] for line in metrics(alone)]
    assert losses(first) == pytest.approx(losses(metrics(alone)), rel=1e-5)
    found, expected = load_file(folder / name / WEIGHTS), load_file(alone / WEIGHTS)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5, msg=key)
    # resumed from step 4, without a difference
    assert losses(first) == losses(metrics(folder / name))


def test_another_number_of_processes_may_resume(launched):
    folder, alone = launched
    assert losses(metrics(folder / "of-one")) == pytest.approx(losses(metrics(alone)), rel=1e-5)
    trainer = build_trainer(folder / PLAIN, STAGE, run_config())
    assert trainer.run(folder / PLAIN / "checkpoints" / "checkpoint-4")
    assert losses(metrics(folder / PLAIN)) == pytest.approx(losses(metrics(alone)), rel=1e-5)


def test_processes_agree(launched):
    folder, _ = launched
    for rank in range(2):
        loss, error, step, value = json.loads((folder / f"messages-{rank}.json").read_text())
        assert loss.startswith("the loss is nan at step 3, in blocks 11; ")
        assert error == "what the other process found"
        assert step == 2 and value == 0
    assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert [path.name for path in (folder / "broken" / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.fixture
def job(pair, text_file, tmp_path):
    """(recipe file, its content): both stages on the tiny pair; write it with `save`."""
    (tmp_path / "other.txt").write_text("a rat on the mat and the cat on the rat sat " * 20)
    convert = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    content = {
        "source": str(pair.teacher),
        "output": str(tmp_path / "out"),
        "convert": {"settings": convert},
        "data": {"train": [str(text_file)], "held_out": [str(tmp_path / "other.txt")], "cache": str(tmp_path / "cache")},
        "align": {"tokens": 640, "block_size": 32, "batch_size": 2},
        "distill": {"tokens": 640, "block_size": 32, "batch_size": 2, "learning_rate": 1e-3},
        "run": {"device": "cpu", "dtype": "float32", "save_every": 3, "log_every": 1, "report_to": []},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def difference(one: Path, other: Path) -> float:
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


def in_this_process(job: Path, output: Path, *sets: str) -> Path:
    return recover(load_recipe(job, [f"output={output}", *sets]), progress=False)


def test_a_recipe_in_two_processes_under_zero_3(job, tmp_path):
    done = call(torchrun("-m", "dijiang.train", job, "--set", f"run.deepspeed={sharded(tmp_path)}"))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count(f"dijiang: wrote {tmp_path / 'out' / 'distill' / 'model'}") == 1
    expected = in_this_process(job, tmp_path / "alone")
    for stage in ("align", "distill"):
        found = tmp_path / "out" / stage
        assert losses(metrics(found)) == pytest.approx(losses(metrics(expected.parents[1] / stage)), rel=1e-5)
        teacher, alone = (metrics(folder)[-1]["eval_teacher_perplexity"] for folder in (found, expected.parents[1] / stage))
        assert teacher == pytest.approx(alone, rel=1e-5)
        assert difference(found / "model", expected.parents[1] / stage / "model") < 1e-4
    record = json.loads((tmp_path / "out" / "distill" / "model" / "provenance.json").read_text())["stages"][-1]
    assert record["world_size"] == 2 and record["written_by"] == "DeepSpeed ZeRO-3"


# kills the process where it is told to: before the n-th call of a function
KILLER = """
import os, sys, runpy, importlib, signal
module, name, count = sys.argv[1:4]
sys.argv[1:4] = []
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
setattr(owner, name, deadly)
sys.argv[0] = "dijiang.train"
runpy.run_module("dijiang.train", run_name="__main__", alter_sys=True)
"""


def test_killed_runs_end_in_the_bits_of_one_left_alone(job, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    command = [str(job), "--stage", "distill", "--set", "align=null"]

    def killed(*where: str) -> None:
        done = call([sys.executable, str(tmp_path / "killer.py"), *where, *command])
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]

    out = tmp_path / "out" / "distill"
    names = lambda: sorted(path.name for path in (out / "checkpoints").iterdir())  # noqa: E731
    killed("dijiang.train.trainer.trainer", "RecoveryTrainer.compute_loss", "10")  # in step 5: two micro-batches each
    assert names() == ["checkpoint-3"]
    killed("torch", "save", "5")  # in the second save after that
    assert names() == [".partial-9", "checkpoint-3", "checkpoint-6"]
    killed("dijiang.train.stages.run", "write_provenance", "1")  # in writing the result
    assert names() == ["checkpoint-10", "checkpoint-9"] and not (out / "model").exists()
    done = call([sys.executable, "-m", "dijiang.train", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"dijiang: wrote {out / 'model'}\n" in done.stderr
    assert {path.name for path in out.iterdir()} == {"checkpoints", "metrics.jsonl", "recipe.yaml", "model"}
    expected = in_this_process(job, tmp_path / "alone", "align=null")
    assert difference(out / "model", expected) == 0.0
    assert metrics(out) == metrics(expected.parent)


def test_ctrl_c_ends_with_130_and_errors_with_1(job, tmp_path):
    command = [sys.executable, "-m", "dijiang.train", str(job), "--set", "align=null", "--set", "distill.tokens=640000"]
    process = subprocess.Popen(
        [*command, "--set", "run.deepspeed=zero2"], env=environment(), stderr=subprocess.PIPE, text=True
    )
    lines, deadline = tmp_path / "out" / "distill" / "metrics.jsonl", time.monotonic() + 300
    while not (lines.is_file() and lines.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("dijiang: distill was stopped after step ")
    assert last.endswith("run the same command again to continue")
    step = int(last.split("step ")[1].split(" ")[0])
    assert (lines.parent / "checkpoints" / f"checkpoint-{step}").is_dir() and metrics(lines.parent)[-1]["step"] == step

    done = call(command)  # now without DeepSpeed
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("dijiang: ") and done.stderr.count("\n") == 1
    assert "was written by 1 processes of DeepSpeed ZeRO-2 and cannot be resumed by 1 of PyTorch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module"],
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "-m"],
    ],
    ids=["deepspeed", "accelerate"],
)
def test_other_launchers(job, tmp_path, launcher):
    port = torchrun()[-1]
    name, *options = [port if word == "PORT" else word for word in launcher]
    done = call([str(Path(sys.executable).parent / name), *options, "dijiang.train", str(job), "--set", "run.deepspeed=zero2"])
    assert done.returncode == 0, done.stderr[-5000:]
    model = tmp_path / "out" / "distill" / "model"
    assert json.loads((model / "provenance.json").read_text())["stages"][-1]["written_by"] == "DeepSpeed ZeRO-2"
    assert difference(model, in_this_process(job, tmp_path / "alone")) < 1e-4


if __name__ == "__main__":
    work(Path(sys.argv[1]))
