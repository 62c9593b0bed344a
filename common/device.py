"""Where models are run and in what dtype, by the names a user gives."""

import torch

from dijiang.convert.mapping import dtype_named

from .precision import fastest_dtype


def device_named(device: str) -> torch.device:
    """
    The device of this name; `auto` is the GPU where there is one.

    Raises:
        ValueError: if there is none such.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU; choose cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of these names; `auto` is the GPU where there is one, and what it computes fastest in."""
    found = device_named(device)
    return found, dtype_named(dtype) or fastest_dtype(found)
