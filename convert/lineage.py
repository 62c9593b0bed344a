"""Whether a model is the one that a checkpoint was converted from."""

from pathlib import Path

from .provenance import hash_files, read_provenance
from .source import open_source


def refuse_other_source(provenance: dict, source: str | Path) -> None:
    """
    Raise ValueError unless `source` (hub id, folder or GGUF file) holds weights that `provenance` names as its own, or is a
    DiJiang checkpoint made from the same ones.
    """
    found = open_source(source)
    recorded = set(provenance.get("source_files", {}).values())
    if found.is_dijiang:
        theirs = set(read_provenance(found.folder).get("source_files", {}).values())
    elif found.gguf:
        theirs = set(hash_files([found.gguf]).values())
    else:
        theirs = set(hash_files([*found.folder.glob("*.safetensors"), *found.folder.glob("*.bin")]).values())
    if not recorded & theirs:
        raise ValueError(
            f"{source} is not the model that this checkpoint was converted from ({provenance.get('source', 'unknown')}): their "
            "weights differ; give that one"
        )
