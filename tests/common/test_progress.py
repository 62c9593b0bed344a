"""Progress of a token budget: a bar on a terminal, plain lines elsewhere, nothing if nobody asked."""

import re

import pytest

from dijiang.common import progress
from dijiang.common.progress import TokenProgress


class Clock:
    """Stands in for the module `time`: five seconds pass between any two looks."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 5.0
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())


def run(total: int, step: int, **settings) -> None:
    with TokenProgress("Aligning", total, **settings) as bar:
        for done in range(step, total + 1, step):
            bar.advance(step, loss=1.0 / done)


def test_lines_where_there_is_no_terminal(clock, capsys):
    run(8_000, 1_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [  # after 20 s, then at the end
        "Aligning: 4,000/8,000 tokens, 200 tokens/s, loss 0.0003, 20 s left",
        "Aligning: 8,000/8,000 tokens, 200 tokens/s, loss 0.0001, 0 s left",
    ]


def test_long_lines_are_not_broken(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run(3_000_000_000_000, 1_000_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "Aligning: 3,000,000,000,000/3,000,000,000,000 tokens, 200,000,000,000 tokens/s, loss 0.0000, 0 s left"
    ]


def test_silence(clock, capsys):
    run(8_000, 1_000, shown=False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    run(2_048, 1_024)
    out, err = capsys.readouterr()
    assert out == ""
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).splitlines()[-1]
    assert re.search(r"Aligning .*2,048/2,048 tokens +[\d,]+ tokens/s +loss 0\.0005 +0:00:00", shown)


def test_an_exception_passes_through_and_ends_the_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(KeyError), TokenProgress("Aligning", 10) as bar:
        raise KeyError
    assert bar.bar.finished is False and not bar.bar.live.is_started
