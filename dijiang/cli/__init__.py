"""The command line. Every command is one call of a public function; errors a user can cause are one line each."""

import functools
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from dijiang.cli import compress, convert, demo, evaluate, train
from dijiang.common.errors import EXIT_ERROR, EXIT_INTERRUPTED, AlreadyReported, print_line
from dijiang.common.settings import FormerNameWarning

# without panels around them, options fit one screen
APP_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "context_settings": {"max_content_width": 100},
}
COMMANDS = (
    convert.convert,
    convert.select,
    convert.fit,
    convert.refresh_code,
    train.align,
    train.distill,
    train.recover,
    train.estimate,
    demo.demo,
    evaluate.evaluate,
    evaluate.report,
    evaluate.card,
    compress.prune,
    compress.unpack,
)

app = typer.Typer(
    help="Convert a pretrained transformer to linear attention, recover it, measure it, prune it.",
    add_completion=False,
    **APP_SETTINGS,
)
benchmark = typer.Typer(help="Measure speed and memory next to softmax attention, feature maps, and recall.", **APP_SETTINGS)
for command in COMMANDS:
    app.command()(command)
for command in (evaluate.latency, evaluate.kernels, evaluate.recall):
    benchmark.command()(command)
app.add_typer(benchmark, name="benchmark")


def show_version(wanted: bool) -> None:
    if wanted:
        from dijiang import __version__

        typer.echo(f"dijiang {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def show_warning(show: Callable[..., None], message: Warning, category: type[Warning], *place: Any, **more: Any) -> None:
    """Print a setting's former name as one line; show other warnings by `show`, as Python does."""
    if issubclass(category, FormerNameWarning):
        print_line(message)
    else:
        show(message, category, *place, **more)


def main() -> None:
    """Entry point. What a user can fix, wrong input or a full disk, is printed as one line."""
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C, so that half-written folders are removed
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(show_warning, warnings.showwarning)
            app(standalone_mode=True)
    except (ValueError, OSError, SafetensorError) as error:
        print_line(error)
        sys.exit(EXIT_ERROR)
    except AlreadyReported:
        raise
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            print_line("interrupted; nothing half-written was left")
        raise
