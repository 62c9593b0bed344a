"""Read the commands and snippets of a Markdown page, and run them as written."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

from dijiang import cli

ROOT = Path(__file__).parents[3]
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language, with or without a title."""
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def titled_blocks(page: str) -> dict[str, str]:
    """Fenced blocks that are files, by their title."""
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', page, flags=re.DOTALL | re.MULTILINE))


def shell_lines(page: str) -> list[list[str]]:
    """Every line of the bash blocks as words, without comments; a backslash at its end joins it with the next."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def run(command: list[str], folder: Path) -> str:
    """stdout of a command that must succeed, offline, in `folder`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-2000:]}"
    return done.stdout


def exit_code(words: list[str], monkeypatch) -> int | str | None:
    """The exit code of `dijiang ...`, run in this process and offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["dijiang", *words])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def run_without_package(snippet: str, folder: Path) -> str:
    """stdout of a snippet in a process where `dijiang` cannot be imported."""
    (folder / "use.py").write_text("import sys\nsys.modules['dijiang'] = None\n" + snippet, encoding="utf-8")
    return run([sys.executable, "use.py"], folder)


def write_text(path: Path, seed: int) -> None:
    """5,000 random words, some 9,000 tokens of the tests' tokenizer."""
    words = random.Random(seed).choices("the cat sat on mat and rat".split(), k=5000)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(words), encoding="utf-8")
