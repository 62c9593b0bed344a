"""The folders of a job: `converted`, and for each stage its own, with the recipe it was begun with and a lock on the whole."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dijiang.checkpoint.code_files import before_refreshing
from dijiang.checkpoint.lineage import refuse_other_source
from dijiang.checkpoint.provenance import provenance_text, read_provenance
from dijiang.convert import convert_model

from ..recipe.load import NOT_LEARNED, differences, dump_recipe, load_recipe
from ..recipe.schema import Recipe

RECIPE_FILE = "recipe.yaml"
UNUSED = {"align": ("distill",), "distill": ()}  # sections that have no part in a stage


class StageFolder:
    """
    Where one stage of a recipe reads and writes.

    Attributes:
        output: of the whole job.
        path: the stage's own folder in it.
        model: the result; exists only when it is complete.
        source: the checkpoint that the stage starts from.
    """

    def __init__(self, recipe: Recipe, stage: str):
        self.recipe, self.stage = recipe, stage
        self.output = Path(recipe.output).expanduser()
        self.path = self.output / stage
        self.model = self.path / "model"
        self.converted = self.output / "converted"
        self.source = self.output / "align" / "model" if stage == "distill" and recipe.align else self.converted

    @property
    def recipe_file(self) -> Path:
        return self.path / RECIPE_FILE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the job's folder; the operating system lets go of it when this process ends in any way.

        Raises:
            ValueError: if another run holds it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.output / ".lock", "w")
        except OSError as error:
            raise ValueError(f"cannot write to {self.output} ({error.strerror}); choose another output") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is writing to {self.output}; wait for it, or end it") from None
            except OSError:  # a file system without locks
                pass
            yield

    def prepare(self, progress: bool) -> None:
        """
        Convert the source if that has not been done, and note the recipe.

        Raises:
            ValueError: if the recipe is not the one that the folder was begun with, or the stage before is not complete.
        """
        for folder in (self.output, self.path):  # left by a kill
            for path in folder.glob(".*.partial"):
                shutil.rmtree(path)
        self.refuse_other_recipe()
        convert = self.recipe.convert
        if self.source != self.converted:
            if not self.source.exists():
                raise ValueError(f"{self.source} is not there yet; run the align stage first")
        elif not self.converted.exists():
            settings = {"dtype": convert.dtype, "progress": progress}
            convert_model(self.recipe.source, self.converted, convert.preset, **settings, **convert.settings)
        if not self.recipe_file.exists():
            draft = self.recipe_file.with_suffix(".partial")
            draft.write_text(dump_recipe(self.recipe), encoding="utf-8")
            draft.replace(self.recipe_file)

    def refuse_other_recipe(self) -> None:
        """Raise ValueError if what is here was begun with other settings than the recipe's."""
        for path in self.output.glob(f"*/{RECIPE_FILE}"):
            unused = {*UNUSED[self.stage], *UNUSED.get(path.parent.name, ())}
            if path.parent.name == "distill" != self.stage:
                continue  # made from what this stage gives; it is judged when it runs
            if found := differences(load_recipe(path, stored=True), self.recipe, (*NOT_LEARNED, *sorted(unused))):
                raise ValueError(
                    f"{path.parent} was begun with another recipe: {', '.join(found)} differ; "
                    f"name another output, or delete that folder to start anew"
                )

    def refuse_other_lineage(self) -> None:
        """Raise ValueError unless the stage starts from a conversion of the recipe's source with the recipe's settings."""
        provenance = read_provenance(self.source)
        refuse_other_source(provenance, self.recipe.source)
        convert = self.recipe.convert
        done = next((stage for stage in provenance["stages"] if stage["stage"] == "convert"), {})
        wanted = {"preset": convert.preset, "overrides": convert.settings, "dtype": convert.dtype}
        for key, value in wanted.items():
            if done.get(key) != value:
                raise ValueError(
                    f"{self.source} was converted with {key} {done.get(key)}, the recipe's is {value}; "
                    f"name another output, or delete {self.output}"
                )

    def fingerprint(self) -> str:
        """Of the checkpoint that the stage starts from, by its record; newer code in it makes it no other checkpoint."""
        path, provenance = self.source / "provenance.json", read_provenance(self.source)
        before = before_refreshing(provenance)
        content = path.read_bytes() if before is provenance else provenance_text(before).encode()
        return hashlib.sha256(content).hexdigest()
