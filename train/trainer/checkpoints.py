"""Checkpoints of a running stage. One that has its name is complete, and no other is ever resumed from."""

import json
import os
import re
import shutil
from pathlib import Path

from dijiang.common.errors import print_line

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """
    The folders `checkpoint-<step>` below `folder`.

    Args:
        folder: that holds them; created with the first.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """The folders that have the name of a checkpoint, newest first."""
        folders = [path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=step_of, reverse=True)

    def newest(self) -> Path | None:
        """The newest one that is complete. Damaged ones are reported on stderr and skipped."""
        for path in self.all():
            if (problem := damage(path)) is None:
                return path
            print_line(f"{path} is damaged ({problem}); using the one before it")
        return None

    def partial(self, step: int) -> Path:
        """The folder in which all processes write this step's checkpoint, as `checkpoint-<step>`."""
        return self.folder / f"{PARTIAL}{step}"

    def clean(self) -> None:
        """Remove what killed runs left half written or half removed."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)

    def commit(self, step: int, facts: dict) -> Path:
        """
        Add a manifest of `facts` and of the files' sizes to the checkpoint in `partial(step)`, put all of it on disk, and give
        it its name; then remove the oldest beyond `keep`.
        """
        partial = self.partial(step)
        written = partial / f"checkpoint-{step}"
        files = sorted(path for path in written.rglob("*") if path.is_file())
        sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in files}
        manifest = written / MANIFEST
        manifest.write_text(json.dumps({"step": step, **facts, "files": sizes}, indent=1), encoding="utf-8")
        for path in (*files, manifest, *(path for path in written.rglob("*") if path.is_dir()), written):
            to_disk(path)
        target = self.folder / written.name
        if target.exists():  # it is damaged, else the run would have resumed from it
            self.remove(target)
        written.rename(target)
        to_disk(self.folder)
        partial.rmdir()
        for path in [path for path in self.all() if step_of(path) <= step][self.keep :]:
            self.remove(path)
        return target

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, its name first, so that no half-removed folder looks like one."""
        nameless = self.folder / f"{PARTIAL}removed-{step_of(path)}"
        path.rename(nameless)
        shutil.rmtree(nameless)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(path.name).group(1))


def read_manifest(path: Path) -> dict:
    """The manifest that `commit` wrote into the checkpoint `path`."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def damage(path: Path) -> str | None:
    """A description of what the checkpoint `path` lacks by its manifest; None if it is complete."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None


def to_disk(path: Path) -> None:
    """Make the operating system write a file's content, or a folder's list of names, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
