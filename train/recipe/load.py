"""Recipes: YAML files read into the dataclasses of `schema.py`, and written back."""

import dataclasses
import difflib
import importlib.resources
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dijiang.common.device import dtype_named
from dijiang.common.errors import unknown
from dijiang.common.settings import apply_words, build, join, parse_yaml, refuse_idle, written_keys
from dijiang.convert import PRESETS
from dijiang.convert.layer_settings import check_keys

from .idle import without_effect
from .schema import AlignConfig, ConvertConfig, DataConfig, DistillConfig, Recipe, RunConfig, SourceConfig

SECTIONS = {
    "convert": ConvertConfig,
    "data": DataConfig,
    "data.train": SourceConfig,
    "align": AlignConfig,
    "distill": DistillConfig,
    "run": RunConfig,
}
# where a job writes, how it runs, what it caches and measures: nothing of it changes what is learnt
NOT_LEARNT = ("run", "output", "data.cache", "data.held_out", "data.held_out_tokens")


def load_recipe(path_or_name: str | Path, sets: Sequence[str] = (), *, stored: bool = False) -> Recipe:
    """
    Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe, see `bundled_recipes`.
        sets: `KEY=VALUE` words on top of the file, KEY dotted and VALUE in YAML: `align.tokens=20000`,
            `data.train=[a.txt, b.txt]`, `data.train.0.weight=2`; `distill=null` leaves a stage out.
        stored: the file is `dump_recipe`'s, perhaps an older version's, which may have thought other keys to have an effect;
            those without one are passed over.

    Raises:
        ValueError: if there is no such recipe, it is not valid YAML, holds a key twice, an unknown one, one that has no effect
            (unless `stored`) or a value of a wrong type, or lacks a key. One line that names the recipe and the dotted key.
    """
    text = read_text(path_or_name)
    try:
        content = parse_yaml(text)
        if not isinstance(content, dict):
            raise ValueError("it must be a mapping of keys to values")
        apply_words(content, sets, example="align.tokens=20000")
        recipe = build(Recipe, content, "", SECTIONS)
        check_choices(recipe)
        if not stored:
            refuse_idle(written_keys(content), without_effect(recipe))
    except ValueError as error:
        raise ValueError(f"recipe {path_or_name}: {error}") from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, all defaults spelt out, for `load_recipe`; keys without effect are left out."""
    content, idle = dataclasses.asdict(recipe), without_effect(recipe)
    return yaml.safe_dump(pruned(content, idle), sort_keys=False, allow_unicode=True, width=1000)


def differences(a: Recipe, b: Recipe, ignore: Sequence[str] = NOT_LEARNT) -> list[str]:
    """
    The dotted keys in which two recipes differ, such as `align.tokens` or `data.train.0.path`; a list of another length or a
    stage that only one has counts as one key. Left out are the keys in `ignore` and those below them, and what has no effect
    in either.
    """
    idle = without_effect(a).keys() & without_effect(b).keys()

    def compare(x, y, key: str) -> Iterator[str]:
        if x == y or key in idle or any(key == name or key.startswith(f"{name}.") for name in ignore):
            return
        if isinstance(x, dict) and isinstance(y, dict):
            for name in dict.fromkeys([*x, *y]):
                yield from compare(x.get(name), y.get(name), join(key, name))
        elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            for index, (one, other) in enumerate(zip(x, y, strict=True)):
                yield from compare(one, other, join(key, index))
        else:
            yield key

    return list(compare(dataclasses.asdict(a), dataclasses.asdict(b), ""))


def bundled_recipes() -> dict[str, Any]:
    """The recipes that the package ships, by name: files of `importlib.resources`."""
    folder = importlib.resources.files("dijiang.configs") / "recipes"
    return {file.name.removesuffix(".yaml"): file for file in sorted(folder.iterdir(), key=str) if file.name.endswith(".yaml")}


def read_text(path_or_name: str | Path) -> str:
    path, name = Path(path_or_name).expanduser(), str(path_or_name)
    try:
        if not path.exists() and (file := bundled_recipes().get(name)) is not None:
            path = file
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = difflib.get_close_matches(name, bundled_recipes(), n=3, cutoff=0.4) or list(bundled_recipes())
        raise ValueError(f"recipe {name} is neither a file nor a bundled recipe such as {', '.join(close)}") from None
    except OSError as error:
        raise ValueError(f"cannot read recipe {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {name}: it is not valid YAML: {error}") from None


def check_choices(recipe: Recipe) -> None:
    """Raise ValueError on what conversion would refuse, and on a recipe without a stage."""
    if not recipe.stages:
        raise ValueError("it names no stage; add align, distill or both")
    try:
        if recipe.convert.preset not in PRESETS:
            raise unknown("preset", recipe.convert.preset, PRESETS)
        dtype_named(recipe.convert.dtype)
    except ValueError as error:
        raise ValueError(f"convert: {error}") from None
    try:
        check_keys(recipe.convert.settings)
    except ValueError as error:
        raise ValueError(f"convert.settings: {error}") from None


def pruned(content: Any, idle: dict[str, str], key: str = "") -> Any:
    """`content` in YAML's own types, without the keys in `idle` and those that are None."""
    if isinstance(content, dict) and key != "convert.settings":  # where None is a value
        parts = ((name, part, join(key, name)) for name, part in content.items() if part is not None)
        return {name: pruned(part, idle, below) for name, part, below in parts if below not in idle}
    if isinstance(content, list | tuple):
        return [pruned(part, idle, join(key, index)) for index, part in enumerate(content)]
    return content
