"""Keeps each result of an evaluation under the hash of all it depends on, so that an interrupted one goes on."""

import hashlib
import json
import os
import secrets
from pathlib import Path

from dijiang import convert, modeling

# whose code scores depend on, besides the model's own; the others draw and tell
MEASURING = frozenset(
    "agreement attention_maps controls harness harness_task kernel_inputs perplexity recall subjects tasks".split()
)


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang" / "evaluations"


def hash_of(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def code_hash() -> str:
    """Of the code that measures, of the model's, and of that which turns a source into a model."""
    rooms = [(Path(__file__).parent, MEASURING), *((Path(room.__file__).parent, set()) for room in (modeling, convert))]
    files = [path for folder, names in rooms for path in sorted(folder.glob("*.py")) if not names or path.stem in names]
    return hash_of(*(path.read_bytes() for path in files))


class ResultCache:
    """
    A folder of JSON files. `facts` are JSON-able and name everything that a result depends on.

    Args:
        folder: made when the first result is kept.
    """

    def __init__(self, folder: Path):
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
