"""Command-line options made from a dataclass of settings, so that each setting is written once."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from dijiang.common.settings import describe, load_settings

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings, below those given here.")
]
Words = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting. Repeatable; see --list-settings.")
]


def with_settings(
    kind: type,
    daily: Mapping[str, str],
    *,
    flag_names: Mapping[str, str] | None = None,
    by_file: bool = True,
    defaults: Callable[[], dict[str, Any]] = dict,
    adjust: Callable[[dict[str, Any]], dict[str, Any]] = lambda flags: flags,
) -> Callable[[Callable], Callable]:
    """
    Give a Typer command the settings of `kind`: as options, by `--config FILE` and by `--set KEY=VALUE`.

    The command takes a keyword `settings` in place of them. Options of settings that are not in `daily` work and are left out
    of `--help`; `--list-settings` lists all.

    Args:
        kind: a dataclass that `load_settings` builds; importing it must be quick.
        daily: help of the options that `--help` shows, by field.
        flag_names: names of options, by field, where they are not the field's own.
        by_file: whether the command takes `--config`, `--set` and `--list-settings`.
        defaults: values of fields that the user did not set, computed when the command runs.
        adjust: changes the values of the options given, by field, before they are checked.
    """
    names = dict(flag_names or {})
    former_names = getattr(kind, "RENAMED", {})
    hints = get_type_hints(kind)
    hints |= {old: hints[new] for old, new in former_names.items()}
    # a mapping cannot be written as one option
    own_names = (field.name for field in fields(kind) if field.init and "dict" not in str(hints[field.name]))
    setting_names = [*own_names, *former_names]

    def decorate(command: Callable) -> Callable:
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "settings"]
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=option(hints[name], names.get(name, name), daily.get(name)),
            )
            for name in sorted(setting_names, key=lambda name: list(daily).index(name) if name in daily else len(daily))
        ]
        shared = {"config_file": ConfigFile, "words": Words, "list_settings": listing_option(kind)} if by_file else {}
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in shared.items()
        ]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            given = {name: value for name in setting_names if (value := values.pop(name)) is not None}
            values.pop("list_settings", None)
            file, words = values.pop("config_file", None), values.pop("words", None)
            settings = load_settings(kind, file, words or [], adjust(given), defaults=defaults())
            return command(settings=settings, **values)

        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword_only, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword_only, *parameters]}
        return run

    return decorate


def option(hint: Any, name: str, text: str | None) -> Any:
    """The annotation of one option; hidden without `text`."""
    if get_origin(hint) is UnionType:
        hint = next(arm for arm in get_args(hint) if arm is not NoneType)
    if get_origin(hint) in (tuple, list):
        hint = list[get_args(hint)[0]]  # type: ignore[misc]
    elif get_origin(hint) is not None:  # a Literal of strings, which `build` checks
        hint = str
    flag = f"--{name.replace('_', '-')}"
    return Annotated[hint | None, typer.Option(flag, help=text, hidden=text is None)]


def listing_option(kind: type) -> Any:
    """The option that lists all settings of `kind` and ends the command."""

    def show(wanted: bool) -> None:
        if wanted:
            for name, default, text in describe(kind):
                typer.echo(f"{name}={default}\n    {text}")
            raise typer.Exit

    return Annotated[
        bool | None,
        typer.Option("--list-settings", callback=show, is_eager=True, help="List all settings and their defaults."),
    ]
