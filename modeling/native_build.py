"""
C code that is compiled on the user's machine at its first use, with the C compiler found there, and called through ctypes.
Whoever has no compiler, or sets DIJIANG_NATIVE=0, gets the same results from torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# -ffast-math: sums may be reordered, which is what lets a compiler use vectors for them; the code makes no infinities or NaNs
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-shared"]


@functools.cache
def load_library(source: str) -> tuple[ctypes.CDLL | None, str]:
    """The library made of a C source, or None and why not in one line. Made once per machine, kept in the user's cache."""
    if os.environ.get("DIJIANG_NATIVE") == "0":
        return None, "DIJIANG_NATIVE=0"
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    )
    if not compiler:
        return None, "no C compiler (cc, gcc or clang) was found"
    key = hashlib.sha256("\0".join((source, *compiler, *FLAGS, processor())).encode()).hexdigest()[:24]
    try:
        return ctypes.CDLL(str(compiled(source, compiler, cache_folder(), f"{key}.so"))), ""
    except subprocess.SubprocessError as error:
        output = (error.stderr or "").strip().splitlines() or [str(error)]
        return None, f"{compiler[0]} cannot compile the kernel: {output[0]}"
    except OSError as error:
        return None, f"the compiled kernel cannot be used: {error}"


def compiled(source: str, compiler: list[str], folder: Path, name: str) -> Path:
    """The library's file, made if it is not there; complete or not at all, whoever else makes it at the same time."""
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, made = Path(scratch) / "kernel.c", Path(scratch) / name
            code.write_text(source, encoding="utf-8")
            command = [*compiler, *FLAGS, "-o", str(made), str(code), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(made, library)
    return library


@functools.cache
def cache_folder() -> Path:
    """The user's own cache folder, or where that cannot be written a private one for this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dijiang-"))


def processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.mac_ver()[0]}"
