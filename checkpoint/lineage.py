"""Whether a teacher belongs to a checkpoint: by the hashes of its weights, and by its shape."""

from pathlib import Path
from typing import Any

from dijiang.modeling import DiJiangForCausalLM

from .files import SOURCE_WEIGHT_SUFFIXES
from .provenance import hash_files, read_provenance
from .source import open_source

SAME_IN_TEACHER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def refuse_other_source(provenance: dict[str, Any], source: str | Path) -> None:
    """
    Raise ValueError unless `source` (hub id, folder or GGUF file) holds weights that `provenance` names as its own, or is a
    DiJiang checkpoint made from the same ones.
    """
    model = open_source(source)
    if model.is_dijiang:
        hashes = weight_hashes(read_provenance(model.folder))
    else:
        files = (
            [model.gguf] if model.gguf else [path for path in model.folder.iterdir() if path.suffix in SOURCE_WEIGHT_SUFFIXES]
        )
        hashes = set(hash_files(files).values())
    recorded = weight_hashes(provenance)
    if not recorded or not recorded <= hashes:
        raise ValueError(
            f"{source} is not the model that this checkpoint was converted from ({provenance.get('source', 'unknown')}): "
            "their weights differ; give that one"
        )


def weight_hashes(provenance: dict[str, Any]) -> set[str]:
    """The recorded hashes of the source's weight files; sister models may share all other files."""
    recorded = provenance.get("source_files", {})
    return {digest for name, digest in recorded.items() if Path(name).suffix in SOURCE_WEIGHT_SUFFIXES}


def refuse_misfit(student: DiJiangForCausalLM, teacher_model: DiJiangForCausalLM, teacher: str | Path) -> None:
    """Raise ValueError unless `teacher_model` is a softmax model of the student's shape."""
    if teacher_model.config.has_linear_layers:
        raise ValueError(f"teacher {teacher} has linear-attention layers; give the softmax model that was converted")
    for key in SAME_IN_TEACHER:
        ours, theirs = getattr(student.config, key), getattr(teacher_model.config, key)
        if ours != theirs:
            raise ValueError(f"teacher {teacher} does not fit the checkpoint: {key} is {theirs}, expected {ours}")
