"""What a training loop's checkpoints hold, and who may resume from them."""

import json

import pytest
import torch
from dijiang_testing.training import (
    WIDTH,
    FakeModel,
    assert_same_tensors,
    build_trainer,
    run_config,
    stage_config,
)
from safetensors.torch import load_file

from dijiang.train.trainer.distributed import deepspeed_settings
from dijiang.train.trainer.saving import WEIGHTS, refuse_other_writer

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_checkpoints_hold_what_trains_and_nothing_else(tmp_path):
    model = FakeModel()
    build_trainer(tmp_path, stage_config(), run_config(), model).run(None)
    folder = tmp_path / "checkpoints" / "checkpoint-6"
    assert_same_tensors(load_file(folder / WEIGHTS), model.trained())
    assert {path.name for path in folder.iterdir()} == {
        *("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
        *("tally.json", "manifest.json"),
    }
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)


def test_other_weights_are_not_loaded(tmp_path):
    build_trainer(tmp_path, stage_config(), run_config()).run(None)
    model = FakeModel()
    model.student.norm.requires_grad_(False)
    with pytest.raises(ValueError, match="checkpoint-4 holds other weights than those that train now"):
        build_trainer(tmp_path, stage_config(), run_config(), model).run(tmp_path / "checkpoints" / "checkpoint-4")


def test_a_checkpoint_of_other_processes(tmp_path):
    build_trainer(tmp_path, stage_config(), run_config()).run(None)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-6"
    refuse_other_writer(checkpoint, None)
    zero2 = deepspeed_settings(stage_config(), run_config(deepspeed="zero2"), WIDTH)
    message = "checkpoint-6 was written by 1 processes of PyTorch and cannot be resumed by 1 of DeepSpeed ZeRO-2; "
    with pytest.raises(ValueError, match=message):
        refuse_other_writer(checkpoint, zero2)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    edit = lambda **facts: (checkpoint / "manifest.json").write_text(json.dumps(manifest | facts))  # noqa: E731
    edit(world_size=2)
    refuse_other_writer(checkpoint, None)
    edit(world_size=2, written_by="DeepSpeed ZeRO-2")
    with pytest.raises(ValueError, match=r"by 2 processes of DeepSpeed ZeRO-2 and cannot be resumed by 1 of DeepSpeed ZeRO-2"):
        refuse_other_writer(checkpoint, zero2)
    edit(world_size=1, written_by="DeepSpeed ZeRO-2")
    refuse_other_writer(checkpoint, zero2)
