"""Small models pruned on a short text."""

import pytest

from dijiang.compress import PruneConfig, plan, prune
from dijiang.compress.oneshot import run as pruning


@pytest.fixture
def run(text_file, tmp_path, monkeypatch):
    """run(source, "out", **settings) -> tmp_path / "out", pruned on 10 sequences of 32 tokens, no picture drawn."""
    monkeypatch.setattr(pruning, "find_spec", lambda package: None)

    def call(source, name="out", **settings):
        small = {"calibration": (text_file,), "samples": 10, "length": 32, "sensitivity_samples": 3, "device": "cpu"}
        return prune(source, tmp_path / name, PruneConfig(**(small | settings)), cache=tmp_path / "cache", progress=False)

    return call


@pytest.fixture
def planned(text_file, tmp_path):
    """planned(source, **settings) -> the plan."""

    def call(source, **settings):
        small = {"calibration": (text_file,), "samples": 4, "length": 32, "sensitivity_samples": 4, "device": "cpu"}
        return plan(source, PruneConfig(**(small | settings)), cache=tmp_path / "cache", progress=False)

    return call


@pytest.fixture
def refuses(refused, run, tmp_path):
    """refuses(message, source, **settings): one line, nothing new in tmp_path, not even hidden."""
    return lambda message, source, **settings: refused(tmp_path, lambda: run(source, **settings), message)
