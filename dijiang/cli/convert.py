"""The commands that make checkpoints: convert, select, fit and refresh-code."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dijiang.bundled import TRAIN_TEXT
from dijiang.train.memories.config import FitConfig, SelectConfig

from .options import with_settings

# slots of the chosen heads, which would keep all tokens, and of the others: just under 12 MiB a sequence of SmolLM2-135M
CONSTANT = FitConfig(slots=192, large_slots=2000)
Source = Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file of the softmax model.")]


def convert(  # noqa: PLR0913 - an option each
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
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16, float16.")] = "auto",
    fit: Annotated[
        list[Path] | None, typer.Option("--fit", metavar="TEXT", help="Also run select and fit, on this text. Repeatable.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=0, help="With --fit: heads that keep every token.  [default: 7]")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="With --fit: slots of each other head.  [default: 128]")] = None,
    constant: Annotated[
        bool, typer.Option("--constant", help="With --fit: constant memory; 2,000 slots, not every token; 192 in other heads.")
    ] = False,
) -> None:
    """
    Turn a GPT-NeoX- or LLaMA-type model into a DiJiang checkpoint.

    Example: dijiang convert HuggingFaceTB/SmolLM2-135M smollm2-dijiang --fit my-text.txt

    Without --fit the model forgets what its window lost, until it is trained. With
    `--set layer_types=full_attention` the result computes what the source does.
    """
    from dijiang.convert import convert_model, parse_overrides

    overrides = parse_overrides(set_ or [])
    if fit:
        from dijiang.train.memories.run import convert_with_memories

        settings: dict[str, Any] = {"texts": fit}
        settings["select"] = None if heads == 0 else SelectConfig(heads=heads or 7)
        usual = CONSTANT if constant else FitConfig()
        slots = usual.slots if slots is None else slots
        settings["fit"] = replace(usual, slots=slots, least_slots=min(usual.least_slots, slots))
        folder = convert_with_memories(source, output, preset, dtype=dtype, **settings, **overrides)
        draw_ranking(folder)
    elif heads is not None or slots is not None or constant:
        raise ValueError("--heads, --slots and --constant have no effect without --fit TEXT")
    else:
        folder = convert_model(source, output, preset, dtype=dtype, **overrides)
    typer.echo(f"wrote {folder}")


Checkpoint = Annotated[Path, typer.Argument(help="Folder of a DiJiang checkpoint with a window.")]
Output = Annotated[Path, typer.Argument(help="New folder for the checkpoint with these memories.")]
Teacher = Annotated[str, typer.Option(help="The softmax model that the checkpoint was converted from.")]
Texts = Annotated[
    list[Path] | None, typer.Option("--data", metavar="TEXT", help="UTF-8 text; default: a text of this package. Repeatable.")
]


@with_settings(
    SelectConfig,
    {
        "heads": "Heads to keep, 7 by default.",
        "bytes_per_token": "As many heads as fit into this growth of the cache.",
        "method": "greedy, gates, content_free, induction, random, perplexity, ...",
    },
)
def select(checkpoint: Checkpoint, output: Output, teacher: Teacher, data: Texts = None, *, settings: SelectConfig) -> None:
    """
    Choose the key/value heads that keep every token, by what recall needs.

    Example: dijiang select smollm2-dijiang smollm2-heads --teacher HuggingFaceTB/SmolLM2-135M --heads 7

    No weight is trained. Leaves the ranking of all heads in `selection.json` and its picture in `selection.png`.
    """
    from dijiang.train.memories.run import add_memories

    folder = add_memories(checkpoint, output, teacher=teacher, select=settings, texts=data or [TRAIN_TEXT])
    draw_ranking(folder)
    typer.echo(f"wrote {folder}")


def draw_ranking(folder: Path) -> None:
    """The picture of `selection.json`, if the folder has one and matplotlib is installed."""
    from dijiang.evaluate.report.selection_figure import draw_selection
    from dijiang.evaluate.report.style import missing_packages
    from dijiang.train.memories.run import SELECTION_FILE

    if (folder / SELECTION_FILE).is_file() and not missing_packages("matplotlib"):
        draw_selection(folder / SELECTION_FILE)


@with_settings(
    FitConfig,
    {
        "slots": "Tokens that a head holds, the mean over heads; 128 by default.",
        "large_slots": "Slots in place of every token, for constant memory.",
        "text_tokens": "Tokens of text to fit on.",
    },
)
def fit(checkpoint: Checkpoint, output: Output, teacher: Teacher, data: Texts = None, *, settings: FitConfig) -> None:
    """
    Give the heads that forget a memory for the tokens that later ones will ask for.

    Example: dijiang fit smollm2-heads smollm2-ready --teacher HuggingFaceTB/SmolLM2-135M --data my-text.txt

    Fits a score to the teacher's attention; no weight of the model is trained.
    """
    from dijiang.train.memories.run import add_memories

    folder = add_memories(checkpoint, output, teacher=teacher, fit=settings, texts=data or [TRAIN_TEXT])
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
