"""The folders of a job: `converted`, and one for each stage, with the recipe it was begun with; and a lock on all of them."""

import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from dijiang.checkpoint.code_files import before_refreshing
from dijiang.checkpoint.lineage import refuse_other_source
from dijiang.checkpoint.provenance import provenance_text, read_provenance
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.common.outputs import write_text_whole
from dijiang.convert import convert_model

from ..memories.material import training_text
from ..memories.run import add_memories
from ..recipe.load import NOT_LEARNED, differences, dump_recipe, load_recipe
from ..recipe.schema import Recipe, StageConfig

RECIPE_FILE = "recipe.yaml"
UNUSED = {"align": ("distill", "data.recall.answer_weight"), "distill": ()}  # by stage: what has no part in it


class StageFolder:
    """
    The folders that one stage of a recipe reads and writes.

    Args:
        recipe: of the whole job.
        stage: `align` or `distill`.

    Attributes:
        config: the recipe's section of the stage.
        output: the job's folder.
        path: the stage's own folder in it.
        model: the result; exists only when it is complete.
        teacher_logits: the teacher's most likely tokens, if the stage reads them from disk.
        converted: the converted source.
        memories: the converted source with kept heads or a fitted memory, if the recipe asks for them.
        source: the checkpoint that the stage starts from.
        recipe_file: the recipe that the stage was begun with.
    """

    def __init__(self, recipe: Recipe, stage: str):
        self.recipe = recipe
        self.stage = stage
        self.config: StageConfig = getattr(recipe, stage)
        self.output = Path(recipe.output).expanduser()
        self.path = self.output / stage
        self.model = self.path / "model"
        self.teacher_logits = self.path / "teacher_logits"
        self.converted = self.output / "converted"
        self.memories = self.output / "memories"
        self.start = self.memories if recipe.select or recipe.fit else self.converted
        self.source = self.output / "align" / "model" if stage == "distill" and recipe.align else self.start
        self.recipe_file = self.path / RECIPE_FILE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Hold the job's folder; the operating system releases it when this process ends in any way.

        Raises:
            ValueError: if another run holds it, or the folder cannot be made.
        """
        lock = FileLock(self.output / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(f"another run is writing to {self.output}; wait for it, or end it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise ValueError(f"cannot write to {self.output} ({error.strerror}); choose another output") from None
        try:
            yield
        finally:
            lock.release()

    def prepare(self, progress: bool) -> None:
        """
        Remove the drafts of killed runs, convert the source if that has not been done, and store the recipe.

        Raises:
            ValueError: if the recipe is not the one that the folder was begun with, or the stage before is not complete.
        """
        drafts = (self.output.glob(".*.partial"), self.path.glob("*.partial"), self.teacher_logits.glob("*.partial"))
        for path in itertools.chain(*drafts):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.refuse_other_recipe()
        recipe, convert = self.recipe, self.recipe.convert
        if self.source != self.start:
            if not self.source.exists():
                raise ValueError(f"{self.source} is not there yet; run the align stage first")
        else:
            if not self.converted.exists() and not self.start.exists():
                settings = {"dtype": convert.dtype, "progress": progress}
                convert_model(recipe.source, self.converted, convert.preset, **settings, **convert.settings)
            if not self.start.exists():
                tokenizer = load_tokenizer(open_source(self.converted))
                text = training_text(recipe.data, tokenizer, progress=progress)
                memories = {"select": recipe.select, "fit": recipe.fit, "texts": text, "progress": progress}
                add_memories(self.converted, self.memories, teacher=recipe.source, **memories)
        if not self.recipe_file.exists():
            write_text_whole(self.recipe_file, dump_recipe(self.recipe))

    def refuse_other_recipe(self) -> None:
        """Raise ValueError if this stage, or one that it depends on, was begun with other settings than the recipe's."""
        for path in self.output.glob(f"*/{RECIPE_FILE}"):
            unused = {*UNUSED[self.stage], *UNUSED.get(path.parent.name, ())}
            if path.parent.name == "distill" != self.stage:
                continue  # the distill stage depends on this one, and is checked when it runs
            if keys := differences(load_recipe(path, stored=True), self.recipe, (*NOT_LEARNED, *sorted(unused))):
                raise ValueError(
                    f"{path.parent} was begun with another recipe: {', '.join(keys)} differ; "
                    f"name another output, or delete that folder to start again"
                )

    def refuse_other_lineage(self) -> None:
        """Raise ValueError unless the stage starts from a conversion of the recipe's source with the recipe's settings."""
        provenance = read_provenance(self.source)
        refuse_other_source(provenance, self.recipe.source)
        convert = self.recipe.convert
        conversion = next((stage for stage in provenance["stages"] if stage["stage"] == "convert"), {})
        expected = {"preset": convert.preset, "overrides": convert.settings, "dtype": convert.dtype}
        for key, value in expected.items():
            if conversion.get(key) != value:
                raise ValueError(
                    f"{self.source} was converted with {key} {conversion.get(key)}, the recipe's is {value}; "
                    f"name another output, or delete {self.output}"
                )
        for name in ("select", "fit"):
            section = getattr(self.recipe, name)
            expected = None if section is None else json.loads(json.dumps(asdict(section)))
            found = next((stage["config"] for stage in provenance["stages"] if stage["stage"] == name), None)
            if found != expected:
                raise ValueError(
                    f"{self.source} was made with other settings of {name} than the recipe's; name another output, or delete "
                    f"{self.output}"
                )

    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that the stage starts from, by its provenance; newer code files do not change it."""
        path, provenance = self.source / "provenance.json", read_provenance(self.source)
        before = before_refreshing(provenance)
        content = path.read_bytes() if before is provenance else provenance_text(before).encode()
        return hashlib.sha256(content).hexdigest()
