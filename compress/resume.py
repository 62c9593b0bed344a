"""Finished layers of a pruning run, in a hidden folder next to its output, so that the same call continues after a kill."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dijiang.common.outputs import write_text_whole, write_whole

ABSENT = object()


class WorkFolder:
    """
    A hidden folder next to the output: one file per finished layer, and what the run was asked to do.

    Args:
        output: of the run.
        facts: JSON-able, all that its results depend on.
        renamed: new names of facts by their former ones, which an earlier version may have written.

    Raises:
        ValueError: if the folder belongs to a run with other facts.
    """

    def __init__(self, output: Path, facts: dict, *, renamed: Mapping[str, str]):
        self.folder = output.parent / f".{output.name}.pruning"
        self.facts = facts
        self.new_parents: list[Path] = []
        run = self.folder / "run.json"
        if run.is_file():
            theirs = flat(json.loads(run.read_text(encoding="utf-8")))
            theirs = {renamed.get(key, key): value for key, value in theirs.items()}
            ours = flat(json.loads(json.dumps(facts)))
            if differing := [key for key in ours | theirs if ours.get(key, ABSENT) != theirs.get(key, ABSENT)]:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another {', '.join(differing)}; run that one again to finish "
                    "it, or remove the folder"
                )

    def begin(self) -> None:
        """Make the folder if it does not exist."""
        self.new_parents = [parent for parent in self.folder.parents if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(self.folder / "run.json", json.dumps(self.facts))

    def path(self, index: int) -> Path:
        """File of a finished layer."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def keep(self, index: int, weights: dict[str, torch.Tensor], facts: dict) -> None:
        """Write a layer's pruned weights and `facts` about them."""
        write_whole(self.path(index), lambda path: save_file(weights, path, metadata={"facts": json.dumps(facts)}))

    def read(self, index: int) -> dict | None:
        """Facts of a finished layer; None for one that is not."""
        if not self.path(index).is_file():
            return None
        with safe_open(self.path(index), framework="pt") as file:
            return json.loads(file.metadata()["facts"])

    def remove(self) -> None:
        """Remove the folder, and those parents made for it that hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.new_parents:
            try:
                parent.rmdir()
            except OSError:  # it is in use
                break


def flat(facts: dict) -> dict:
    """`facts` with the entries of its dictionaries one level up, so that a difference can be named."""
    entries = {}
    for key, value in facts.items():
        entries |= value if isinstance(value, dict) else {key: value}
    return entries
