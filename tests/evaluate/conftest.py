"""What figures show."""

from contextlib import contextmanager

import numpy as np
import pytest


@pytest.fixture
def drawings_of(monkeypatch):
    """drawings_of(module): a dict to be filled, by file name, with the axes of what the module draws."""

    def watch(module) -> dict[str, np.ndarray]:
        kept, draw = {}, module.drawn

        @contextmanager
        def keep(path, *args, **options):
            with draw(path, *args, **options) as drawing:
                kept[path.stem] = np.atleast_1d(drawing[1])
                yield drawing

        monkeypatch.setattr(module, "drawn", keep)
        return kept

    return watch
