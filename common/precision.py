"""Which float type a machine computes fastest in."""

import time

import torch

SIZE = 1024
REPEATS = 5


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """
    bfloat16 where this device multiplies matrices faster in it than in float32 (GPUs since Ampere, CPUs with AMX or
    AVX512-BF16), else float32; found by a measurement of some milliseconds.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return min((torch.float32, torch.bfloat16), key=lambda dtype: seconds_per_product(device, dtype))


def seconds_per_product(device: torch.device, dtype: torch.dtype) -> float:
    """Best of a few products of square matrices."""
    a = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)
