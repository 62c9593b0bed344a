"""Devices and dtypes by the names that users give."""

import time
from functools import cache

import torch

from .errors import unknown

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCT_SIZES = (128, 256, 512, 1024)
FAR_BEHIND = 4  # times slower
PRODUCT_REPEATS = 5


def device_named(name: str) -> torch.device:
    """
    The device of this name; `auto` is the GPU where there is one.

    Raises:
        ValueError: if the name is unknown, or this machine has no such device.
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU; choose cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_named(name: str | torch.dtype) -> torch.dtype | None:
    """
    The float type of this name; None for `auto`.

    Raises:
        ValueError: if the name is unknown.
    """
    name = str(name).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise unknown("dtype", name, ("auto", *DTYPES))
    return DTYPES.get(name)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as users write it: `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of these names; `auto` is the GPU where there is one, and the dtype it computes fastest in."""
    chosen = device_named(device)
    return chosen, dtype_named(dtype) or fastest_dtype(chosen)


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """
    bfloat16 where this device multiplies matrices faster in it than in float32 (GPUs since Ampere, CPUs with AMX or
    AVX512-BF16), else float32; decided by a measurement of some milliseconds, once in a process.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return faster_in_products(device)


@cache
def faster_in_products(device: torch.device) -> torch.dtype:
    """
    The dtype of the faster products, float32 or bfloat16. Their sizes double until one dtype is far behind, since processors
    without products in bfloat16 take seconds for one of the last size.
    """
    dtypes = torch.float32, torch.bfloat16
    for size in PRODUCT_SIZES:
        seconds = [seconds_per_product(device, dtype, size) for dtype in dtypes]
        if max(seconds) > FAR_BEHIND * min(seconds):
            break
    return dtypes[seconds.index(min(seconds))]


def seconds_per_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Best time of a few products of two matrices of size x size."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(PRODUCT_REPEATS):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
