"""Errors that a user can cause: one line that says what was found, what was expected and what to do."""

import difflib
import sys
from collections.abc import Collection, Iterable

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # what a shell reports after Ctrl-C


class AlreadyReported(SystemExit):
    """Exit code whose message has already been printed."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The message of an exception, or a text, with its white space folded and cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def print_line(message: BaseException | str) -> None:
    """Print an error or a notice on stderr, as one line that begins with the program's name."""
    print(f"dijiang: {one_line(message, limit=2000)}", file=sys.stderr, flush=True)


def unknown(what: str, value: object, choices: Iterable[str]) -> ValueError:
    """The error to raise on a value that is none of `choices`; it names the nearest one."""
    names = list(choices)
    return ValueError(f"{what} {value!r} is unknown{did_you_mean(str(value), names)}; choose from {', '.join(names)}")


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """` (did you mean PREFIX+NEAREST?)` with the known name that is spelled most like `name`, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{nearest[0]}?)" if nearest else ""
