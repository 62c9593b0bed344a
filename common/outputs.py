"""Output folders that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """
    Yield a temporary folder beside `output` that takes its name when the block ends well, and that is removed, with any
    parents made for it, when the block raises anything (KeyboardInterrupt included).

    Raises:
        ValueError: if `output` is a file or a folder that is not empty, or its parent cannot be made or written.
    """
    if not str(output):
        raise ValueError("the output must be a new folder; name one")
    output = Path(os.path.realpath(Path(output).expanduser()))
    refuse_occupied(output)
    made = []
    temporary = output.parent / f".{output.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            for parent in reversed(output.parents):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
            temporary.mkdir()
        except OSError as error:
            raise ValueError(f"cannot write to {output.parent} ({error.strerror}); choose another output folder") from None
        yield temporary
        share_alike(temporary)
        refuse_occupied(output)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made):
            try:
                parent.rmdir()
            except OSError:  # someone else uses it by now
                break
        raise


def share_alike(folder: Path) -> None:
    """Let those read files in `folder` who may read the folder; safetensors keeps its files to their owner."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | folder.stat().st_mode & 0o666)


def refuse_occupied(output: Path) -> None:
    """Raise ValueError unless `output` is free: absent or an empty folder, not the current one."""
    if output.resolve() == Path.cwd():
        raise ValueError("the output must be a new folder, not the current one; name one")
    if output.is_symlink() and not output.exists():
        raise ValueError(f"output {output} is a link to nothing; choose a new folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; choose a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output folder {output} is not empty; choose a new one or empty it")


def refuse_taken_file(path: Path) -> None:
    """Raise ValueError unless `path` is free for a file, in a folder that exists."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"output {path} exists already; choose a new file or remove it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; make it or choose another output")


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """
    Let `write` fill a temporary file that takes the name `path` once it is complete.

    Args:
        path: the file to appear or to be replaced, in a folder that exists.
        write: called with the path of the temporary file, which is hidden and ends in `.partial`.
        durable: have the operating system put the content on disk before the name appears.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(draft)
        if durable:
            with draft.open("rb") as file:
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to a file that appears, or is replaced, whole or not at all."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))
