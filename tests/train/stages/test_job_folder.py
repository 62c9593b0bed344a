"""The folders of a job: one run at a time, and nothing left of a killed one. What they refuse is tested in test_run.py."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from dijiang.train.memories.config import FitConfig, SelectConfig
from dijiang.train.recipe.schema import AlignConfig, ConvertConfig, DataConfig, DistillConfig, Recipe, SourceConfig
from dijiang.train.stages.job_folder import StageFolder

HOLD = """
import sys, time
from test_job_folder import stage_folder
with stage_folder(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def stage_folder(output) -> StageFolder:
    recipe = Recipe(source="s", output=str(output), data=DataConfig(train=[SourceConfig(path="a.txt")]), align=AlignConfig())
    return StageFolder(recipe, "align")


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "locked\n"
        message = "^another run is writing to .*out; wait for it, or end it$"
        with pytest.raises(ValueError, match=message), stage_folder(tmp_path / "out").lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    with stage_folder(tmp_path / "out").lock():
        assert (tmp_path / "out" / ".lock").is_file()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with stage_folder(tmp_path).lock():
        assert (tmp_path / "align").is_dir()


def test_drafts_of_killed_runs_are_removed(tmp_path):
    folder = stage_folder(tmp_path)
    folder.converted.mkdir()
    folder.teacher_logits.mkdir(parents=True)
    (tmp_path / "download.partial").write_text("not ours")
    (tmp_path / ".converted.0123.partial").mkdir()
    (folder.path / ".model.0123.partial").mkdir()
    drafts = (".recipe.yaml.0123.partial", ".metrics.jsonl.0123.partial", "recipe.partial", "metrics.partial")  # old names too
    for name in (*drafts, "teacher_logits/.logits-000002.bin.0123.partial", "teacher_logits/logits-000002.bin.partial"):
        (folder.path / name).write_text("half")
    folder.prepare(progress=False)
    assert {path.name for path in tmp_path.rglob("*")} == {
        *("download.partial", "converted", "align", "teacher_logits", "recipe.yaml"),
    }


def test_memories_made_by_other_settings_are_not_taken_for_the_recipes(tmp_path, long_pair):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and a rat that sat near saw it. " * 60, encoding="utf-8")
    select = SelectConfig(heads=1, samples=1, lengths=(900,), held_aside=0)

    def folder(**sections) -> StageFolder:
        data = DataConfig(train=[SourceConfig(path=str(text))], cache=str(tmp_path / "tokens"))
        convert = ConvertConfig(settings={"attention_window": 4, "attention_sinks": 2})
        recipe = {"output": str(tmp_path / "out"), "data": data, "convert": convert, "distill": DistillConfig()}
        return StageFolder(Recipe(source=str(long_pair.teacher), **recipe, **sections), "distill")

    made = folder(select=select)
    made.path.mkdir(parents=True)
    made.prepare(progress=False)
    made.refuse_other_lineage()
    shutil.rmtree(made.path)  # as the refusal of another recipe advises
    made.path.mkdir()
    with pytest.raises(ValueError, match="memories was made with other settings of select than the recipe's; name another"):
        folder(select=replace(select, heads=2)).refuse_other_lineage()
    fit = FitConfig(slots=20, least_slots=16)
    with pytest.raises(ValueError, match="memories was made with other settings of fit than the recipe's; name another"):
        folder(select=select, fit=fit).refuse_other_lineage()
