"""The commands that make weights sparse: prune and unpack."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dijiang.cli.options import with_settings
from dijiang.common.errors import EXIT_INTERRUPTED, AlreadyReported, print_line
from dijiang.compress.oneshot.config import PruneConfig

PRUNE_OPTIONS = {
    "sparsity": "Share of the decoder layers' weights to remove.  [default: 0.5]",
    "calibration": "UTF-8 text file. Repeatable.  [default: a bundled text]",
    "score": "Weights that go: isc (default), obs (as SparseGPT), wanda, ...",
    "pattern": "N:M, N zeros in every M weights of a row, such as 2:4.",
    "bits": "Round the remaining weights to this many bits, 2 to 8.",
    "device": "auto (a GPU if there is one), cpu, cuda.",
}


def bundled_texts() -> dict[str, Any]:
    from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT

    return {"calibration": [TRAIN_TEXT], "held_out": HELD_OUT_TEXT}


@with_settings(PruneConfig, PRUNE_OPTIONS, defaults=bundled_texts)
def prune(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file; DiJiang checkpoints too.")],
    output: Annotated[Path, typer.Argument(help="New folder for the pruned model, its plan and metrics.")],
    cache: Annotated[Path | None, typer.Option(hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write no model.")] = False,
    *,
    settings: PruneConfig,
) -> None:
    """
    Set the weights that matter least to zero, without training.

    Run an interrupted command again to continue. docs/pruning.md compares methods.

    Example: dijiang prune HuggingFaceTB/SmolLM2-135M smollm2-sparse --calibration book.txt
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("pruning needs accelerate, which is missing; run: pip install 'dijiang[compress]'")
    import dijiang.compress

    if dry_run:
        from dijiang.evaluate.report.tables import number, print_table, wide_console

        plan = dijiang.compress.plan(model, settings, cache=cache)
        rows = [[x.name, f"{x.rows:,}", f"{x.columns:,}", number(x.sensitivity), f"{x.target:.4f}"] for x in plan.matrices]
        print_table(wide_console(), ["matrix", "rows", "columns", "sensitivity", "sparsity"], rows)
        typer.echo(f"sparsity of all {sum(x.weights for x in plan.matrices):,} weights: {plan.sparsity:.4f}")
        return
    try:
        folder = dijiang.compress.prune(model, output, settings, cache=cache)
    except KeyboardInterrupt:
        print_line("interrupted; run the same command again to continue")
        raise AlreadyReported(EXIT_INTERRUPTED) from None
    metrics = json.loads((folder / "pruning_metrics.json").read_text(encoding="utf-8"))
    message = f"sparsity {metrics['sparsity']:.4f}"
    if perplexity := metrics["perplexity"]:
        message += f", held-out perplexity {perplexity['dense']:.2f} before and {perplexity['pruned']:.2f} after"
    typer.echo(message)
    typer.echo(f"wrote {folder}")


def unpack(
    container: Annotated[Path, typer.Argument(help="Folder sparse-bitmask that `prune --bitmask` wrote.")],
    output: Annotated[Path, typer.Argument(help="New folder for the ordinary checkpoint.")],
) -> None:
    """
    Turn a compressed container back into an ordinary checkpoint, bit for bit.

    Example: dijiang unpack smollm2-sparse/sparse-bitmask smollm2-dense-again
    """
    from dijiang.compress import read_bitmask

    typer.echo(f"wrote {read_bitmask(container, output)}")
