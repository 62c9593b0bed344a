"""The model's code beside its weights, so that a checkpoint loads where `dijiang` is not installed."""

import json
import shutil
from pathlib import Path

import dijiang.modeling
from dijiang.modeling.configuration_dijiang import AUTO_MAP
from dijiang.modeling.transformers_compat import TESTED_TRANSFORMERS

from .provenance import FILE_NAME, add_stage, hash_files, read_provenance, write_provenance
from .source import read_json


def code_files() -> list[Path]:
    """The files that every checkpoint carries, where they lie in the installed package."""
    room = Path(dijiang.modeling.__file__).parent
    return sorted(path for path in room.glob("*.py") if path.name != "__init__.py")


def copy_code(folder: Path) -> list[Path]:
    """Put the model's code into `folder`; returns the new files."""
    return [Path(shutil.copyfile(path, folder / path.name)) for path in code_files()]


def code_record(files: list[Path]) -> dict:
    """What provenance says of a checkpoint's code: SHA-256 by file name, and the transformers versions it was tested with."""
    return {"code": hash_files(files), "tested_transformers": list(TESTED_TRANSFORMERS)}


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
        ValueError: if this is no folder of a DiJiang checkpoint, or its code was edited and `overwrite` is not set.
    """
    folder = Path(checkpoint).expanduser()
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{checkpoint} is not the folder of a checkpoint: it has no config.json; download a hub id first")
    config = read_json(config_path)
    if config.get("model_type") != "dijiang":
        raise ValueError(f"{checkpoint} is a {config.get('model_type')} model, not a DiJiang checkpoint; convert it first")
    provenance = read_provenance(folder) if (folder / FILE_NAME).is_file() else None
    recorded = {} if provenance is None else provenance.get("code", {})
    if strange := [name for name in recorded if Path(name).name != name or not name.endswith(".py")]:
        raise ValueError(f"{folder / FILE_NAME} lists {strange[0]!r} as code, which is no Python file beside it; convert anew")
    sources = code_files()
    newest = hash_files(sources)
    names = recorded.keys() | newest.keys()
    present = hash_files(path for path in (folder / name for name in sorted(names)) if path.is_file())
    edited = [name for name, digest in present.items() if digest not in (recorded.get(name), newest.get(name))]
    if edited and not overwrite:
        raise ValueError(
            f"{', '.join(edited)} in {checkpoint} {'is' if len(edited) == 1 else 'are'} not as recorded in {FILE_NAME}, so "
            "edits would be lost; keep a copy and use --overwrite"
        )

    changed = [name for name in sorted(names) if present.get(name) != newest.get(name)]
    for source in sources:  # the same files again after an interruption: what is new already is no edit
        if source.name in changed:
            draft = folder / f".{source.name}.partial"
            shutil.copyfile(source, draft)
            draft.replace(folder / source.name)
    for name in set(changed) - newest.keys():
        (folder / name).unlink()
    auto_map = config.get("auto_map", {}) | AUTO_MAP
    if config.get("auto_map") != auto_map:
        draft = config_path.with_suffix(".partial")
        draft.write_text(json.dumps(config | {"auto_map": auto_map}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(config_path)
        changed.append(config_path.name)
    record = code_record(sources)
    if provenance is not None and (changed or provenance | record != provenance):
        write_provenance(folder, add_stage(provenance | record, "refresh-code", files=changed))
    return changed
