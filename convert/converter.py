"""Converts a pretrained softmax checkpoint into a DiJiang checkpoint on disk, shard by shard."""

import shutil
from pathlib import Path
from typing import Any

import torch

from dijiang.checkpoint.code_files import code_record, copy_code
from dijiang.checkpoint.provenance import add_stage, hash_files, public_name, versions, write_provenance
from dijiang.checkpoint.shard_writer import ShardWriter
from dijiang.checkpoint.source import Source, load_tokenizer
from dijiang.checkpoint.weights import DequantizedFile, SafetensorsFile, WeightFile, open_weights
from dijiang.common.device import dtype_named
from dijiang.common.errors import unknown
from dijiang.common.outputs import new_folder
from dijiang.common.progress import progress_bar

from .families import dijiang_config, open_convertible
from .layer_settings import check_effect, check_keys
from .mapping import MappedWeights, build_on_meta, check_shapes, fill_new_modules
from .presets import PRESETS

# files of a source, next to the weights, that decide what its model answers
HASHED = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def convert_model(
    source: str | Path,
    output: str | Path,
    preset: str = "recommended",
    *,
    dtype: str = "auto",
    progress: bool = True,
    **config_overrides: Any,
) -> Path:
    """
    Convert `source` into a DiJiang checkpoint: its weights, linear layers with initial added parameters, tokenizer, the
    model's code and `provenance.json`. One shard is in memory at a time (a GGUF file: all of it).

    Args:
        source: a hub id, a folder or a GGUF file, of a family in `FAMILIES`.
        output: a folder that does not exist yet, or is empty. It appears only when it is complete.
        preset: a key of `PRESETS`.
        dtype: of the source's weights in the output: `float32`, `bfloat16`, `float16` or `auto`, as stored. New parameters
            are always float32.
        progress: show a progress bar on stderr.
        config_overrides: settings on top of the preset, see `OVERRIDABLE`; `layer_types` may be one name for all layers.

    Returns:
        The output folder.

    Raises:
        ValueError: if the source, the settings or the output folder do not allow it; nothing is left on disk then.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    check_keys(config_overrides)
    target_dtype = dtype_named(dtype)
    with new_folder(output) as folder:
        opened = open_convertible(source)
        if opened.is_dijiang:
            raise ValueError(f"{source} is a DiJiang checkpoint already; convert the softmax model it was made from")
        load_tokenizer(opened).save_pretrained(folder)
        config = dijiang_config(opened.config, {"layer_types": "linear_attention"} | PRESETS[preset] | config_overrides)
        check_effect(config_overrides, config)
        model = build_on_meta(config)
        files = open_weights(opened, progress=progress)
        weights = MappedWeights(opened, files, model)
        config.dtype = target_dtype or weights.stored_dtype

        write_weights(folder, weights, target_dtype, fill_new_modules(model), progress=progress)
        config.save_pretrained(folder)
        copy_generation_config(opened, files, folder)
        code = copy_code(folder)
        record = {
            "source": public_name(source),
            **({"commit": opened.commit} if opened.commit else {}),
            "source_files": hash_source(opened, files, progress),
            "versions": versions(),
            "preset": preset,
            "overrides": config_overrides,
            "seed": config.feature_seed,
            **code_record(code),
            "stages": [],
        }
        write_provenance(folder, add_stage(record, "convert", preset=preset, overrides=config_overrides, dtype=dtype))
    return Path(output)


def write_weights(
    folder: Path,
    weights: MappedWeights,
    dtype: torch.dtype | None,
    new_parameters: dict[str, torch.Tensor],
    *,
    progress: bool,
) -> None:
    """Write the source's shards one by one, the added parameters into the last, and check the written files."""
    writer = ShardWriter(folder)
    current = None
    with progress_bar("Converting", weights.n_bytes, shown=progress, unit="bytes") as advance:
        for file, name, tensor in weights.stream(dtype):
            if current not in (None, file):
                writer.cut()
            current = file
            writer.add(name, tensor)
            advance(weights.headers[name].nbytes)
        for name, tensor in new_parameters.items():
            writer.add(name, tensor)
        written: dict[str, tuple[int, ...]] = {}
        for path in writer.finish():
            written |= {name: tuple(header.shape) for name, header in SafetensorsFile(path).headers.items()}
    expected = weights.expected | {name: tuple(tensor.shape) for name, tensor in new_parameters.items()}
    check_shapes(written, expected, str(folder))


def copy_generation_config(source: Source, files: list[WeightFile], folder: Path) -> None:
    path = source.folder / "generation_config.json"
    if isinstance(files[0], DequantizedFile):
        files[0].generation_config.save_pretrained(folder)
    elif path.is_file():
        shutil.copyfile(path, folder / path.name)


def hash_source(source: Source, files: list[WeightFile], progress: bool) -> dict[str, str]:
    """SHA-256 of the files that the conversion read, by name."""
    paths = {file.path for file in files}
    if not source.gguf:
        paths |= {path for pattern in HASHED for path in source.folder.glob(pattern) if path.is_file()}
    n_bytes = sum(path.stat().st_size for path in paths)
    with progress_bar("Hashing the source", n_bytes, shown=progress, unit="bytes") as advance:
        return hash_files(sorted(paths), advance)
