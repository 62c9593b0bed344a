"""A checkpoint of an earlier version gets the installed code, and nothing else of it changes."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dijiang.checkpoint.code_files import before_refreshing, code_files, refresh_code, with_newest_code
from dijiang.checkpoint.provenance import provenance_text, read_provenance, write_provenance
from dijiang.cli import app
from dijiang.convert import convert_model
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.transformers_compat import TESTED_TRANSFORMERS

CODE = {path.name: path.read_bytes() for path in code_files()}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkpoint(make_source, tmp_path) -> Path:
    return convert_model(make_source()[0], tmp_path / "out", progress=False)


def make_old(folder: Path) -> None:
    """As an earlier version left it: one file missing, one of other content, one that there is no more."""
    record = json.loads((folder / "provenance.json").read_text())
    (folder / "transformers_compat.py").unlink()
    del record["code"]["transformers_compat.py"], record["tested_transformers"]
    for name, content in (("modeling_dijiang.py", b"raise ImportError('old')\n"), ("old_map.py", b"OLD = 1\n")):
        (folder / name).write_bytes(content)
        record["code"][name] = digest(content)
    (folder / "provenance.json").write_text(json.dumps(record))


def test_conversion_records_the_versions_its_code_was_tested_with(checkpoint):
    assert read_provenance(checkpoint)["tested_transformers"] == list(TESTED_TRANSFORMERS)


def test_old_code_is_replaced_and_all_else_stays(checkpoint, tokens):
    before = files_of(checkpoint)
    make_old(checkpoint)
    changed = refresh_code(checkpoint)
    assert sorted(changed) == ["modeling_dijiang.py", "old_map.py", "transformers_compat.py"]
    after = files_of(checkpoint)
    record = json.loads(after.pop("provenance.json"))
    earlier = json.loads(before.pop("provenance.json"))
    assert after == before
    assert record["code"] == {name: digest(content) for name, content in CODE.items()} == earlier["code"]
    assert record["tested_transformers"] == list(TESTED_TRANSFORMERS)
    assert record["stages"][:-1] == earlier["stages"] and record["stages"][-1]["stage"] == "refresh-code"
    assert record["stages"][-1]["files"] == changed
    assert {key: record[key] for key in ("source", "source_files", "preset")} == {
        key: earlier[key] for key in ("source", "source_files", "preset")
    }
    assert torch.isfinite(DiJiangForCausalLM.from_pretrained(checkpoint)(tokens(20)).logits).all()


def test_code_that_is_up_to_date_is_left_alone(checkpoint):
    before = files_of(checkpoint)
    assert refresh_code(checkpoint) == []
    assert files_of(checkpoint) == before


def test_edited_code_is_kept_unless_told_otherwise(checkpoint, refused):
    (checkpoint / "decoder_modules.py").write_text("# mine\n")
    before = files_of(checkpoint)
    message = "decoder_modules.py in .* is not as recorded in provenance.json.*--overwrite"
    refused(checkpoint, lambda: refresh_code(checkpoint), message)
    assert files_of(checkpoint) == before
    assert refresh_code(checkpoint, overwrite=True) == ["decoder_modules.py"]
    assert (checkpoint / "decoder_modules.py").read_bytes() == CODE["decoder_modules.py"]


def test_interrupted_refresh_goes_on(checkpoint, monkeypatch):
    make_old(checkpoint)
    replace, calls = Path.replace, []

    def stop_at_second(path, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        refresh_code(checkpoint)
    monkeypatch.undo()
    assert refresh_code(checkpoint)
    found = {name: content for name, content in files_of(checkpoint).items() if name.endswith(".py")}
    assert found == CODE and refresh_code(checkpoint) == []


def test_checkpoint_without_provenance_gets_none(checkpoint):
    """As `save_pretrained` leaves it."""
    make_old(checkpoint)
    (checkpoint / "provenance.json").unlink()
    with pytest.raises(ValueError, match=r"has no provenance.json, so edits of modeling_dijiang.py cannot be told from older"):
        refresh_code(checkpoint)
    assert sorted(refresh_code(checkpoint, overwrite=True)) == ["modeling_dijiang.py", "transformers_compat.py"]
    assert not (checkpoint / "provenance.json").exists()


def test_missing_auto_map_is_written_and_other_settings_stay(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    wanted = config.pop("auto_map")
    path.write_text(json.dumps(config))
    assert refresh_code(checkpoint) == ["config.json"]
    assert json.loads(path.read_text()) == config | {"auto_map": wanted}


@pytest.mark.parametrize("name", ["../victim.py", "/etc/victim.py", "model.safetensors"])
def test_provenance_cannot_name_files_elsewhere(checkpoint, refused, name):
    record = json.loads((checkpoint / "provenance.json").read_text())
    record["code"][name] = "0" * 64
    (checkpoint / "provenance.json").write_text(json.dumps(record))
    refused(checkpoint, lambda: refresh_code(checkpoint, overwrite=True), "as code, which is no Python file in it")


def test_damaged_records_are_refused_before_anything_is_written(checkpoint, refused):
    make_old(checkpoint)
    record, config = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("provenance", "config"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": "x"}))
    before = files_of(checkpoint)
    refused(checkpoint, lambda: refresh_code(checkpoint), "auto_map that is no mapping")
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": None}))
    (checkpoint / "provenance.json").write_text(json.dumps(record | {"code": [1]}))
    refused(checkpoint, lambda: refresh_code(checkpoint), "has no record of its code")
    assert (checkpoint / "modeling_dijiang.py").read_bytes() == before["modeling_dijiang.py"]
    (checkpoint / "provenance.json").write_text(json.dumps(record | {"code": None}))
    refused(checkpoint, lambda: refresh_code(checkpoint), "is not as recorded")
    assert "config.json" in refresh_code(checkpoint, overwrite=True)


def test_refreshed_files_can_be_read_by_those_who_could_before(checkpoint):
    make_old(checkpoint)
    for path in checkpoint.iterdir():
        path.chmod(0o644)
    before = os.umask(0o077)
    try:
        refresh_code(checkpoint)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {0o644}


def test_record_from_before_refreshing_is_found_again_to_the_byte(checkpoint):
    """A run goes on only from the checkpoint it began with, by its record; newer code is no other checkpoint."""
    make_old(checkpoint)
    record = read_provenance(checkpoint)
    write_provenance(checkpoint, record)
    before = (checkpoint / "provenance.json").read_text()
    assert before_refreshing(record) is record
    refresh_code(checkpoint)
    (checkpoint / "decoder_modules.py").write_text("# mine\n")
    refresh_code(checkpoint, overwrite=True)
    after = read_provenance(checkpoint)
    assert [stage["stage"] for stage in after["stages"]][-2:] == ["refresh-code"] * 2
    assert provenance_text(before_refreshing(after)) == before


def test_new_checkpoint_made_of_an_old_one_gets_the_installed_code(checkpoint):
    make_old(checkpoint)
    record = with_newest_code(checkpoint, read_provenance(checkpoint))
    assert record["code"] == {name: digest(content) for name, content in CODE.items()}
    assert {name: content for name, content in files_of(checkpoint).items() if name.endswith(".py")} == CODE
    (checkpoint / "decoder_modules.py").write_text("# mine\n")
    assert with_newest_code(checkpoint, record) is record
    assert (checkpoint / "decoder_modules.py").read_text() == "# mine\n"


def test_what_is_no_dijiang_checkpoint_is_refused(make_source, tmp_path, refused):
    source, _ = make_source()
    refused(tmp_path, lambda: refresh_code(source), "is a llama model, not a DiJiang checkpoint; convert it first")
    refused(tmp_path, lambda: refresh_code(tmp_path / "nowhere"), "is not the folder of a checkpoint")


def test_command(checkpoint):
    make_old(checkpoint)
    done = CliRunner().invoke(app, ["refresh-code", str(checkpoint)])
    assert done.exit_code == 0 and "replaced modeling_dijiang.py, old_map.py, transformers_compat.py" in done.output
    done = CliRunner().invoke(app, ["refresh-code", str(checkpoint)])
    assert done.exit_code == 0 and "is up to date" in done.output


STRANGER = """
    import sys
    sys.modules["dijiang"] = None  # every import of it fails from here on
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    ids = torch.arange(2, 22).view(2, 10)
    texts = [model.generate(ids, max_new_tokens=15, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)
    print("same text")
"""


def test_refreshed_checkpoint_generates_without_the_package(checkpoint, tmp_path):
    make_old(checkpoint)
    refresh_code(checkpoint)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRANGER), checkpoint],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip().endswith("same text"), done.stderr[-3000:]
