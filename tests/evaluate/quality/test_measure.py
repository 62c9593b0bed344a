"""Which code a cached score depends on."""

import ast
import importlib
from pathlib import Path

import pytest

from dijiang.evaluate.quality.measure import MEASURING_CODE

ROOT = Path(__file__).resolve().parents[3]
MEASURING_MODULES = ("tasks", "variants", "attention_maps")  # scores and maps come from these and from what they import


@pytest.fixture
def import_arrows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("import_arrows")


def test_the_cache_key_covers_all_code_that_measures(import_arrows):
    files = import_arrows.modules()
    left = {f"dijiang.evaluate.quality.{name}" for name in MEASURING_MODULES}
    reached = set()
    while left:
        module = left.pop()
        reached.add(module)
        path = files[module]
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name, _, _ in import_arrows.imports(ast.parse(path.read_text(encoding="utf-8")), package):
            left |= {known for known in (name, name.rpartition(".")[0]) if known in files} - reached
    uncovered = {name for name in reached if not any(f"{name}.".startswith(f"{code}.") for code in MEASURING_CODE)}
    assert uncovered <= {"dijiang", "dijiang._register"}  # the front door, which measures nothing
    assert {"dijiang.modeling.linear_attention", "dijiang.convert.loader", "dijiang.common.perplexity"} <= reached
