"""`provenance.json`: the source of a checkpoint and every stage it went through."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dijiang.common.outputs import write_text_whole

FILE_NAME = "provenance.json"
BLOCK_BYTES = 1 << 22


def read_provenance(folder: str | Path) -> dict[str, Any]:
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


def write_provenance(folder: str | Path, provenance: dict[str, Any]) -> None:
    """Write `provenance` into `folder`; the file appears, or is replaced, whole or not at all."""
    write_text_whole(Path(folder) / FILE_NAME, provenance_text(provenance))


def provenance_text(provenance: dict[str, Any]) -> str:
    """The text of `provenance.json`."""
    return json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"


def add_stage(provenance: dict[str, Any], stage: str, **facts: Any) -> dict[str, Any]:
    """`provenance` with one more stage at the end: its name, the time (UTC), the versions in use and `facts`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"stage": stage, "time": now, "versions": versions(), **facts}
    return provenance | {"stages": [*provenance.get("stages", []), record]}


def public_name(source: str | Path) -> str:
    """Name of a source for records: a hub id as it is, of a local path the last part alone, since checkpoints get shared."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else str(source)


def versions() -> dict[str, str]:
    """Versions of the software that a checkpoint's values depend on."""
    installed = {"python": platform.python_version()}
    for package in ("dijiang", "torch", "transformers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # a source tree that was never installed
            installed[package] = "unknown"
    return installed


def hash_files(paths: Iterable[Path], advance: Callable[[int], None] = lambda n_bytes: None) -> dict[str, str]:
    """SHA-256 of each file, by file name; `advance` is called with the number of bytes read since."""
    digests = {}
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                advance(len(block))
        digests[path.name] = digest.hexdigest()
    return digests
