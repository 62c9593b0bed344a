"""Which code a kept result depends on."""

import re
from pathlib import Path

from dijiang.evaluate.quality import measuring_code
from dijiang.evaluate.quality.measuring_code import code_hash


def test_code_is_hashed_by_what_it_says(monkeypatch, tmp_path):
    (tmp_path / "perplexity.py").write_text("a = 1", encoding="utf-8")
    (tmp_path / "drawing.py").write_text("b = 1", encoding="utf-8")
    monkeypatch.setattr("dijiang.evaluate.quality.measuring_code.__file__", str(tmp_path / "measuring_code.py"))
    before = code_hash()
    (tmp_path / "drawing.py").write_text("b = 2", encoding="utf-8")  # which measures nothing
    assert code_hash() == before
    (tmp_path / "perplexity.py").write_text("a = 2", encoding="utf-8")
    assert code_hash() != before


def test_all_code_that_measures_is_named():
    """Every module that scores pass through: those named here, what they import from this room, and so on."""
    folder = Path(measuring_code.__file__).parent
    seen, left = set(), {"tasks", "subjects", "attention_maps"}
    while left:
        name = left.pop()
        seen.add(name)
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        left |= set(re.findall(r"^from \.(\w+) import", text, flags=re.MULTILINE)) - seen
    assert seen == measuring_code.MEASURING
