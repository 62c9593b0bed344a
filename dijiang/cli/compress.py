"""The commands that make weights sparse: prune and unpack."""

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer


def prune(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint folder or GGUF file; DiJiang checkpoints too.")],
    output: Annotated[Path, typer.Argument(help="New folder for the pruned model, its plan and metrics.")],
    method: Annotated[str, typer.Option(help="mixed-sparsity; SparseGPT, Wanda and magnitude are settings of it.")] = (
        "mixed-sparsity"
    ),
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the decoder layers' linear weights to remove.  [default: 0.5]")
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="Which weights of a matrix go: isc (OBS + OBD), obs (SparseGPT's), obd, wanda, magnitude; "
            "isc-b and isc-c: other readings of the paper."
        ),
    ] = "isc",
    granularity: Annotated[
        str | None,
        typer.Option(
            help="What gets its own sparsity: weight (each matrix), layer, uniform.  [default: weight; uniform with a pattern]"
        ),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(help="rank: the paper's rule, by rank alone; loss: sparsities that are reckoned to cost least loss."),
    ] = "rank",
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Sparsities reach from SPARSITY - ALPHA (loss: 0) to SPARSITY + ALPHA.  [default: 0.1; loss: 0.2, up to 0.95]"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="weighted or shift (the sparsity holds for all weights together), paper (it need not).")
    ] = "weighted",
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="N zeros in every M weights of a row, such as 2:4, in all matrices.")
    ] = None,
    row_weights: Annotated[
        str,
        typer.Option(
            help="alike, or fisher: a row keeps more weights, the more the loss depends on its output; control: shuffled."
        ),
    ] = "alike",
    comparison: Annotated[
        str,
        typer.Option(help="Among which weights scores compete: block (of columns, as SparseGPT) or matrix."),
    ] = "block",
    sensitivity: Annotated[
        str,
        typer.Option(
            help="What ranks matrices: fisher, hutchinson, finite-difference, owl, local; controls: random, reversed."
        ),
    ] = "fisher",
    sensitivity_samples: Annotated[int, typer.Option(help="Sequences, or probes, behind ranks, costs and row weights.")] = 32,
    probes_by_layer: Annotated[
        bool,
        typer.Option("--probes-by-layer", help="One layer at a time (hutchinson, finite-difference): less memory, slower."),
    ] = False,
    normalisation: Annotated[str, typer.Option(help="Of sensitivities: total (of a matrix), mean (per weight).")] = "total",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text like what the model will see. Repeatable.  [default: a bundled text]"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.  [default: 2048, or the model's context if that is shorter]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Round what stays to so many bits, 2 to 8, in the same sweep.")] = None,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Look at inputs anew after each group of a layer's matrices. Slower.")
    ] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Text whose perplexity is measured before and after.  [default: a bundled text]"),
    ] = None,
    bitmask: Annotated[
        bool, typer.Option("--bitmask", help="Also write OUTPUT/sparse-bitmask, a smaller container; see unpack.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of calibration sequences, probes and controls.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda.")] = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(help="Where gradients, sensitivities and costs are kept.  [default: ~/.cache/dijiang/sensitivities]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write no model.")] = False,
) -> None:
    """
    Set the weights that matter least to zero, once and without training, layer by layer.

    The result is an ordinary checkpoint with exact zeros. They make it compress well and start sparse fine-tuning; they do not
    make it faster in stock PyTorch. Interrupted at any moment, the same command goes on.

    Example: dijiang prune HuggingFaceTB/SmolLM2-135M smollm2-sparse --sparsity 0.5 --calibration book.txt

    SparseGPT is `--score obs --granularity uniform`, Wanda `--score wanda --granularity uniform`. What lost least in our
    measurements is `--score obs --allocation loss --row-weights fisher --comparison matrix`.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("pruning needs accelerate, which is missing; run: pip install 'dijiang[compress]'")
    from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT
    from dijiang.compress import PruneConfig
    from dijiang.compress import plan as planned
    from dijiang.compress import prune as run

    config = PruneConfig(
        method=method, sparsity=sparsity, score=score, granularity=granularity, allocation=allocation, alpha=alpha,
        budget=budget, pattern=pattern, row_weights=row_weights, comparison=comparison, sensitivity=sensitivity,
        sensitivity_samples=sensitivity_samples, probes_by_layer=probes_by_layer, normalisation=normalisation, bits=bits,
        calibration=tuple(calibration or [TRAIN_TEXT]), samples=samples, length=length, true_sequential=true_sequential,
        held_out=held_out or HELD_OUT_TEXT, bitmask=bitmask, seed=seed, device=device,
    )  # fmt: skip
    if dry_run:
        from dijiang.evaluate.report.tables import number, print_table, wide_console

        found = planned(model, config, cache=cache)
        rows = [[x.name, f"{x.rows:,}", f"{x.columns:,}", number(x.sensitivity), f"{x.target:.4f}"] for x in found.matrices]
        print_table(wide_console(), ["matrix", "rows", "columns", "sensitivity", "sparsity"], rows)
        typer.echo(f"sparsity of all {sum(x.weights for x in found.matrices):,} weights: {found.sparsity:.4f}")
        return
    try:
        folder = run(model, output, config, cache=cache)
    except KeyboardInterrupt:
        from . import INTERRUPTED, Told

        typer.echo("dijiang: interrupted; run the same command again to go on", err=True)
        raise Told(INTERRUPTED) from None
    metrics = json.loads((folder / "pruning_metrics.json").read_text(encoding="utf-8"))
    before, after = metrics["perplexity"]["dense"], metrics["perplexity"]["pruned"]
    typer.echo(f"sparsity {metrics['sparsity']:.4f}, held-out perplexity {before:.2f} before and {after:.2f} after")
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
