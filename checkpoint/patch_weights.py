"""Copies a checkpoint with some of its tensors replaced."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import copy_companions


def copy_with_parameters(checkpoint: str | Path, folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """
    Copy every file of `checkpoint` but its model card into `folder`, with `parameters` in place of the stored tensors of the
    same names. All other tensors keep their bits, whatever dtype the model was loaded in; one shard is in memory at a time.

    Raises:
        ValueError: if a parameter is not finite or the checkpoint has no tensor of its name.
    """
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite after training; lower learning_rate")
    remaining = {name: value.detach().cpu() for name, value in parameters.items()}
    checkpoint = Path(checkpoint)
    copy_companions(checkpoint, folder, leave_out=["README.md"])  # a model card would no longer be true
    for path in checkpoint.glob("*.index.json"):
        shutil.copyfile(path, folder / path.name)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {}
            for name in file.keys():  # noqa: SIM118 - it is no dict
                tensors[name] = stored = file.get_tensor(name)
                if name in remaining:
                    tensors[name] = remaining.pop(name).to(stored.dtype).contiguous()
                    if not torch.isfinite(tensors[name]).all():
                        raise ValueError(f"{name} does not fit {stored.dtype}; set convert.dtype=float32")
        save_file(tensors, folder / path.name, metadata=metadata)
    if remaining:
        raise ValueError(f"{checkpoint} has no tensor {min(remaining)}; convert the source again")
