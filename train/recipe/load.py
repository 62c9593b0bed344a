"""Reads recipes from YAML into the dataclasses of `schema.py`, writes them back, and compares them."""

import dataclasses
import difflib
import importlib.resources
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from dijiang.common.conditions import require
from dijiang.common.device import dtype_named
from dijiang.common.errors import unknown
from dijiang.common.settings import apply_words, build, join, parse_yaml, refuse_idle, written_keys
from dijiang.convert import PRESETS
from dijiang.convert.layer_settings import check_keys

from ..memories.config import FitConfig, SelectConfig
from .idle import keeps_heads, without_effect
from .schema import (
    SHRINKS_KEPT_HEADS,
    AlignConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    RecallConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)

SECTIONS = {
    "convert": ConvertConfig,
    "data": DataConfig,
    "data.train": SourceConfig,
    "data.recall": RecallConfig,
    "select": SelectConfig,
    "fit": FitConfig,
    "align": AlignConfig,
    "distill": DistillConfig,
    "run": RunConfig,
}
# keys of where a job writes, how it runs, what it caches and measures: none changes what is learned
NOT_LEARNED = ("run", "output", "data.cache", "data.held_out", "data.held_out_tokens", "data.recall.held_out_samples")


def load_recipe(path_or_name: str | Path, sets: Sequence[str] = (), *, stored: bool = False) -> Recipe:
    """
    Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe, see `bundled_recipes`.
        sets: `KEY=VALUE` words on top of the file, KEY dotted and VALUE in YAML: `align.tokens=20000`,
            `data.train=[a.txt, b.txt]`, `data.train.0.weight=2`; `distill=null` leaves a stage out.
        stored: whether the file was written by `dump_recipe`, perhaps of an older version; former names of keys and keys
            without effect are then accepted silently.

    Raises:
        ValueError: if there is no such recipe, it is not valid YAML, holds a key twice, an unknown one, one that has no effect
            (unless `stored`) or a value of a wrong type, or lacks a key. One line that names the recipe and the dotted key.
    """
    text = read_recipe(path_or_name)
    try:
        content = parse_yaml(text)
        if not isinstance(content, dict):
            raise ValueError("it must be a mapping of keys to values")
        apply_words(content, sets, example="align.tokens=20000")
        with warnings.catch_warnings(action="ignore", category=FutureWarning) if stored else nullcontext():
            recipe = build(Recipe, content, "", SECTIONS)
        check_choices(recipe)
        if not stored:
            refuse_idle(written_keys(content), without_effect(recipe))
    except ValueError as error:
        raise ValueError(f"recipe {path_or_name}: {error}") from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML for `load_recipe`, with all defaults but without keys that have no effect."""
    content = without_idle(dataclasses.asdict(recipe), without_effect(recipe))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def differences(a: Recipe, b: Recipe, ignore: Sequence[str] = NOT_LEARNED) -> list[str]:
    """
    List the dotted keys in which two recipes differ, such as `align.tokens` or `data.train.0.path`. A list of another length,
    or a stage that only one of them has, counts as one key. Keys in `ignore`, keys below them and keys that have no effect in
    either recipe are left out.
    """
    idle = without_effect(a).keys() & without_effect(b).keys()

    def compare(x, y, key: str) -> Iterator[str]:
        if x == y or key in idle or any(key == name or key.startswith(f"{name}.") for name in ignore):
            return
        if isinstance(x, dict) and isinstance(y, dict):
            for name in dict.fromkeys([*x, *y]):
                yield from compare(x.get(name), y.get(name), join(key, name))
        elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            for index, pair in enumerate(zip(x, y, strict=True)):
                yield from compare(*pair, join(key, index))
        else:
            yield key

    return list(compare(dataclasses.asdict(a), dataclasses.asdict(b), ""))


def bundled_recipes() -> dict[str, Any]:
    """The recipes shipped with the package, by name: files of `importlib.resources`."""
    folder = importlib.resources.files("dijiang.configs") / "recipes"
    return {file.name.removesuffix(".yaml"): file for file in sorted(folder.iterdir(), key=str) if file.name.endswith(".yaml")}


def read_recipe(path_or_name: str | Path) -> str:
    """The text of a recipe, see `load_recipe`."""
    path = Path(path_or_name).expanduser()
    name = str(path_or_name)
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
    """Raise ValueError on a recipe without a stage, or with settings that conversion or a stage would refuse."""
    if not recipe.stages:
        raise ValueError("it names no stage; add align, distill or both")
    section = "convert"
    try:
        if recipe.convert.preset not in PRESETS:
            raise unknown("preset", recipe.convert.preset, PRESETS)
        dtype_named(recipe.convert.dtype)
        section = "convert.settings"
        check_keys(recipe.convert.settings)
        section, distill = "distill", recipe.distill
        if distill is not None and distill.weight_decay and not (distill.lora_rank or distill.train_kept_heads):
            decays = distill.trains != "kernel" and keeps_heads(recipe)
            require(not decays, f"weight_decay={distill.weight_decay} {SHRINKS_KEPT_HEADS}")
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


def without_idle(content: Any, idle: dict[str, str], key: str = "") -> Any:
    """`content`, with lists for tuples, without the keys in `idle` and keys that are None."""
    if isinstance(content, dict) and key != "convert.settings":  # there None is a value of its own
        parts = ((name, part, join(key, name)) for name, part in content.items() if part is not None)
        return {name: without_idle(part, idle, below) for name, part, below in parts if below not in idle}
    if isinstance(content, list | tuple):
        return [without_idle(part, idle, join(key, index)) for index, part in enumerate(content)]
    return content
