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

FLAGS = ["-O3", "-fno-math-errno", "-fPIC", "-shared", "-x", "c"]
# what lets a compiler use vectors for sums. Not -ffast-math: a library linked with it changes how the whole process rounds
# tiny numbers
REORDERED_SUMS = ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


def load_library(source: str, reordered_sums: bool = False) -> tuple[ctypes.CDLL | None, str]:
    """The library made of a C source, or None and why not in one line. Made once per machine, kept in the user's cache."""
    if os.environ.get("DIJIANG_NATIVE") == "0":
        return None, "DIJIANG_NATIVE=0 turns native code off"
    return find_or_build(source, reordered_sums)


@functools.cache
def find_or_build(source: str, reordered_sums: bool) -> tuple[ctypes.CDLL | None, str]:
    try:
        compiler = find_compiler()
    except ValueError as error:
        return None, f"CC={os.environ['CC']!r} is not a command: {error}"
    if compiler is None:
        return None, "no C compiler found (CC, cc, gcc, clang)"
    reason = "no folder to keep native code in"
    for folder in cache_folders():
        try:
            return build(source, compiler, FLAGS + REORDERED_SUMS * reordered_sums, folder), ""
        except (RuntimeError, subprocess.SubprocessError) as error:
            return None, " ".join(str(error).split())
        except OSError as error:  # not writable, full, or mounted without the right to run what is in it
            reason = f"native code cannot be kept or loaded: {error}"
    return None, reason


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `CC`, which may hold options, else the first of the usual names."""
    for command in [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def cache_folders():
    """Where libraries may be kept, best first: a place only the user writes to, or a new temporary folder."""
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang"
    except RuntimeError:  # no home
        pass
    yield Path(tempfile.mkdtemp(prefix="dijiang-"))


def describe_processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    except OSError:
        found = {platform.processor()}
    return "\n".join([platform.system(), platform.machine(), *sorted(found)])


def build(source: str, compiler: list[str], flags: list[str], folder: Path) -> ctypes.CDLL:
    """The library from `folder`, put there if need be. OSError where the folder, RuntimeError where the code fails."""
    binary = Path(shutil.which(compiler[0])).resolve()
    identity = [source, *compiler, *flags, str(binary), str(binary.stat().st_mtime_ns), describe_processor()]
    library = folder / f"{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "native.so"
            for tuned in (["-march=native", "-fopenmp"], ["-march=native"], []):
                command = [*compiler, *tuned, *flags, "-", "-o", str(made), "-lm"]
                result = subprocess.run(command, input=source, capture_output=True, text=True, errors="replace", timeout=300)
                if result.returncode == 0:
                    break
            else:
                lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
                raise RuntimeError(f"{shlex.join(compiler)} cannot compile native code: {lines[0][:200]}")
            os.replace(made, library)  # in one step, so that two processes may do this at once
    return ctypes.CDLL(str(library))
