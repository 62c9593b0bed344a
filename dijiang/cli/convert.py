"""The commands that make checkpoints: convert and refresh-code."""

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file of the softmax model.")]


def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="New folder for the DiJiang checkpoint.")],
    preset: Annotated[
        str,
        typer.Option(help="recommended (window, sinks, linear branch), linear (no window) or paper (the released code)."),
    ] = "recommended",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Setting on top of the preset, e.g. attention_window=128. Repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the stored weights: auto (the source's), float32, bfloat16, float16.")
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


def refresh_code(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a DiJiang checkpoint made by an earlier version.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace code files that were edited, too.")] = False,
) -> None:
    """
    Give a checkpoint the installed version's code; weights and settings stay.

    Use it when a checkpoint warns that its code was not tested with your version of transformers.

    Example: dijiang refresh-code smollm2-recovered/distill/model
    """
    from dijiang.checkpoint.code_files import refresh_code as refresh

    changed = refresh(checkpoint, overwrite=overwrite)
    typer.echo(f"replaced {', '.join(changed)}" if changed else f"the code in {checkpoint} is up to date")
