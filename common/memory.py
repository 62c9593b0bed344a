"""Memory of this machine, of a GPU and of this process."""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Self

import torch

RESET_PEAK = Path("/proc/self/clear_refs")  # of Linux


def total_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that can be had without swapping; on a GPU, including what torch has reserved but does not use."""
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = Path("/proc/meminfo")
    return linux_bytes(info, "MemAvailable") if info.is_file() else total_bytes()


def linux_bytes(file: Path, field: str) -> int:
    """The entry `field` of a file of /proc that counts in kB."""
    words = file.read_text(encoding="utf-8").split()
    return int(words[words.index(f"{field}:") + 1]) * 1024


def peak_bytes() -> int:
    """The largest resident memory of this process so far; 0 on Windows, where the standard library cannot tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim() -> None:
    """Collect garbage, and return to the system what glibc, where it is the C library, holds without using it."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


class PeakMemory:
    """
    Context manager whose `bytes` are, after the block, the largest resident memory above that at entry, or on a GPU the
    largest memory of torch's tensors above that at entry. On Linux it resets the peak of the process.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.gpu = torch.device(device) if torch.device(device).type == "cuda" else None
        self.linux = RESET_PEAK.exists()
        self.bytes = 0

    def __enter__(self) -> Self:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.gpu)
            self.before = torch.cuda.memory_allocated(self.gpu)
            return self
        if self.linux:  # an earlier peak may belong to the imports
            RESET_PEAK.write_text("5", encoding="ascii")
        self.before = self.resident_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        peak = torch.cuda.max_memory_allocated(self.gpu) if self.gpu else self.resident_bytes("VmHWM")
        self.bytes = peak - self.before

    def resident_bytes(self, field: str) -> int:
        return linux_bytes(Path("/proc/self/status"), field) if self.linux else peak_bytes()
