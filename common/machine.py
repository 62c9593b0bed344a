"""Origin of a result: the machine, and the command that was run."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from .memory import total_bytes


def machine() -> dict[str, Any]:
    """Processor, GPU, memory and threads of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_bytes(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    return facts


def command_line(*program: str) -> str:
    """The command line of this process with `program` in place of its first word; absolute paths lose their folders."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}")
    return shlex.join([*program, *words])


def own_command() -> str | None:
    """The `dijiang ...` command that this process runs; None where another program called us."""
    return command_line("dijiang") if Path(sys.argv[0]).name in ("dijiang", "dijiang.exe", "__main__.py") else None
