"""Sources whose shape the estimate knows."""

import pytest

from dijiang.checkpoint.shapes import SHAPES


@pytest.fixture
def known(monkeypatch):
    """known(config) -> the name of a source of this shape."""

    def add(config) -> str:
        monkeypatch.setitem(SHAPES, "nowhere", config.to_dict())
        return "nowhere"

    return add
