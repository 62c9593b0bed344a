"""
C code that is compiled at its first use with the user's C compiler (`CC`, else cc, gcc or clang), kept on disk and called
through ctypes. Without a compiler, or with DIJIANG_NATIVE=0, torch gives the same results.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FLAGS = ["-O3", "-fno-math-errno", "-fPIC", "-shared", "-x", "c"]
# flags that let a compiler use vectors for sums. Not -ffast-math: a library linked with it changes how the whole process
# rounds tiny numbers
REORDERED_SUMS = ["-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]

WITHOUT_OPENMP = 2  # what dijiang_run returns where the compiler has no OpenMP


def load_library(source: str, reordered_sums: bool = False) -> tuple[ctypes.CDLL | None, str]:
    """The library of a C source, built once per machine and kept in the user's cache; or None, and the reason in one line."""
    if os.environ.get("DIJIANG_NATIVE") == "0":
        return None, "DIJIANG_NATIVE=0 turns native code off"
    return find_or_build(source, reordered_sums)


@functools.cache
def find_or_build(source: str, reordered_sums: bool) -> tuple[ctypes.CDLL | None, str]:
    """`load_library` without the environment variable, once per process."""
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
    """The command of the C compiler: `CC`, which may hold options, else the first of the usual names that exists."""
    for command in [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def cache_folders() -> Iterator[Path]:
    """Folders for libraries, best first: one that only the user writes to, then a new temporary one."""
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang"
    yield Path(tempfile.mkdtemp(prefix="dijiang-"))


def describe_processor() -> str:
    """The processor that `-march=native` builds for; machines that share a home directory may differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    except OSError:
        facts = {platform.processor()}
    return "\n".join([platform.system(), platform.machine(), *sorted(facts)])


def build(source: str, compiler: list[str], flags: list[str], folder: Path) -> ctypes.CDLL:
    """
    The library from `folder`, compiled if it is not there.

    Raises:
        OSError: if the folder cannot be used, or the compiler has gone.
        RuntimeError: if the code does not compile.
    """
    binary = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    identity = [source, *compiler, *flags, str(binary), str(binary.stat().st_mtime_ns), describe_processor()]
    library = folder / f"{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:24]}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / "native.so"
            for tuned in (["-march=native", "-fopenmp"], ["-march=native"], []):
                command = [*compiler, *tuned, *flags, "-", "-o", str(built), "-lm"]
                result = subprocess.run(command, input=source, capture_output=True, text=True, errors="replace", timeout=300)
                if result.returncode == 0:
                    break
            else:
                lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
                raise RuntimeError(f"{shlex.join(compiler)} cannot compile native code: {lines[0][:200]}")
            os.replace(built, library)  # in one step, so that two processes may do this at once
    return ctypes.CDLL(str(library))


@functools.cache
def helpers(count: int) -> ThreadPoolExecutor:
    """`count` threads besides the caller's."""
    return ThreadPoolExecutor(count, thread_name_prefix="dijiang")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=helpers.cache_clear)


def run_on_threads(library: ctypes.CDLL, call: Any, threads: int) -> None:
    """
    Run a kernel of native_vectors_source.py on all tasks of `call`, a structure.

    Raises:
        MemoryError: if it could not get its scratch memory.
    """
    pointer = ctypes.pointer(call)
    failed = library.dijiang_run(pointer, threads)
    if failed == WITHOUT_OPENMP:
        futures = [helpers(threads - 1).submit(library.dijiang_work, pointer) for _ in range(threads - 1)]
        failed = any([library.dijiang_work(pointer), *(future.result() for future in futures)])
    if failed:
        raise MemoryError("the native kernel could not get its scratch memory")
