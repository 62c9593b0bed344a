"""Recipes: YAML files read into the dataclasses of `config.py`, and written back."""

import dataclasses
import difflib
import glob
import importlib.resources
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from dijiang.convert import PRESETS
from dijiang.convert.layer_settings import as_number, check_keys
from dijiang.convert.mapping import dtype_named

from ..data.sources import is_token_folder
from .schema import AlignConfig, ConvertConfig, DataConfig, DistillConfig, Recipe, RunConfig, SourceConfig, StageConfig

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
PLAIN_TEXT = (".txt", ".md", ".txt.gz", ".md.gz")


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
        content = parse(text)
        if not isinstance(content, dict):
            raise ValueError("it must be a mapping of keys to values")
        given = set()
        for word in sets:
            apply_set(content, word, given)
        recipe = build(Recipe, content, "")
        check_choices(recipe)
        idle = {} if stored else without_effect(recipe)
        for key in written(content):
            if key in idle:
                raise ValueError(f"{key} has no effect with {idle[key]}; leave it out")
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


def parse(text: str) -> Any:
    """The value of a YAML text; unlike PyYAML it refuses a key given twice."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        refuse_repeats(node, "", set())
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def refuse_repeats(node: yaml.Node, key: str, seen: set[int]) -> None:
    if id(node) in seen:  # an anchor, which may even hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, part in enumerate(node.value):
            refuse_repeats(part, join(key, index), seen)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for name, part in node.value:
            if isinstance(name.value, str):
                if name.value in names:
                    raise ValueError(f"{join(key, name.value)} is given twice, again in line {name.start_mark.line + 1}")
                names.add(name.value)
                refuse_repeats(part, join(key, name.value), seen)


def apply_set(content: dict, word: str, given: set[str]) -> None:
    """Put one `KEY=VALUE` word into the raw mapping of a recipe; `given` holds the keys set before."""
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ValueError(f"--set {word!r} is not KEY=VALUE; write for example align.tokens=20000")
    if key in given:
        raise ValueError(f"--set gives {key} twice; keep one of them")
    given.add(key)
    try:
        value = parse(text)
    except ValueError as error:
        raise ValueError(f"--set {word!r}: {error}; quote it, or write lists as [a, b]") from None
    *parents, last = key.split(".")
    holder, so_far = content, ""
    for part in parents:
        place = place_in(holder, part, so_far, word)
        so_far = join(so_far, part)
        below = holder.get(place) if isinstance(holder, dict) else holder[place]
        if isinstance(below, str) and isinstance(holder, list):  # a source that is only its path
            below = {"path": below}
        holder[place] = below = {} if below is None else below
        holder = below
    holder[place_in(holder, last, so_far, word)] = value


def place_in(holder: Any, part: str, so_far: str, word: str) -> str | int:
    """`part` as an index of `holder`, a mapping or a list."""
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise ValueError(f"--set {word!r}: {so_far} is {holder!r}, which holds no keys")
    if not part.isdecimal() or int(part) >= len(holder):
        raise ValueError(f"--set {word!r}: {so_far} has the entries 0 to {len(holder) - 1}, not {part}")
    return int(part)


def build(hint: Any, value: Any, key: str) -> Any:
    """`value`, as YAML gives it, as the type `hint`; `key` is its dotted name."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        if value is None:
            return None
        return build(next(arm for arm in args if arm is not NoneType), value, key)
    if origin is Literal:
        if value not in args or not isinstance(value, str):
            raise ValueError(f"{key} is {value!r}; choose {', '.join(args[:-1])} or {args[-1]}")
        return value
    if origin in (list, tuple):
        expected = "a list such as [a, b]" if origin is list else f"a list of {len(args)} numbers"
        if not isinstance(value, list) or (origin is tuple and len(value) != len(args)):
            raise ValueError(f"{key} is {value!r}, expected {expected}")
        hints = args if origin is tuple else args * len(value)
        return origin(build(one, part, join(key, i)) for i, (one, part) in enumerate(zip(hints, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, {"path": value} if hint is SourceConfig and isinstance(value, str) else value, key)
    if hint is float and type(value) in (int, str):
        value = as_number(value) if isinstance(value, str) else float(value)  # YAML 1.1 takes 1e-3 for a word
    if type(value) is not hint:
        raise ValueError(f"{key} is {value!r}, expected {NAMES[hint]}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, expected a finite number")
    if hint is dict:
        return {str(name): as_number(part) if isinstance(part, str) else part for name, part in value.items()}
    return value


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word (quote it if it looks like something else)",
    dict: "a mapping of keys to values",
}


def build_dataclass(kind: type, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, expected a mapping of keys to values")
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise ValueError(f"unknown key {join(key, name)}{meant_by(str(name), key, list(hints))}")
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{join(key, field.name)} is missing")
    arguments = {name: build(hints[name], part, join(key, name)) for name, part in value.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None


def meant_by(name: str, key: str, known: list[str]) -> str:
    """What the user of the unknown key `name` below `key` may have meant."""
    homes = [section for section, kind in SECTIONS.items() if name in get_type_hints(kind)]
    if homes:
        return f"; {name} belongs to {' and '.join(homes)}"
    if close := difflib.get_close_matches(name, known, n=1):
        return f" (did you mean {join(key, close[0])}?)"
    return f"; known are {', '.join(known)}"


def check_choices(recipe: Recipe) -> None:
    """Raise ValueError on what conversion would refuse, and on a recipe without a stage."""
    if not recipe.stages:
        raise ValueError("it names no stage; add align, distill or both")
    try:
        if recipe.convert.preset not in PRESETS:
            raise ValueError(f"preset {recipe.convert.preset!r} is unknown; choose from {', '.join(PRESETS)}")
        dtype_named(recipe.convert.dtype)
    except ValueError as error:
        raise ValueError(f"convert: {error}") from None
    try:
        check_keys(recipe.convert.settings)
    except ValueError as error:
        raise ValueError(f"convert.settings: {error}") from None


# section, keys, whether they are idle in a recipe r and its section s, and what makes them so
IDLE = (
    ("align", ["weight_decay"], lambda r, s: s.trains == "kernel", "align.trains: kernel"),
    ("convert", ["settings.decay_spans"], lambda r, s: student_settings(r).get("decay") == "none", "decay: none"),
    ("align", ["attention_learning_rate"], lambda r, s: s.trains == "kernel", "align.trains: kernel"),
    ("align", ["quiet"], lambda r, s: s.calibrate_blocks == 0, "align.calibrate_blocks: 0"),
    ("align", ["quiet"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["position_range"], lambda r, s: no_room(s), "no room beside sequences of that length"),
    ("distill", ["position_range"], lambda r, s: no_room(s), "no room beside sequences of that length"),
    ("distill", ["weight_decay"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("align", ["linear_weight", "window_dropout"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["final_share"], lambda r, s: s.schedule == "flat", "align.schedule: flat"),
    ("distill", ["final_share"], lambda r, s: s.schedule == "flat", "distill.schedule: flat"),
    ("distill", ["lora_rank"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["learning_rate"], lambda r, s: s.trains != "all", "distill.trains: attention or kernel"),
    ("distill", ["attention_learning_rate"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["train_embeddings"], lambda r, s: s.trains != "all", "distill.trains: attention or kernel"),
    ("distill", ["temperature", "teacher_top_k"], lambda r, s: s.kl_weight == 0, "distill.kl_weight: 0"),
    ("data", ["held_out_tokens"], lambda r, s: not s.held_out, "no data.held_out"),
    (
        "run",
        ["gradient_checkpointing"],
        lambda r, s: r.distill is None,
        "align alone: one layer's graph exists at a time",
    ),
    ("run", ["evaluate_every"], lambda r, s: not r.data.held_out, "no data.held_out"),
    ("run", ["compile"], lambda r, s: r.distill is None, "align alone, whose layers are compared one by one"),
    ("run", ["compile"], lambda r, s: s.deepspeed is not None, "run.deepspeed"),
    ("run", ["compile"], lambda r, s: s.gradient_checkpointing, "run.gradient_checkpointing"),
    ("run", ["compile"], lambda r, s: r.data.respect_documents, "data.respect_documents, which makes shapes of every size"),
)


def without_effect(recipe: Recipe) -> dict[str, str]:
    """The dotted keys that change nothing in this recipe, and why."""
    idle = {}
    for section, keys, applies, reason in IDLE:
        if (config := getattr(recipe, section)) is not None and applies(recipe, config):
            idle |= {f"{section}.{key}": reason for key in keys}
    for name in ("train", "held_out"):
        sources = getattr(recipe.data, name)
        for index, source in enumerate(sources):
            key = f"data.{name}.{index}"
            if name == "held_out":
                idle[f"{key}.weight"] = "held-out text, of which each source gives as much"
            elif len(sources) == 1:
                idle[f"{key}.weight"] = "a single source"
            if is_local(source.path):
                idle |= {f"{key}.{part}": "a file or folder on disk" for part in ("subset", "split")}
            if is_token_folder(source.path):
                idle[f"{key}.column"] = "a folder of tokens"
            if source.path.lower().endswith(PLAIN_TEXT):
                idle[f"{key}.column"] = "plain text"
    return idle


def no_room(stage: StageConfig) -> bool:
    return stage.position_range == stage.block_size and stage.start_block_size is None


def has_window(recipe: Recipe) -> bool:
    """Whether the student's linear layers have an exact window."""
    return student_settings(recipe).get("attention_window") != 0


def student_settings(recipe: Recipe) -> dict:
    """Settings of the linear layers."""
    return PRESETS.get(recipe.convert.preset, {}) | recipe.convert.settings


def is_local(path: str) -> bool:
    """Whether a source's path, which may be a glob, is found on disk."""
    here = Path(path).expanduser()
    return here.exists() or (glob.has_magic(path) and any(True for _ in glob.iglob(str(here), recursive=True)))


def written(content: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a raw recipe; a key without a value is not one."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, part in parts:
        if part is not None:
            yield join(key, name)
            yield from written(part, join(key, name))


def pruned(content: Any, idle: dict[str, str], key: str = "") -> Any:
    """`content` in YAML's own types, without the keys in `idle` and those that are None."""
    if isinstance(content, dict) and key != "convert.settings":  # where None is a value
        parts = ((name, part, join(key, name)) for name, part in content.items() if part is not None)
        return {name: pruned(part, idle, below) for name, part, below in parts if below not in idle}
    if isinstance(content, list | tuple):
        return [pruned(part, idle, join(key, index)) for index, part in enumerate(content)]
    return content


def join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
