"""JSON results kept under the hash of all they depend on, so that interrupted work continues and nothing is computed twice."""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from .outputs import write_text_whole


def cache_folder(name: str) -> Path:
    """Where results of one kind are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang" / name


def hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def code_fingerprint(*packages: str) -> str:
    """
    Hash of the Python files of packages, sub-packages included; part of the cache key of results that the code computes.

    Args:
        packages: dotted names of packages or modules, such as `dijiang.modeling`; they are not imported.
    """
    parts = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for path in files:
            parts += [package.encode(), path.relative_to(origin.parent).as_posix().encode(), path.read_bytes()]
    return hash_of(*parts)


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

    def path(self, facts: dict[str, Any]) -> Path:
        return self.folder / f"{hash_of(json.dumps(facts, sort_keys=True).encode())}.json"

    def get(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        """What was kept for these facts, None if nothing was or it cannot be read."""
        try:
            kept = json.loads(self.path(facts).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept.get("result") if isinstance(kept, dict) else None

    def put(self, facts: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep `result`; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(self.path(facts), json.dumps({"facts": facts, "result": result}))
