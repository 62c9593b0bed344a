"""Keywords that a library would swallow are refused; those that it names are passed on."""

import pytest

from dijiang.common.library_calls import call_named


def swallow(first, *, second=2, **others):
    return first, second, others


def test_named_arguments_are_passed_on():
    assert call_named(swallow, 1, second=5) == (1, 5, {})


def test_renamed_arguments_are_refused():
    with pytest.raises(ValueError, match=r"swallow of .* does not take third, fourth, which dijiang gives it"):
        call_named(swallow, 1, third=3, fourth=4)


def test_what_lm_eval_and_datasets_are_given_is_named_by_them():
    """The libraries swallow all else: these are the calls of evaluate/quality/lm_eval_runner.py and train/data/sources.py."""
    datasets = pytest.importorskip("datasets")
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    given = {"pretrained", "tokenizer", "backend", "batch_size", "max_length", "softmax_dtype"}
    for function, names in ((HFLM, given), (datasets.load_dataset, {"split", "streaming", "revision"})):
        with pytest.raises(ValueError, match="does not take no_such_argument, which"):
            call_named(function, **dict.fromkeys(names), no_such_argument=1)
