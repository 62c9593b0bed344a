"""
Sparse checkpoints as smaller files: the nonzero values of each sparse matrix, and one bit per weight that says where they
belong. The fields are those of compressed-tensors' former format `sparse-bitmask`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dijiang.checkpoint.files import copy_companions
from dijiang.checkpoint.shard_writer import ShardWriter
from dijiang.checkpoint.source import read_json
from dijiang.checkpoint.weights import FLOAT_TYPES, SafetensorsFile, weight_paths
from dijiang.common.outputs import new_folder
from dijiang.common.progress import progress_bar

from .oneshot.config import parse_pattern

KEY = "dijiang_compression"  # in config.json; no loader takes this name for a quantizer that it knows
FORMAT = "sparse-bitmask"
PARTS = ("shape", "compressed", "bitmask", "row_offsets")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress_tensor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Split a matrix (R, C) into its parts, on the CPU. All that is not +0 bit by bit counts as a value: -0 and NaN survive.

    Returns:
        shape: (2,) int64.
        compressed: (values,), row by row, in the weight's dtype.
        bitmask: (R, ceil(C / 8)) uint8; column c of a row is bit c % 8, the lowest first, of byte c // 8.
        row_offsets: (R,) int64, where each row begins in `compressed`.

    Raises:
        ValueError: if it is no matrix, or its dtype has more than 8 bytes.
    """
    if weight.dim() != 2 or weight.itemsize not in INTEGERS:
        kind = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"{kind} cannot have a bitmask; give a matrix of at most 8 bytes an element")
    bits = weight.cpu().view(INTEGERS[weight.itemsize]).numpy()
    mask = bits != 0
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": torch.from_numpy(bits[mask]).view(weight.dtype),
        "bitmask": torch.from_numpy(np.packbits(mask, axis=1, bitorder="little")),
        "row_offsets": torch.from_numpy(row_offsets(mask)),
    }


def decompress_tensor(parts: dict[str, torch.Tensor], name: str = "the weight") -> torch.Tensor:
    """
    Put a matrix (R, C) together from the parts of `compress_tensor`, on the CPU; `name` is for messages.

    Raises:
        ValueError: if a part is missing or they do not agree with one another.
    """
    if missing := [part for part in PARTS if part not in parts]:
        raise broken(name, f"{', '.join(missing)} missing")
    shape, compressed, bitmask, offsets = (parts[part].cpu() for part in PARTS)
    if shape.dtype != torch.int64 or shape.shape != (2,) or shape.min() < 0:
        raise broken(name, f"shape is {shape.dtype} {shape.tolist()}, expected two int64 sizes")
    R, C = shape.tolist()
    sizes = {"bitmask": (bitmask, torch.uint8, [R, -(-C // 8)]), "row_offsets": (offsets, torch.int64, [R])}
    for part, (tensor, dtype, size) in sizes.items():
        if tensor.dtype != dtype or list(tensor.shape) != size:
            raise broken(name, f"{part} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {size} for a matrix {[R, C]}")
    if C % 8 and (bitmask[:, -1] >> C % 8).any():
        raise broken(name, f"bitmask has bits beyond the {C} columns")
    mask = np.unpackbits(bitmask.numpy(), axis=1, count=C, bitorder="little").view(bool)
    values = np.count_nonzero(mask)
    if compressed.shape != (values,) or compressed.itemsize not in INTEGERS:
        raise broken(name, f"compressed is {compressed.dtype} {list(compressed.shape)}, but bitmask has {values} bits set")
    if (offsets.numpy() != row_offsets(mask)).any():
        raise broken(name, "row_offsets do not fit bitmask")
    integers = compressed.view(INTEGERS[compressed.itemsize]).numpy()
    bits = np.zeros((R, C), integers.dtype)
    bits[mask] = integers
    return torch.from_numpy(bits).view(compressed.dtype)


def row_offsets(mask: np.ndarray) -> np.ndarray:
    """Number of True entries in the rows above each row of (R, C): (R,) int64."""
    counts = np.count_nonzero(mask, axis=1)
    return (np.cumsum(counts) - counts).astype(np.int64)


def write_bitmask(
    model_folder: str | Path,
    output: str | Path,
    names: Iterable[str] | None = None,
    structure: str = "unstructured",
    progress: bool = True,
) -> Path:
    """
    Write a checkpoint with its sparse matrices compressed. Files of the folder without weights are copied, subfolders are not.
    One shard is in memory at a time.

    Args:
        model_folder: a checkpoint of transformers in safetensors.
        output: a folder that does not exist yet, or is empty. It appears only when it is complete.
        names: of the float matrices to compress; by default each that gets smaller, which at C columns and b bits per element
            needs a share of zeros above (1 + 64 / C) / b.
        structure: of the zeros, for the config: "unstructured", or "N:M" for N zeros in every M weights of a row.
        progress: show a progress bar on stderr.

    Returns:
        The output folder.

    Raises:
        ValueError: if the folder, a name or the output does not allow it, a matrix does not have the structure, or nothing
            would be compressed; nothing is left on disk then.
    """
    pattern = None if structure == "unstructured" else parse_pattern(structure)
    source = Path(model_folder).expanduser()
    config, files = open_checkpoint(source)
    headers = {name: header for file in files for name, header in file.headers.items()}
    if taken := [name for name in headers if split(name)[1]]:
        raise ValueError(f"{source} holds {taken[0]}, a name that a compressed weight's part would have; rename that tensor")
    fit = {name for name, header in headers.items() if header.dim() == 2 and header.dtype in FLOAT_TYPES.values()}
    wanted = fit if names is None else set(names)
    if wrong := sorted(wanted - fit):
        raise ValueError(f"{source} holds no float matrix {wrong[0]}; name 2-D tensors of {', '.join(FLOAT_TYPES)}")

    weights = zeros = 0
    with new_folder(output) as folder:
        writer = ShardWriter(folder, FORMAT)  # named unlike a model, which transformers would load, filling in noise
        with progress_bar(
            "Compressing", sum(header.nbytes for header in headers.values()), shown=progress, unit="bytes"
        ) as advance:
            for name, tensor in (pair for file in files for pair in file.tensors(file.headers)):
                parts = compress_tensor(tensor) if name in wanted else {}
                if parts and (names is not None or n_bytes(parts) < tensor.nbytes):
                    if pattern and not has_pattern(tensor, *pattern):
                        raise ValueError(f"{name} does not have {structure} zeros; name others, or no structure")
                    for part, value in parts.items():
                        writer.add(f"{name}.{part}", value)
                    weights += tensor.numel()
                    zeros += tensor.numel() - parts["compressed"].numel()
                else:
                    writer.add(name, tensor)
                advance(headers[name].nbytes)
            if not weights:
                raise ValueError(f"{source} has no matrix with enough zeros to be smaller with a bitmask; prune it first")
            writer.finish()
        config[KEY] = {"format": FORMAT, "global_sparsity": zeros / weights, "sparsity_structure": structure}
        write_companions(source, folder, config)
    return Path(output)


def read_bitmask(folder: str | Path, output: str | Path, progress: bool = True) -> Path:
    """
    Write the dense checkpoint from which `write_bitmask` made the container in `folder`, bit for bit.

    Raises:
        ValueError: if the folder is no container or damaged, or the output is occupied; nothing is left on disk then.
    """
    source = Path(folder).expanduser()
    config, files = open_container(source)
    with new_folder(output) as dense:
        writer = ShardWriter(dense)
        total = sum(path.stat().st_size for path in {file.path for file in files.values()})
        with progress_bar("Reading", total, shown=progress, unit="bytes") as advance:
            for name, file in files.items():
                weight, part = split(name)
                if part == "compressed":
                    parts = read_parts(files, weight)
                    writer.add(weight, decompress_tensor(parts, f"{weight} in {source}"))
                    advance(n_bytes(parts))
                elif not part:
                    tensor = read_tensor(file, name)
                    writer.add(name, tensor)
                    advance(tensor.nbytes)
            facts, stated = container_facts(source), config.pop(KEY).get("global_sparsity")
            if stated != facts["zeros"] / max(facts["weights"], 1):
                raise ValueError(
                    f"{facts['zeros']} of {facts['weights']} compressed weights in {source} are zero, but its config.json "
                    f"says a share of {stated}; files are missing or mixed up"
                )
            writer.finish()
        write_companions(source, dense, config)
    return Path(output)


def container_facts(folder: str | Path) -> dict:
    """
    Sum up the compressed matrices of a container: `weights`, `zeros`, `bytes_dense`, `bytes_compressed` (all four parts) and
    `bits_per_weight`, for a big matrix of C columns b * (1 - sparsity) + 1 + 64 / C at b bits per element. Tensors that are
    stored dense do not count.

    Raises:
        ValueError: if the folder is no container, or a weight lacks a part.
    """
    _, files = open_container(Path(folder).expanduser())
    facts = dict.fromkeys(("weights", "zeros", "bytes_dense", "bytes_compressed"), 0)
    for weight, part in map(split, files):
        if part == "compressed":
            parts = read_parts(files, weight)
            values = parts["compressed"]
            weights = math.prod(parts["shape"].tolist())
            facts["weights"] += weights
            facts["zeros"] += weights - values.numel()
            facts["bytes_dense"] += weights * values.itemsize
            facts["bytes_compressed"] += n_bytes(parts)
    return facts | {"bits_per_weight": 8 * facts["bytes_compressed"] / max(facts["weights"], 1)}


def read_folder_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a transformers checkpoint")
    return read_json(folder / "config.json")


def open_checkpoint(folder: Path) -> tuple[dict, list[SafetensorsFile]]:
    """Config.json of a dense checkpoint and its weight files, or ValueError."""
    config = read_folder_config(folder)
    if KEY in config:
        raise ValueError(f"{folder} is compressed already ({KEY} in its config.json); give the dense checkpoint")
    paths = weight_paths(folder, "model.safetensors")
    if not paths:
        raise ValueError(f"{folder} holds no model.safetensors; save the model again with transformers 5")
    return config, [SafetensorsFile(path) for path in paths]


def open_container(folder: Path) -> tuple[dict, dict[str, SafetensorsFile]]:
    """Config.json of a container and the file of each tensor by its name, or ValueError if it is none or lacks a part."""
    config = read_folder_config(folder)
    description = config.get(KEY)
    if not isinstance(description, dict):
        raise ValueError(f"{folder} is not compressed (no {KEY} in its config.json); give the folder of a container")
    if description.get("format") != FORMAT:
        raise ValueError(f"{folder} is compressed as {description.get('format')!r}, only {FORMAT} can be read; update dijiang")
    paths = weight_paths(folder, f"{FORMAT}.safetensors")
    if not paths:
        raise ValueError(f"{folder} holds no {FORMAT}.safetensors; copy the container again, with all of its files")
    files = {name: file for file in map(SafetensorsFile, paths) for name in file.headers}
    for weight in sorted({weight for weight, part in map(split, files) if part}):
        if missing := [part for part in PARTS if f"{weight}.{part}" not in files]:
            raise broken(f"{weight} in {folder}", f"{', '.join(missing)} missing")
        if weight in files:
            raise broken(f"{weight} in {folder}", "it is stored dense as well")
    return config, files


def split(name: str) -> tuple[str, str]:
    """Split a tensor's name into a weight's name and its part; into the whole name and "" if it is no part."""
    weight, dot, part = name.rpartition(".")
    return (weight, part) if dot and part in PARTS else (name, "")


def read_tensor(file: SafetensorsFile, name: str) -> torch.Tensor:
    [(_, tensor)] = file.tensors([name])
    return tensor


def read_parts(files: dict[str, SafetensorsFile], weight: str) -> dict[str, torch.Tensor]:
    return {part: read_tensor(files[f"{weight}.{part}"], f"{weight}.{part}") for part in PARTS}


def n_bytes(parts: dict[str, torch.Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


def has_pattern(weight: torch.Tensor, zeros: int, group: int) -> bool:
    """Whether every `group` consecutive weights of a row have at least this many zeros."""
    if weight.shape[1] % group:
        return False
    return bool(((weight == 0).view(weight.numel() // group, group).sum(1) >= zeros).all())


def write_companions(source: Path, folder: Path, config: dict) -> None:
    """Copy the files that hold no weights, with `config` in place of the source's."""
    copy_companions(source, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def broken(name: str, problem: str) -> ValueError:
    return ValueError(f"the bitmask parts of {name} are damaged ({problem}); compress the dense checkpoint again")
