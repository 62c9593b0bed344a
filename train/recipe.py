"""Recipes: YAML files that set a stage's configuration."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def load_recipe(path: str | Path, kind: type[T], **overrides: Any) -> T:
    """
    Read a YAML mapping into the dataclass `kind`; `overrides` that are not None win over the file.

    Raises:
        ValueError: if the file cannot be read, is no mapping, has keys that `kind` lacks, or values of a wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values")
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := sorted(map(str, content.keys() - fields.keys())):
        raise ValueError(f"recipe {path} has unknown keys {', '.join(unknown)}; known are {', '.join(fields)}")
    for key, value in content.items():
        if fields[key] is float and type(value) in (int, str):
            with suppress(ValueError):  # YAML 1.1 takes 1e-3 for a word
                content[key] = value = float(value)
        if type(value) is not fields[key]:
            raise ValueError(f"recipe {path}: {key} is {value!r}, expected a value of type {fields[key].__name__}")
    return kind(**content | {key: value for key, value in overrides.items() if value is not None})
