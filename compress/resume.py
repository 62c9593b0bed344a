"""What a pruning run has done so far, beside its output, so that the same call goes on after a kill."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dijiang.common.outputs import write_whole

ABSENT = object()


def flat(facts: dict) -> dict:
    """`facts` with what is in its dictionaries one level up, so that a difference can be named."""
    return {k: v for key, value in facts.items() for k, v in (value if isinstance(value, dict) else {key: value}).items()}


class WorkFolder:
    """
    A hidden folder next to the output: one file per finished layer, named after it, and what the run was asked to do.

    Args:
        output: of the run.
        facts: JSON-able, all that its results depend on.

    Raises:
        ValueError: if the folder belongs to a run that was asked to do something else.
    """

    def __init__(self, output: Path, facts: dict):
        self.folder = output.parent / f".{output.name}.pruning"
        self.facts, self.made = facts, []
        run = self.folder / "run.json"
        if run.is_file():
            theirs, ours = flat(json.loads(run.read_text(encoding="utf-8"))), flat(json.loads(json.dumps(facts)))
            if differing := [key for key in ours | theirs if ours.get(key, ABSENT) != theirs.get(key, ABSENT)]:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another {', '.join(differing)}; run that one again to finish "
                    "it, or remove the folder"
                )

    def begin(self) -> None:
        """Make the folder, unless it is there."""
        self.made = [parent for parent in self.folder.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "run.json", lambda path: path.write_text(json.dumps(self.facts), encoding="utf-8"))

    def path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"

    def keep(self, index: int, weights: dict[str, torch.Tensor], facts: dict) -> None:
        """Keep a layer's pruned weights, with `facts` of them."""
        write_whole(self.path(index), lambda path: save_file(weights, path, metadata={"facts": json.dumps(facts)}))

    def read(self, index: int) -> dict | None:
        """The facts of a finished layer; None of one that is not."""
        if not self.path(index).is_file():
            return None
        with safe_open(self.path(index), framework="pt") as file:
            return json.loads(file.metadata()["facts"])

    def remove(self) -> None:
        """Remove the folder, and what parents were made for it and hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.made:
            try:
                parent.rmdir()
            except OSError:  # it is in use
                break
