"""The model's code beside its weights, so that a checkpoint loads where `dijiang` is not installed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dijiang.modeling
from dijiang.modeling.configuration_dijiang import AUTO_MAP
from dijiang.modeling.transformers_compat import TESTED_TRANSFORMERS

from .provenance import FILE_NAME, add_stage, hash_files, read_provenance, write_provenance
from .source import read_json

REFRESHED = "refresh-code"  # the stage that `refresh_code` adds


def code_files() -> list[Path]:
    """The files that every checkpoint carries, where they lie in the installed package."""
    room = Path(dijiang.modeling.__file__).parent
    return sorted(path for path in room.glob("*.py") if path.name != "__init__.py")


def copy_code(folder: Path) -> list[Path]:
    """Put the model's code into `folder`; returns the new files."""
    return [Path(shutil.copyfile(path, folder / path.name)) for path in code_files()]


def code_record(files: list[Path]) -> dict[str, Any]:
    """What provenance says of a checkpoint's code: SHA-256 by file name, and the transformers versions it was tested with."""
    return {"code": hash_files(files), "tested_transformers": list(TESTED_TRANSFORMERS)}


def with_newest_code(folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """
    Put the installed code into `folder`, a new checkpoint made from one that an earlier version may have written; returns
    `provenance` with the code's record. Code that was edited by hand stays, all of it, since its files belong together.
    """
    state = CodeState.of(folder, provenance)
    if state.edited:
        return provenance
    state.replace()
    return provenance | code_record(code_files())


def refresh_code(checkpoint: str | Path, *, overwrite: bool = False) -> list[str]:
    """
    Give a checkpoint that an earlier version made the code of the installed one, and note it in its provenance. Weights,
    settings and tokenizer stay as they are.

    Args:
        checkpoint: folder of a DiJiang checkpoint; one without provenance.json keeps none.
        overwrite: replace code files too that are not those which provenance.json records, such as ones edited by hand.

    Returns:
        Names of the files that were replaced, added or removed; none if the code was up to date.

    Raises:
        ValueError: if this is no folder of a DiJiang checkpoint, or its code may have been edited and `overwrite` is not set.
    """
    folder = Path(checkpoint).expanduser()
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{checkpoint} is not the folder of a checkpoint: it has no config.json; download a hub id first")
    config = read_json(config_path)
    if config.get("model_type") != "dijiang":
        raise ValueError(f"{checkpoint} is a {config.get('model_type')} model, not a DiJiang checkpoint; convert it first")
    provenance = read_provenance(folder) if (folder / FILE_NAME).is_file() else None
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"{config_path} has an auto_map that is no mapping; remove it")
    state = CodeState.of(folder, provenance or {})
    if state.edited and not overwrite:
        names = ", ".join(state.edited)
        if provenance is None:
            reason = f"{checkpoint} has no {FILE_NAME}, so edits of {names} cannot be told from older code"
        else:
            reason = f"{names} in {checkpoint} {'is' if len(state.edited) == 1 else 'are'} not as recorded in {FILE_NAME}"
        raise ValueError(f"{reason}, and edits would be lost; keep a copy and use --overwrite")

    changed = state.replace()
    if auto_map | AUTO_MAP != auto_map:
        text = json.dumps(config | {"auto_map": auto_map | AUTO_MAP}, indent=2, ensure_ascii=False) + "\n"
        replace_with({config_path: text.encode()})
        changed.append(config_path.name)
    record = code_record(code_files())
    if provenance is not None and (changed or provenance | record != provenance):
        before = {key: provenance[key] for key in record if key in provenance}
        write_provenance(folder, add_stage(provenance | record, REFRESHED, files=changed, before=before))
        shutil.copymode(config_path, folder / FILE_NAME)
    return changed


def before_refreshing(provenance: dict[str, Any]) -> dict[str, Any]:
    """The record as it was before `refresh_code` was called last, any number of times: that changes no weights."""
    stages = provenance["stages"]
    while stages and stages[-1]["stage"] == REFRESHED:
        record = {key: value for key, value in provenance.items() if key not in ("code", "tested_transformers")}
        before = stages[-1]["before"]
        # keys stay in their order, so that the record has the bytes it had
        provenance = {key: before.get(key, value) for key, value in provenance.items() if key in record or key in before}
        stages = provenance["stages"] = stages[:-1]
    return provenance


@dataclass(frozen=True)
class CodeState:
    """
    The code in a checkpoint's folder beside the installed one.

    Attributes:
        newest: SHA-256 by name of the installed files; present: of those in the folder.
        edited: names of files that are neither as recorded nor as installed.
    """

    folder: Path
    newest: dict[str, str]
    present: dict[str, str]
    edited: list[str]

    @classmethod
    def of(cls, folder: Path, provenance: dict[str, Any]) -> "CodeState":
        """Raises ValueError if `provenance` lists as code what is no Python file in the folder itself."""
        recorded = provenance.get("code") or {}
        if not isinstance(recorded, dict):
            raise ValueError(f"{folder / FILE_NAME} has no record of its code; convert the source again")
        if strange := [name for name in recorded if Path(name).name != name or not name.endswith(".py")]:
            raise ValueError(
                f"{folder / FILE_NAME} lists {strange[0]!r} as code, which is no Python file in it; convert the source again"
            )
        newest = hash_files(code_files())
        paths = (folder / name for name in sorted(recorded.keys() | newest.keys()))
        present = hash_files(path for path in paths if path.is_file())
        edited = [name for name, digest in present.items() if digest not in (recorded.get(name), newest.get(name))]
        return cls(folder, newest, present, edited)

    def replace(self) -> list[str]:
        """Make the folder's code the installed one; returns the names of what changed."""
        changed = sorted(n for n in self.newest.keys() | self.present.keys() if self.present.get(n) != self.newest.get(n))
        sources = {path.name: path for path in code_files()}
        replace_with({self.folder / name: sources[name].read_bytes() for name in changed if name in sources})
        for name in set(changed) - sources.keys():
            (self.folder / name).unlink()
        return changed


def replace_with(contents: dict[Path, bytes]) -> None:
    """Write files, each whole or not at all, none before all are on disk; they may be read by those who read config.json."""
    drafts = {path: path.with_name(f".{path.name}.partial") for path in contents}
    try:
        for path, draft in drafts.items():
            draft.write_bytes(contents[path])
            model = path if path.exists() else path.with_name("config.json")
            shutil.copymode(model, draft)
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
