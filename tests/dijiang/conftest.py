"""The command line, called in this process."""

import re
import sys

import pytest

from dijiang import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """command("align", ...) -> (exit code, stdout, stderr) of `dijiang align ...` in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dijiang", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def fails(command, tmp_path):
    """fails(message, *arguments): exit code 1, one line on stderr that matches, nothing else said, nothing written."""

    def check(message: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(*arguments)
        assert code == 1 and out == ""
        assert re.fullmatch(rf"dijiang: .*{message}.*\n", err), err
        assert sorted(tmp_path.rglob("*")) == before

    return check
