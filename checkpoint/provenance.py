"""`provenance.json`: where a checkpoint comes from and every stage it went through."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE_NAME = "provenance.json"
BLOCK_BYTES = 1 << 22


def read_provenance(folder: str | Path) -> dict:
    """
    The record of the checkpoint in `folder`.

    Raises:
        ValueError: if there is none, or it is not one of ours.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FILE_NAME}, so it is not a DiJiang checkpoint; make one with `dijiang convert`")
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; convert the source again") from None
    if not isinstance(provenance, dict) or not isinstance(provenance.get("stages"), list):
        raise ValueError(f"{path} has no list of stages; convert the source again")
    return provenance


def write_provenance(folder: str | Path, provenance: dict) -> None:
    """Write `provenance` into `folder`, replacing the file at once."""
    path = Path(folder) / FILE_NAME
    draft = path.with_suffix(".partial")
    draft.write_text(provenance_text(provenance), encoding="utf-8")
    draft.replace(path)


def provenance_text(provenance: dict) -> str:
    """What `write_provenance` writes."""
    return json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"


def add_stage(provenance: dict, stage: str, **facts) -> dict:
    """`provenance` with one more stage at the end: its name, the time (UTC), the versions in use and `facts`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"stage": stage, "time": now, "versions": versions(), **facts}
    return provenance | {"stages": [*provenance.get("stages", []), record]}


def public_name(source: str | Path) -> str:
    """What a record says of `source`: a hub id as it is, of a local path its name alone, since checkpoints get shared."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's values depend on."""
    found = {"python": platform.python_version()}
    for package in ("dijiang", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that was never installed
            found[package] = "unknown"
    return found


def hash_files(paths: Iterable[Path], advance: Callable[[int], None] = lambda n_bytes: None) -> dict[str, str]:
    """SHA-256 of each file, by file name; `advance` is told how many bytes were read."""
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                advance(len(block))
        digests[path.name] = digest.hexdigest()
    return digests
