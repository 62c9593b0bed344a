"""Writes a checkpoint with pruned matrices in place of the dense ones, and counts the zeros on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dijiang.checkpoint.code_files import with_newest_code
from dijiang.checkpoint.files import copy_companions
from dijiang.checkpoint.provenance import FILE_NAME, add_stage, read_provenance, write_provenance
from dijiang.checkpoint.shard_writer import ShardWriter
from dijiang.checkpoint.source import Source
from dijiang.checkpoint.weights import SafetensorsFile

from .streamed_decoder import StreamedDecoder

STALE = ("README.md", "evaluation.json", "latency.json", "pruning_plan.png")  # these describe the dense model


def write_sparse_checkpoint(
    folder: Path,
    source: Source,
    tokenizer: Any,
    decoder: StreamedDecoder,
    pruned: dict[str, SafetensorsFile],
    record: dict,
    *,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """
    Write the source's weights, in the same shards, and its other files.

    Args:
        folder: to write to.
        source: the dense model.
        tokenizer: of the model.
        decoder: of the source; knows the model's name of each stored tensor.
        pruned: file that holds the pruned weight, by its name in the model.
        record: of this pruning, for the provenance of a DiJiang checkpoint.
        advance: is called with the number of bytes written.
    """
    if source.gguf:
        tokenizer.save_pretrained(folder)
        source.config.architectures = [type(decoder.model).__name__]
        source.config.dtype = torch.float32
        source.config.save_pretrained(folder)
        decoder.files[0].generation_config.save_pretrained(folder)
    else:
        copy_companions(source.folder, folder, leave_out=STALE)
        if (source.folder / FILE_NAME).is_file():
            provenance = with_newest_code(folder, read_provenance(source.folder))
            write_provenance(folder, add_stage(provenance, "prune", **record))
    names = {(file, stored): name for name, (file, stored) in decoder.dense_places.items()}
    writer = ShardWriter(folder)
    for file in decoder.files:
        # other formats may hold a tied tensor in memory under both its names, of which one is enough
        wanted = [name for name in file.headers if (file, name) in names or isinstance(file, SafetensorsFile)]
        for stored, tensor in file.tensors(wanted):
            name = names.get((file, stored))
            if name in pruned:
                [(_, tensor)] = pruned[name].tensors([name])
            writer.add(stored, tensor)
            advance(tensor.nbytes)
        writer.cut()
    writer.finish()


def zeros_on_disk(folder: Path, names: set[str]) -> dict[str, int]:
    """Count the exact zeros of each tensor of these names in a folder's safetensors files."""
    zeros = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        for name, tensor in file.tensors([name for name in file.headers if name in names]):
            zeros[name] = tensor.numel() - int(torch.count_nonzero(tensor))
    return zeros
