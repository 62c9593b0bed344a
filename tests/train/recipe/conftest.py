"""Recipes in files, and the one line that refuses them."""

from pathlib import Path

import pytest

from dijiang.train.recipe.load import load_recipe


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> path of a file with this text."""

    def make(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def complains(recipe, tmp_path, refused):
    """complains(text, message, *sets): one line that names the recipe and continues with `message`, a pattern."""

    def check(text: str, message: str, *sets: str) -> None:
        path = recipe(text)
        refused(tmp_path, lambda: load_recipe(path, sets), rf"^recipe \S*recipe\.yaml: {message}")

    return check
