"""The teacher's most likely tokens on disk: right, in place, and whole whenever they are there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dijiang_testing.model_checks import random_ids, tiny_model
from torch.utils.data import Dataset

from dijiang.train.recipe.schema import DistillConfig
from dijiang.train.stages import teacher_logits
from dijiang.train.stages.distill import DistillModel
from dijiang.train.stages.teacher_logits import (
    WithTeacherLogits,
    bytes_needed,
    collate_with_teacher,
    is_complete,
    layout_of,
    write_teacher_logits,
)

SAMPLES, BLOCK, VOCAB = 11, 12, 97
SETTINGS = {"top_k": 5, "vocab_size": VOCAB, "temperature": 1.0, "fingerprint": "teacher and text"}


class Blocks(Dataset):
    """Blocks whose rows double in length, a document's start in every third one."""

    def __init__(self, samples=SAMPLES):
        self.ids = random_ids(samples, BLOCK, seed=3)
        self.asked = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.asked.append(index)
        length = 3 if index < 4 else 6 if index < 8 else 12
        positions = torch.arange(length).repeat(BLOCK // length, 1)
        if index % 3 == 0:
            positions[-1, 2:] = torch.arange(length - 2)
        return {"input_ids": self.ids[index].view(-1, length), "position_ids": positions, "sample_index": torch.tensor(index)}


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(2, layer_types=["full_attention"] * 2)


@pytest.fixture
def small_shards(monkeypatch):
    """Two samples per file."""
    monkeypatch.setattr(teacher_logits, "SHARD_BYTES", bytes_needed(2, BLOCK, 5, VOCAB))


def layout(blocks=None, **settings):
    return layout_of(blocks or Blocks(), **SETTINGS | settings)


def write(teacher, folder, blocks=None, batch_size=1, chunk_tokens=256, **settings):
    blocks = blocks or Blocks()
    sizes = {"batch_size": batch_size, "chunk_tokens": chunk_tokens}
    write_teacher_logits(teacher, blocks, folder, layout(blocks, **settings), **sizes, progress=False)
    return folder


def read(folder, blocks=None, **settings):
    return WithTeacherLogits(blocks or Blocks(), folder, layout(blocks, **settings))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 256), (3, 5)])
@torch.no_grad()
def test_items_hold_what_the_teacher_says_of_each_document(
    teacher, tmp_path, small_shards, temperature, batch_size, chunk_tokens
):
    write(teacher, tmp_path, temperature=temperature, batch_size=batch_size, chunk_tokens=chunk_tokens)
    found = read(tmp_path, temperature=temperature)
    assert len(found) == SAMPLES
    for index in (*range(SAMPLES), 3, 0):
        item = found[index]
        ids, positions = item["input_ids"], item["position_ids"]
        assert item["teacher_ids"].shape == item["teacher_logprobs"].shape == (*ids.shape, 5)
        assert item["teacher_ids"].dtype == torch.int64 and item["teacher_logprobs"].dtype == torch.float16
        for row, where, top, logprobs in zip(ids, positions, item["teacher_ids"], item["teacher_logprobs"], strict=True):
            bounds = [*(where == 0).nonzero().flatten().tolist(), len(row)]
            documents = [row[a:b] for a, b in pairwise(bounds)]
            logits = torch.cat([teacher(document[None]).logits[0] for document in documents]) / temperature
            right = logits.log_softmax(-1)
            assert torch.equal(top, right.topk(5).indices)
            assert (logprobs - right.topk(5).values).abs().max() < 1e-2
            assert (logprobs.float().exp() - right.topk(5).values.exp()).abs().max() < 2e-3


def test_batches_carry_the_teachers_part_row_by_row(teacher, tmp_path):
    found = read(write(teacher, tmp_path))
    items = [found[index] for index in (4, 5, 6)]
    batch = collate_with_teacher(items)
    assert batch["sample_indices"].tolist() == [4, 5, 6]
    assert torch.equal(batch["teacher_ids"][2:4], items[1]["teacher_ids"]) and batch["teacher_ids"].shape == (6, 6, 5)
    assert torch.equal(batch["teacher_logprobs"][4:], items[2]["teacher_logprobs"])
    assert collate_with_teacher([Blocks()[8]]).keys() == {"input_ids", "sample_indices"}, "held-out text has no teacher"


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_training_from_disk_is_training_beside_the_teacher(teacher, tmp_path, temperature):
    """With every token kept: up to the rounding of the stored numbers."""
    config = DistillConfig(tokens=BLOCK, block_size=BLOCK, temperature=temperature)
    beside, alone = (DistillModel(tiny_model(1), model, config).train() for model in (teacher, None))
    write(teacher, tmp_path, top_k=1000, temperature=temperature)
    found = read(tmp_path, top_k=1000, temperature=temperature)
    for index in (0, 5, 10):
        batch = collate_with_teacher([found[index]])
        right = beside(**{key: value for key, value in batch.items() if not key.startswith("teacher")})["loss"]
        assert abs(alone(**batch)["loss"] - right) < 2e-3 * right


def test_bytes_on_disk_are_those_foretold(teacher, tmp_path):
    write(teacher, tmp_path, top_k=7)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    assert size == bytes_needed(SAMPLES, BLOCK, 7, VOCAB) == SAMPLES * BLOCK * 7 * 4
    assert bytes_needed(3, 10, 4, 65_536) == 3 * 10 * 4 * 4 and bytes_needed(3, 10, 4, 65_537) == 3 * 10 * 4 * 6
    assert bytes_needed(3, 10, 500, 60) == bytes_needed(3, 10, 60, 60)


def test_ids_beyond_16_bits_are_kept(tmp_path):
    class LastToken(torch.nn.Module):
        """Finds token 69,999 and the three before it the most likely ones, always."""

        config = SimpleNamespace(vocab_size=70_000)
        lm_head = SimpleNamespace(weight=torch.arange(70_000.0)[:, None] / 7000)

        def model(self, input_ids, **_):
            return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))

    write(LastToken(), tmp_path, top_k=4, vocab_size=70_000)
    item = read(tmp_path, top_k=4, vocab_size=70_000)[9]
    assert (item["teacher_ids"] == torch.tensor([69_999, 69_998, 69_997, 69_996])).all()
    assert item["teacher_logprobs"].isfinite().all()


def test_shared_among_processes_they_are_the_same(teacher, tmp_path, small_shards, monkeypatch):
    alone = contents(write(teacher, tmp_path / "alone"))
    together, asked = tmp_path / "together", []
    for rank in (2, 0, 1):  # one after another, so each sees other shards missing
        assert not is_complete(together, layout())
        blocks = Blocks()
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "3")
            write(teacher, together, blocks)
        asked.append(set(blocks.asked) - {0})
    assert contents(together) == alone and is_complete(together, layout())
    assert set.union(*asked) | {0} == set(range(SAMPLES)) and sum(map(len, asked)) == SAMPLES - 1


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_teacher_logits as t
from pathlib import Path
replace, done = Path.replace, []
def die(self, target):
    if len(done) == 3:  # the fourth file is written, but not yet in its place
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(target)
    return replace(self, target)
Path.replace = die
t.teacher_logits.SHARD_BYTES = t.bytes_needed(2, t.BLOCK, 5, t.VOCAB)
t.write(t.tiny_model(2, layer_types=["full_attention"] * 2), Path(sys.argv[3]))
"""


def test_killed_while_it_writes_it_goes_on(teacher, tmp_path, small_shards):
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here), str(tmp_path / "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = contents(tmp_path / "killed")
    draft, *names = sorted(before)
    assert draft.startswith(".logits-000002.bin.") and draft.endswith(".partial")
    assert names == ["logits-000000.bin", "logits-000001.bin", "meta.json"]
    with pytest.raises(ValueError, match="lacks 4 of 6 files"):
        read(tmp_path / "killed")
    blocks = Blocks()
    write(teacher, tmp_path / "killed", blocks)
    assert set(blocks.asked) == {0, *range(4, SAMPLES)}, "what was there is not computed again"
    (tmp_path / "killed" / draft).unlink()  # as `StageFolder.prepare` does
    assert contents(tmp_path / "killed") == contents(write(teacher, tmp_path / "whole"))


def test_a_cut_file_is_written_again(teacher, tmp_path, small_shards):
    expected = contents(write(teacher, tmp_path))
    cut = tmp_path / "logits-000003.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert not is_complete(tmp_path, layout())
    write(teacher, tmp_path)
    assert contents(tmp_path) == expected


def test_complete_logits_need_no_teacher(teacher, tmp_path):
    write(teacher, tmp_path)
    assert is_complete(tmp_path, layout()) and not is_complete(tmp_path / "none", layout())
    blocks = Blocks()
    write(teacher, tmp_path, blocks)
    assert set(blocks.asked) == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other text"}, "fingerprint teacher and text where other text is expected"),
        ({"top_k": 6}, "top_k 5 where 6 is expected"),
        ({"temperature": 2.0}, "temperature 1.0 where 2.0 is expected"),
        ({"samples": 9}, "places 11 where 9 is expected"),
    ],
)
def test_other_logits_are_refused(teacher, tmp_path, change, message):
    expected = contents(write(teacher, tmp_path))
    change = dict(change)
    blocks = Blocks(change.pop("samples", SAMPLES))
    for call in (
        lambda: write(teacher, tmp_path, blocks, **change),
        lambda: is_complete(tmp_path, layout(blocks, **change)),
        lambda: read(tmp_path, blocks, **change),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"places": SAMPLES})])
def test_a_damaged_description_is_named(teacher, tmp_path, text):
    (tmp_path / "meta.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged; delete the folder"):
        write(teacher, tmp_path)


def test_a_disk_too_small_is_refused_before_the_work(teacher, tmp_path, small_shards, monkeypatch):
    needed, usage = bytes_needed(SAMPLES, BLOCK, 5, VOCAB), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=f"need {needed:,} bytes and {needed - 1:,} are free; lower teacher_top_k=5"):
        write(teacher, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    write(teacher, tmp_path)
    (tmp_path / "logits-000005.bin").unlink()  # of one sample: only its bytes are missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // SAMPLES))
    write(teacher, tmp_path)


def test_records_are_the_documented_bytes(teacher, tmp_path):
    """Readable without our code: ids, then log-probabilities, of one sample after another."""
    write(teacher, tmp_path)
    item = read(tmp_path)[10]
    raw = np.fromfile(tmp_path / "logits-000000.bin", "<u2").reshape(SAMPLES, 2, BLOCK, 5)
    assert np.array_equal(raw[10, 0], item["teacher_ids"].view(BLOCK, 5).numpy())
    assert np.array_equal(raw[10, 1].view("<f2"), item["teacher_logprobs"].view(BLOCK, 5).numpy())
