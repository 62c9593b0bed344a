"""Fixtures of the tests of training."""

import gc

import pytest


@pytest.fixture
def no_waiting(monkeypatch):
    """Without writes to the disk itself, and without old objects in the garbage collections that Trainer starts with."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    gc.freeze()
    yield
    gc.unfreeze()
