"""A machine whose limits are known, two more shapes, and the pair of models that are compared."""

import gc
import sys

import pytest
from dijiang_testing.latency import CPU, LIMITS, TINY, checkpoint_pair

from dijiang.checkpoint import shapes
from dijiang.evaluate.latency import measure
from dijiang.evaluate.latency.models import LatencyPair


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Freeze what the tests have imported: every row collects garbage, which would take long otherwise."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Two more shapes, known limits of the machine, and the command line of a user."""
    for name, entries in TINY.items():
        monkeypatch.setitem(shapes.SHAPES, f"x/{name}", entries)
        monkeypatch.setitem(shapes.SHORT_NAMES, name, f"x/{name}")
    monkeypatch.setattr(measure, "machine_limits", lambda dtypes, device: LIMITS)
    monkeypatch.setattr(sys, "argv", ["dijiang", "benchmark", "latency", "/home/someone/model"])


@pytest.fixture
def both(pair) -> LatencyPair:
    return checkpoint_pair(pair.checkpoint, pair.teacher, longest=60, **CPU)
