"""The wording of errors."""

import pytest

from dijiang.common.errors import did_you_mean, one_line, unknown


def test_messages_are_folded_into_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 400)) == "x" * 297 + "..."
    assert len(one_line(ValueError("x" * 400), limit=50)) == 50


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("recomended", "preset 'recomended' is unknown (did you mean recommended?); choose from recommended, paper"),
        ("zzz", "preset 'zzz' is unknown; choose from recommended, paper"),
        (3, "preset 3 is unknown; choose from recommended, paper"),
    ],
)
def test_an_unknown_value_is_told_with_what_there_is(value, message):
    error = unknown("preset", value, iter(["recommended", "paper"]))
    assert isinstance(error, ValueError) and str(error) == message


def test_the_nearest_name():
    assert did_you_mean("sed", ["seed", "size"], "align.") == " (did you mean align.seed?)"
    assert did_you_mean("qqq", ["seed", "size"]) == ""
