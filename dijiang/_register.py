"""Lets transformers' auto classes load DiJiang checkpoints once `dijiang` is imported, at no cost before they are used.

`dijiang.modeling` registers its classes when it is imported, but it needs transformers and torch. So it is imported when
the auto classes are: at once if they are loaded already, else right after whatever import of transformers loads them.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder

AUTO = "transformers.models.auto.configuration_auto"  # every auto class imports it
MODELING = "dijiang.modeling"


def install() -> None:
    if AUTO in sys.modules:
        import_module(MODELING)
    else:
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers:
    """A finder that finds nothing new: it follows how deep the imports of transformers' modules are nested.

    `dijiang.modeling` imports from transformers itself, and meets half-made modules if it does so while any of them is
    being made. Hence it waits for the outermost one.
    """

    def __init__(self):
        self.depth = 0

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader, make = spec.loader, spec.loader.exec_module

        def make_and_follow(module):
            del loader.exec_module  # the loader is itself again
            self.depth += 1
            try:
                make(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO in sys.modules:
                self.finish()

        loader.exec_module = make_and_follow
        return spec

    def finish(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if MODELING not in sys.modules:  # else it is being imported, and is why the auto classes are
            import_module(MODELING)
