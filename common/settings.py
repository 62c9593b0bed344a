"""
Settings that users write: YAML files and KEY=VALUE words, read into typed dataclasses.

Every mistake is a ValueError of one line that names the dotted key: a key that is unknown (with the nearest known one), given
twice or missing, a value of a wrong type, a key that has no effect.
"""

import dataclasses
import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import did_you_mean

T = TypeVar("T")


class FormerNameWarning(FutureWarning):
    """A setting was given under a name that it had in an earlier version."""


TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word (quote it if it looks like something else)",
    Path: "the path of a file",
    dict: "a mapping of keys to values",
}


def load_settings(
    kind: type[T],
    file: str | Path | None = None,
    words: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """
    Read settings of the dataclass `kind`.

    Args:
        kind: a dataclass whose fields have types that `build` knows.
        file: YAML file, or None.
        words: `KEY=VALUE` words on top of the file.
        flags: values of those of a command's own options that were given, by field name, on top of both.
        defaults: values of fields that neither file nor words nor flags set.

    Raises:
        ValueError: if the file cannot be read, a setting is given twice in flags and words, or `build` refuses one.
    """
    content: Any = {}
    source = "--set"
    if file is not None:
        source = str(file)
        try:
            content = parse_yaml(Path(file).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"{file}: it must be a mapping of keys to values")
    given = dict(flags or {})
    apply_words(content, words)
    for word in words:
        key = word.partition("=")[0].strip()
        if key in given:
            raise ValueError(f"{key} is set twice, by --set and by its own option; keep one of them")
    try:
        return build(kind, {**(defaults or {}), **content, **given}, "")
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if file is not None else str(error)) from None


# --- YAML ---


class YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader without numbers in base 60: `2:4` is a word, not 124."""


YamlLoader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(f"(?!.*:){pattern.pattern}", re.VERBOSE) if tag.endswith((":int", ":float")) else pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """
    The value of a YAML text. Unlike PyYAML it refuses a key given twice.

    Raises:
        ValueError: if the text is not valid YAML or repeats a key.
    """
    loader = YamlLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        refuse_repeated_keys(node, "", set())
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def refuse_repeated_keys(node: yaml.Node, key: str, seen: set[int]) -> None:
    if id(node) in seen:  # an anchor, which may even contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, part in enumerate(node.value):
            refuse_repeated_keys(part, join(key, index), seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, part in node.value:
            if isinstance(name.value, str):
                if name.value in names:
                    raise ValueError(f"{join(key, name.value)} is given twice, again in line {name.start_mark.line + 1}")
                names.add(name.value)
                refuse_repeated_keys(part, join(key, name.value), seen)


def as_number(text: str) -> float | str:
    """YAML 1.1 parses 1e4 as a string; convert such strings to float and return other strings as they are."""
    if text[:1] in "+-.0123456789":
        try:
            return float(text)
        except ValueError:
            pass
    return text


# --- KEY=VALUE ---


def split_word(word: str, example: str = "") -> tuple[str, Any]:
    """
    Key and value of one `KEY=VALUE` word, the value read as YAML.

    Raises:
        ValueError: if there is no `=`, a part of the dotted key is empty, or the value is not valid YAML.
    """
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        advice = f"; write for example {example}" if example else ""
        raise ValueError(f"--set {word!r} is not KEY=VALUE{advice}")
    try:
        return key, parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {word!r}: {error}; quote it, or write lists as [a, b]") from None


def apply_words(content: dict[str, Any], words: Iterable[str], *, example: str = "", shorthand: str = "path") -> None:
    """
    Put `KEY=VALUE` words into `content`, the raw mapping of a YAML file, in place.

    Args:
        content: what the words change.
        words: KEY is dotted, with indices for lists: `data.train.0.weight=2`.
        example: a word to show in an error.
        shorthand: the key that a list entry stands for where it is a bare string and a word sets another key of it.

    Raises:
        ValueError: on a word that is malformed, sets a key twice, or leads into something that holds no keys.
    """
    given: set[str] = set()
    for word in words:
        key, value = split_word(word, example)
        if key in given:
            raise ValueError(f"--set gives {key} twice; keep one of them")
        given.add(key)
        *parents, last = key.split(".")
        holder: Any = content
        path = ""
        for part in parents:
            index = index_in(holder, part, path, word)
            path = join(path, part)
            below = holder.get(index) if isinstance(holder, dict) else holder[index]
            if isinstance(below, str) and isinstance(holder, list):
                below = {shorthand: below}
            holder[index] = below = {} if below is None else below
            holder = below
        holder[index_in(holder, last, path, word)] = value


def index_in(holder: Any, part: str, path: str, word: str) -> str | int:
    """`part` as a key or index of `holder`, the mapping or list at the dotted `path`."""
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise ValueError(f"--set {word!r}: {path} is {holder!r}, which holds no keys")
    if not part.isdecimal() or int(part) >= len(holder):
        raise ValueError(f"--set {word!r}: {path} has the entries 0 to {len(holder) - 1}, not {part}")
    return int(part)


# --- typed values ---


def build(hint: Any, value: Any, key: str, sections: Mapping[str, type] | None = None) -> Any:
    """
    `value`, as YAML gives it, as the type `hint`.

    Args:
        hint: `int`, `float`, `bool`, `str`, `Path`, `dict`, a `Literal` of strings, a list, a tuple, a dataclass, or one of
            these or None. Class attributes of a dataclass: `SHORTHAND`, the field that a bare string stands for; `RENAMED`,
            new names of fields by their former ones, which are accepted with a FutureWarning.
        value: of any type; former names of settings in it are replaced in place.
        key: dotted name of the value, for errors.
        sections: dataclasses by dotted name, to tell in which of them an unknown key belongs.

    Raises:
        ValueError: if the value does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        if value is None:
            return None
        return build(next(arm for arm in args if arm is not NoneType), value, key, sections)
    if origin is Literal:
        if value not in args or not isinstance(value, str):
            raise ValueError(f"{key} is {value!r}; choose {', '.join(args[:-1])} or {args[-1]}")
        return value
    if origin in (list, tuple):
        return build_sequence(origin, args, value, key, sections)
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, key, sections)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and type(value) in (int, str):
        value = as_number(value) if isinstance(value, str) else float(value)
    if type(value) is not hint:
        raise ValueError(f"{key} is {value!r}, expected {TYPE_NAMES[hint]}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{key} is {value!r}, expected a finite number")
    if hint is dict:
        return {str(name): as_number(part) if isinstance(part, str) else part for name, part in value.items()}
    return value


def build_sequence(origin: type, args: tuple[Any, ...], value: Any, key: str, sections: Mapping[str, type] | None) -> Any:
    """A list, a tuple of any length (`tuple[int, ...]`), or a tuple with a type for each entry."""
    any_length = origin is list or args[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(args)):
        expected = "a list such as [a, b]" if any_length else f"a list of {len(args)} numbers"
        raise ValueError(f"{key} is {value!r}, expected {expected}")
    hints = [args[0]] * len(value) if any_length else args
    return origin(build(one, part, join(key, i), sections) for i, (one, part) in enumerate(zip(hints, value, strict=True)))


def build_dataclass(kind: Any, value: Any, key: str, sections: Mapping[str, type] | None) -> Any:
    if isinstance(value, str) and hasattr(kind, "SHORTHAND"):
        value = {kind.SHORTHAND: value}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, expected a mapping of keys to values")
    use_new_names(kind, value, key)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in {field.name for field in fields}}
    for name in value:
        if name not in hints:
            raise ValueError(f"unknown key {join(key, name)}{meant_by(str(name), key, list(hints), sections or {})}")
    for field in fields:
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{join(key, field.name)} is missing")
    arguments = {name: build(hints[name], part, join(key, name), sections) for name, part in value.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None


def use_new_names(kind: Any, value: dict[str, Any], key: str = "") -> None:
    """Replace former names of settings of `kind` in `value`, with a warning each; ValueError if both names are there."""
    for old, new in getattr(kind, "RENAMED", {}).items():
        if old in value:
            if new in value:
                raise ValueError(f"{join(key, old)} is the former name of {join(key, new)}; keep the latter")
            message = f"{join(key, old)} is now called {join(key, new)}; the former name will be removed"
            warnings.warn(message, FormerNameWarning, stacklevel=3)
            value[new] = value.pop(old)


def accepts_former_names(kind: type[T]) -> type[T]:
    """Class decorator of a dataclass with `RENAMED`: its constructor takes the former names too, each with a FutureWarning."""
    construct = kind.__init__

    @functools.wraps(construct)
    def __init__(self: T, *args: Any, **settings: Any) -> None:
        use_new_names(kind, settings)
        construct(self, *args, **settings)

    kind.__init__ = __init__  # type: ignore[assignment]
    return kind


def meant_by(name: str, key: str, known: list[str], sections: Mapping[str, type]) -> str:
    """Advice on the unknown key `name`: the sections it belongs to, else the nearest known key, else all known ones."""
    if homes := [section for section, kind in sections.items() if name in get_type_hints(kind)]:
        return f"; {name} belongs to {' and '.join(homes)}"
    return did_you_mean(name, known, f"{key}." if key else "") or f"; known are {', '.join(known)}"


# --- keys without effect ---


def refuse_idle(keys: Iterable[str], idle: Mapping[str, str]) -> None:
    """Raise ValueError on the first of `keys` that changes nothing; `idle` gives the reason by dotted key."""
    for key in keys:
        if key in idle:
            raise ValueError(f"{key} has no effect with {idle[key]}; leave it out")


def written_keys(content: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a raw mapping, those without a value left out."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, part in parts:
        if part is not None:
            yield join(key, name)
            yield from written_keys(part, join(key, name))


def join(key: str, name: Any) -> str:
    """The dotted key of `name` below `key`."""
    return f"{key}.{name}" if key else str(name)


# --- help ---


def describe(kind: Any) -> list[tuple[str, str, str]]:
    """
    Name, default and description of each setting of a dataclass, in the order of its fields.

    The descriptions are those of the section `Attributes` in the docstring, one entry for each field.
    """
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[2]
    texts = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, flags=re.MULTILINE))
    rows = []
    for field in dataclasses.fields(kind):
        if field.init:
            required = field.default is field.default_factory is dataclasses.MISSING
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            rows.append((field.name, "required" if required else str(default), " ".join(texts.get(field.name, "").split())))
    return rows
