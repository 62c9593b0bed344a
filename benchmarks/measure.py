"""
Helpers of the benchmarks on top of `dijiang.evaluate.latency.timing`: the floor of the op, which backend ran, results of a
fresh process, tables, and JSON files.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dijiang.checkpoint.provenance import versions as own_versions
from dijiang.common.machine import command_line, machine
from dijiang.common.outputs import write_text_whole
from dijiang.evaluate.latency.timing import ratios

NATIVE = ("native_linear_attention", "native_step")  # the functions of dijiang.modeling that run C code
CHUNK = 64  # tokens per block of the chunk form, as the floor counts it
console = Console(width=None if sys.stdout.isatty() else 127)


def floor_flops(tokens: int, heads: int, head_dim: int, features: int, chunk: int = CHUNK) -> int:
    """
    Flops of the products that the chunk form performs, with d = head_dim, M = features, C = chunk, per token and head:
    2*2*d*M (maps of q and k) + 2*2*M*d (state read and written) + 2*C*(M + d) (weights inside a block, times the values).
    """
    d, M = head_dim, features
    return tokens * heads * (2 * 2 * d * M + 2 * 2 * M * d + 2 * chunk * (M + d))


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of Python, of our own dependencies and of `packages`, None for those that are not installed."""
    installed: dict[str, str | None] = {**own_versions()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def run_fresh(script: str, *arguments) -> dict:
    """Run `script` in a fresh process and return the JSON on the last line that it prints."""
    command = [sys.executable, script, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def backend_of(call: Callable) -> str:
    """`native` if one of the native functions returned a result during `call`, else `torch`."""
    native_returns = []

    def note(frame, event, result):
        if event == "return" and result is not None:
            native_returns.append(frame.f_code.co_name in NATIVE)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return "native" if any(native_returns) else "torch"


def choose_backend(name: str) -> None:
    """Turn native kernels off for `torch`, else on. The variable is read at every call that could use one."""
    if name == "torch":
        os.environ["DIJIANG_NATIVE"] = "0"
    else:
        os.environ.pop("DIJIANG_NATIVE", None)


def check_backend(requested: str, ran: dict[str, str]) -> dict[str, str]:
    """Return `ran`, the backend by pass, if it is the requested one; `native` need not cover every pass."""
    if (requested == "torch" and "native" in ran.values()) or (requested == "native" and "native" not in ran.values()):
        raise SystemExit(f"--backend {requested} was requested, but what ran is {ran}")
    return ran


def common_arguments(description: str, default_dtypes: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=default_dtypes)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--rounds", type=int, default=7, help="minimum; short calls get more")
    parser.add_argument("--backend", choices=("auto", "torch", "native"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script; targets are left out")
    parser.add_argument("--output", type=Path, help="JSON file; with --quick none is written by default")
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    """Set torch up as the arguments say."""
    choose_backend(arguments.backend)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def header(arguments: argparse.Namespace, script: str, *packages: str) -> dict:
    """The entries of a result that say which command ran where."""
    return {
        "command": command_line("python", f"benchmarks/{script}.py"),
        "quick": arguments.quick,
        "dtypes": arguments.dtype,
        "machine": machine(),
        "versions": versions(*packages),
    }


def target(name: str, limit: float, measured: float, *, at_most: bool = False) -> dict:
    """One entry of the section `targets`; `at_most` where less is better."""
    return {
        "name": name,
        "target": f"{'<=' if at_most else '>='} {limit:g}",
        "measured": measured,
        "met": measured <= limit if at_most else measured >= limit,
    }


def show(title: str, columns: list[str], rows: list[list]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row))
    console.print(table)


def show_timings(title: str, timings: dict[str, dict], peer: str) -> None:
    gains = ratios(timings, peer)
    rows = []
    for name, x in timings.items():
        times = [1e3 * x[key] for key in ("median_s", "min_s", "q1_s", "q3_s")]
        rows.append([name, *times, x["rounds"], gains.get(name, 1.0)])
    show(title, ["", "median ms", "min", "1st quartile", "3rd quartile", "rounds", f"times faster than {peer}"], rows)


def show_targets(targets: list[dict]) -> None:
    rows = [[x["name"], x["target"], x["measured"], "yes" if x["met"] else "NO"] for x in targets]
    if rows:
        show("Targets", ["", "target", "measured", "met"], rows)


def earlier_runs(output: Path, about: dict, keys: tuple[str, ...]) -> dict:
    """The entry `runs` of a file that an earlier call wrote, which must agree in the entries `keys`; empty without a file."""
    if not output.exists():
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    if different := [key for key in keys if earlier[key] != json.loads(json.dumps(about[key]))]:
        sys.exit(f"{output} is of another measurement ({' and '.join(different)} differ); name another file")
    return earlier["runs"]


def finish(arguments: argparse.Namespace, script: str, result: dict) -> None:
    """Show the targets and write the result, by default to results/SCRIPT.json and after a quick run nowhere."""
    show_targets(result.get("targets", []))
    output = arguments.output or (None if arguments.quick else Path(__file__).parent / "results" / f"{script}.json")
    if output:
        write_json(output, result)


def write_json(path: Path, result: dict) -> None:
    """Write `result` to a file that appears, or is replaced, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, json.dumps(result, indent=2) + "\n")
