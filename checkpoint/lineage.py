"""Whether a model is the one that a checkpoint was converted from."""

from pathlib import Path

from .provenance import hash_files, read_provenance
from .source import open_source

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def refuse_other_source(provenance: dict, source: str | Path) -> None:
    """
    Raise ValueError unless `source` (hub id, folder or GGUF file) holds weights that `provenance` names as its own, or is a
    DiJiang checkpoint made from the same ones.
    """
    found = open_source(source)
    if found.is_dijiang:
        theirs = weight_hashes(read_provenance(found.folder))
    else:
        files = [found.gguf] if found.gguf else [path for path in found.folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
        theirs = set(hash_files(files).values())
    recorded = weight_hashes(provenance)
    if not recorded or not recorded <= theirs:
        raise ValueError(
            f"{source} is not the model that this checkpoint was converted from ({provenance.get('source', 'unknown')}): "
            "their weights differ; give that one"
        )


def weight_hashes(provenance: dict) -> set[str]:
    """The recorded hashes of the source's weight files; sister models may share all other files."""
    recorded = provenance.get("source_files", {})
    return {digest for name, digest in recorded.items() if Path(name).suffix in WEIGHT_SUFFIXES}
