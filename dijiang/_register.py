"""
Registration of DiJiang with transformers' auto classes, at no cost before they are used.

`dijiang.modeling` registers its classes when it is imported, but it needs transformers and torch. So it is imported together
with the auto classes: at once if they are loaded already, else right after the import of transformers that loads them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"  # every auto class imports it
MODELING = "dijiang.modeling"


def install() -> None:
    if AUTO in sys.modules:
        import_module(MODELING)
    else:
        sys.meta_path.insert(0, _AfterTransformers())


class _AfterTransformers:
    """
    A finder that counts how deep the imports of transformers' modules are nested.

    `dijiang.modeling` imports from transformers itself, and would meet incomplete modules while one of them is being
    executed. So it is imported after the outermost one.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_count(module: ModuleType) -> None:
            del loader.exec_module  # restores the loader's own method
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO in sys.modules:
                self.finish()

        loader.exec_module = execute_and_count
        return spec

    def finish(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if MODELING not in sys.modules:  # else its own import is what loads the auto classes
            import_module(MODELING)
