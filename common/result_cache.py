"""JSON results kept under the hash of all they depend on, so that interrupted work goes on and nothing is computed twice."""

import hashlib
import json
import os
import secrets
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Where results of one kind are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang" / name


def hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


class ResultCache:
    """
    A folder of JSON files. `facts` are JSON-able and name everything that a result depends on.

    Args:
        folder: made when the first result is kept.

    Raises:
        ValueError: if it is a file.
    """

    def __init__(self, folder: Path):
        if folder.is_file():
            raise ValueError(f"cache {folder} is a file; choose a folder")
        self.folder = folder

    def path(self, facts: dict) -> Path:
        return self.folder / f"{hash_of(json.dumps(facts, sort_keys=True).encode())}.json"

    def get(self, facts: dict) -> dict | None:
        """What was kept for these facts, None if nothing was or it cannot be read."""
        try:
            kept = json.loads(self.path(facts).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept.get("result") if isinstance(kept, dict) else None

    def put(self, facts: dict, result: dict) -> None:
        """Keep `result`; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(facts)
        draft = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
        try:
            draft.write_text(json.dumps({"facts": facts, "result": result}), encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
