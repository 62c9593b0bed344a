"""A recipe as a command: exit codes, and one line on stderr."""

import pytest

from dijiang.train import launch
from dijiang.train.stages import run


@pytest.fixture
def outcome(monkeypatch, capsys):
    """outcome(function) -> exit code and stderr of a run whose only stage is `function`."""

    def call(function):
        monkeypatch.setattr(run, "run_stage", lambda recipe, stage: function())
        code = launch.run_recipe("smollm2-135m", ["align.tokens=20000"], "align")
        return code, capsys.readouterr().err

    return call


def raise_(error: BaseException):
    def function():
        raise error

    return function


def test_exit_codes_and_messages(outcome):
    assert outcome(lambda: "runs/align/model") == (0, "dijiang: wrote runs/align/model\n")
    assert outcome(raise_(ValueError("the text\nis short"))) == (1, "dijiang: the text is short\n")
    assert outcome(raise_(OSError(28, "No space left"))) == (1, "dijiang: [Errno 28] No space left\n")
    stopped = "align was stopped after step 3 of 9; run the same command again to continue"
    assert outcome(raise_(KeyboardInterrupt(stopped))) == (130, f"dijiang: {stopped}\n")
    assert outcome(raise_(KeyboardInterrupt())) == (130, "dijiang: interrupted; run the same command again to continue\n")


def test_errors_of_ours_are_not_hidden(outcome):
    with pytest.raises(KeyError):
        outcome(raise_(KeyError("x")))


def test_other_processes_than_the_first_print_nothing(outcome, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert outcome(raise_(ValueError("wrong"))) == (1, "")


def test_a_recipe_that_does_not_load(capsys):
    assert launch.run_recipe("no-such-recipe") == 1
    assert capsys.readouterr().err.startswith("dijiang: recipe no-such-recipe is neither a file nor a bundled recipe")
