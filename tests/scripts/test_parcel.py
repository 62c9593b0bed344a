import itertools
import json
import random
import shutil
from pathlib import Path

import parcel
import pytest

LIMIT = 40_000  # bytes of a part


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files of all kinds: larger than a part, empty, compressible and not."""
    source = tmp_path / "source"
    rng = random.Random(1)
    contents = {
        "weights/model.gguf": rng.randbytes(70_000),
        "wheels/one.whl": rng.randbytes(5_000),
        "wheels/empty.whl": b"",
        "corpus/train/tokens.bin": b"a text with tokens " * 9_000,
        "corpus/held/x/tokens.bin": rng.randbytes(900),
    }
    for name, content in contents.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return source


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(parcel, "PIECE", 32_000)


FIRST = ["wheels", "corpus/held", "weights"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".parts" not in path.parts
    }


def deliver(parts: Path, name: str, where: Path) -> Path:
    """A folder with one part and the manifest."""
    where.mkdir(parents=True)
    shutil.copy(parts / name, where)
    shutil.copy(parts / parcel.MANIFEST, where)
    return where


def test_same_files_same_bytes_and_the_first_part_holds_what_is_small(folder, tmp_path):
    manifest = parcel.split(folder, tmp_path / "a", FIRST, limit=LIMIT)
    parcel.split(folder, tmp_path / "b", FIRST, limit=LIMIT, cache=tmp_path / "cache")
    parcel.split(folder, tmp_path / "c", FIRST, limit=LIMIT, cache=tmp_path / "cache")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert all(part["bytes"] <= LIMIT for part in manifest["parts"])
    total = sum(part["bytes"] for part in manifest["parts"])
    assert len(manifest["parts"]) == -(-total // LIMIT)
    assert total < 90_000  # the tokens were compressed
    in_first = [file["path"] for file in manifest["files"][:3]]
    assert in_first == ["wheels/empty.whl", "wheels/one.whl", "corpus/held/x/tokens.bin"]
    assert all(slices["part"] == 0 for file in manifest["files"][:3] for piece in file["pieces"] for slices in piece["slices"])


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_parts_may_come_in_any_order_and_one_at_a_time(folder, tmp_path, order, capsys):
    parts, target = tmp_path / "parts", tmp_path / "target"
    manifest = parcel.split(folder, parts, FIRST, limit=LIMIT)
    names = [part["name"] for part in manifest["parts"]]
    sequence = [names[place] for place in order] + names[2:]
    for number, name in enumerate(sequence):
        arrived = deliver(parts, name, tmp_path / f"delivery-{number}")
        assert parcel.main(["join", str(arrived), str(target)]) == 0
        missing = [name for name in names if name not in sequence[: number + 1]]
        printed = capsys.readouterr().out
        assert ("missing: " + " ".join(missing) in printed) if missing else ("missing" not in printed)
        shutil.rmtree(arrived)
    assert contents(target) == contents(folder)
    assert not list((target / ".parts").glob("[0-9a-f]*"))


def test_what_is_complete_is_joined_before_the_rest_arrives(folder, tmp_path):
    parts, target = tmp_path / "parts", tmp_path / "target"
    parcel.split(folder, parts, FIRST, limit=LIMIT)
    parcel.join([deliver(parts, "part-01.bin", tmp_path / "first")], target)
    joined = contents(target)
    assert {"wheels/one.whl", "wheels/empty.whl", "corpus/held/x/tokens.bin"} <= joined.keys()
    assert "corpus/train/tokens.bin" not in joined
    assert joined.items() <= contents(folder).items()


def test_several_folders_at_once_and_again_without_them(folder, tmp_path, capsys):
    parts, target = tmp_path / "parts", tmp_path / "target"
    manifest = parcel.split(folder, parts, FIRST, limit=LIMIT)
    arrived = [deliver(parts, part["name"], tmp_path / part["name"]) for part in manifest["parts"]]
    assert parcel.main(["join", *map(str, arrived), str(target)]) == 0
    (target / "wheels/one.whl").write_bytes(b"cut short")
    assert parcel.main(["join", str(tmp_path / "part-01.bin"), str(target)]) == 0  # joined again from its part
    assert contents(target) == contents(folder)
    assert parcel.main(["join", str(tmp_path / "nothing"), str(target)]) == 0  # all is there: the manifest was kept
    assert "missing" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_damage_is_refused_in_one_line(folder, tmp_path, damage, capsys):
    parts, target = tmp_path / "parts", tmp_path / "target"
    parcel.split(folder, parts, FIRST, limit=LIMIT)
    part = parts / "part-02.bin"
    content = bytearray(part.read_bytes())
    content[1_000] ^= 1
    part.write_bytes(content if damage == "flipped" else content[:-1])
    assert parcel.main(["join", str(parts), str(target)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "part-02.bin is damaged" in message and "bring it again" in message


def test_a_kept_part_that_went_bad_is_asked_for_again(folder, tmp_path):
    parts, target = tmp_path / "parts", tmp_path / "target"
    manifest = parcel.split(folder, parts, FIRST, limit=LIMIT)
    parcel.join([deliver(parts, "part-02.bin", tmp_path / "second")], target)
    (target / ".parts" / manifest["parts"][1]["sha256"]).write_bytes(b"gone bad")
    assert "part-02.bin" in parcel.join([deliver(parts, "part-01.bin", tmp_path / "first")], target)


@pytest.mark.parametrize("path", ["../outside", "/outside", ".parts/x"])
def test_a_manifest_that_leads_elsewhere_is_refused(folder, tmp_path, path, capsys):
    parts = tmp_path / "parts"
    manifest = parcel.split(folder, parts, FIRST, limit=LIMIT)
    manifest["files"][0]["path"] = path
    (parts / parcel.MANIFEST).write_text(json.dumps(manifest))
    assert parcel.main(["join", str(parts), str(tmp_path / "target")]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_no_manifest_and_manifests_of_two_parcels(folder, tmp_path, capsys):
    assert parcel.main(["join", str(tmp_path), str(tmp_path / "target")]) == 1
    assert "no manifest.json" in capsys.readouterr().err
    parcel.split(folder, tmp_path / "a", FIRST, limit=LIMIT)
    (folder / "wheels/one.whl").write_bytes(b"another version")
    parcel.split(folder, tmp_path / "b", FIRST, limit=LIMIT)
    assert parcel.main(["join", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "target")]) == 1
    assert "different parcels" in capsys.readouterr().err
