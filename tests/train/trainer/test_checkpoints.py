"""Checkpoint folders: which one is picked, what is left of a kill at any moment, and how many stay."""

import json
import os
import shutil

import pytest

from dijiang.train.trainer.checkpoints import MANIFEST, Checkpoints, damage, read_manifest


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def write(checkpoints: Checkpoints, step: int, *, commit: bool = True, facts=None):
    """A checkpoint of two files, one of them in a folder."""
    folder = checkpoints.partial(step) / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000 + str(step).encode())
    (folder / "inner" / "state").write_bytes(b"s" * step)
    return checkpoints.commit(step, facts or {}) if commit else folder


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_committed_one_is_found_with_its_facts(checkpoints):
    assert checkpoints.newest() is None
    path = write(checkpoints, 7, facts={"world_size": 3})
    assert checkpoints.newest() == path == checkpoints.folder / "checkpoint-7"
    assert read_manifest(path)["files"] == {"inner/state": 7, "weights": 1001}
    assert read_manifest(path)["world_size"] == 3 and read_manifest(path)["step"] == 7
    assert names(checkpoints) == ["checkpoint-7"]


def test_the_newest_is_the_highest_step_whatever_the_clock_says(checkpoints):
    write(checkpoints, 9)
    write(checkpoints, 100)
    os.utime(checkpoints.folder / "checkpoint-9", (2e9, 2e9))
    assert checkpoints.newest().name == "checkpoint-100"


def test_rotation_keeps_the_newest(checkpoints):
    for step in (2, 4, 6, 10):
        write(checkpoints, step)
    assert names(checkpoints) == ["checkpoint-10", "checkpoint-6"]


def test_a_partial_one_is_never_picked_and_is_cleaned(checkpoints):
    write(checkpoints, 2)
    write(checkpoints, 4, commit=False)
    assert checkpoints.newest().name == "checkpoint-2"
    checkpoints.clean()
    assert names(checkpoints) == ["checkpoint-2"]


def test_strangers_are_left_alone(checkpoints):
    write(checkpoints, 2)
    (checkpoints.folder / "checkpoint-best").mkdir()
    (checkpoints.folder / "checkpoint-9").write_text("a file")
    assert checkpoints.newest().name == "checkpoint-2"
    write(checkpoints, 4), write(checkpoints, 6)
    assert names(checkpoints) == ["checkpoint-4", "checkpoint-6", "checkpoint-9", "checkpoint-best"]


def cut(path):
    (path / "weights").write_bytes(b"w")


def lose(path):
    (path / "inner" / "state").unlink()


def unlist(path):
    (path / MANIFEST).unlink()


def garble(path):
    (path / MANIFEST).write_text('{"step": 4, "fil')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "weights has 1 bytes, 1001 were written"),
        (lose, "inner/state is missing"),
        (unlist, "manifest.json is missing or cannot be read"),
        (garble, "manifest.json is missing or cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over(checkpoints, capsys, harm, said):
    write(checkpoints, 2)
    harm(write(checkpoints, 4))
    assert damage(checkpoints.folder / "checkpoint-2") is None
    assert checkpoints.newest().name == "checkpoint-2"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "checkpoint-4 is damaged" in err and said in err


def test_a_damaged_one_is_replaced_and_does_not_push_out_good_ones(checkpoints):
    write(checkpoints, 2), write(checkpoints, 6)
    cut(checkpoints.folder / "checkpoint-6")
    write(checkpoints, 4)  # resumed from 2
    assert names(checkpoints) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    write(checkpoints, 6)
    assert names(checkpoints) == ["checkpoint-4", "checkpoint-6"]
    assert damage(checkpoints.folder / "checkpoint-6") is None


@pytest.mark.parametrize("stop_at", range(1, 12))
def test_a_commit_that_ends_anywhere_leaves_a_good_one(checkpoints, monkeypatch, stop_at):
    """Stands in for a kill: from the n-th call that changes the disk on, none does."""
    write(checkpoints, 2), write(checkpoints, 4)
    calls = []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) >= stop_at:
                raise InterruptedError
            return function(*args, **kwargs)

        return call

    write(checkpoints, 6, commit=False)
    kind = type(checkpoints.folder)
    with monkeypatch.context() as patch:
        for owner, name in ((kind, "rename"), (kind, "rmdir"), (kind, "write_text"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with pytest.raises(InterruptedError):
            checkpoints.commit(6, {})
    again = Checkpoints(checkpoints.folder, keep=2)
    again.clean()
    assert again.newest().name in ("checkpoint-4", "checkpoint-6")
    assert all(damage(path) is None for path in again.all())
    assert not [name for name in names(again) if name.startswith(".")]


def test_the_manifest_is_json(checkpoints):
    path = write(checkpoints, 2, facts={"written_by": "PyTorch"})
    assert json.loads((path / MANIFEST).read_text())["written_by"] == "PyTorch"
