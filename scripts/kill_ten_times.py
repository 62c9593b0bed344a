"""
Kill a recovery run with SIGKILL at ten random moments, let it end, and compare its weights with those of an undisturbed run.

    python scripts/kill_ten_times.py RECIPE FOLDER [--set KEY=VALUE ...] [--processes 2] [--kills 10] [--seed 0]

Both runs write below FOLDER. They need `run.save_every` well below the number of steps and a fixed `run.dtype`. Exits with 1
if a single bit differs. The moments are during start-up, steps and saves; the step of each is printed.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from dijiang.train import load_recipe


def recover(arguments: argparse.Namespace, output: Path) -> subprocess.Popen:
    """Start a run in a process of its own."""
    start = [sys.executable, "-m"]
    if arguments.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        start += ["torch.distributed.run", "--nproc-per-node", str(arguments.processes), "--master-port", port, "-m"]
    sets = [word for setting in (*arguments.set, f"output={output}") for word in ("--set", setting)]
    return subprocess.Popen([*start, "dijiang.train", arguments.recipe, *sets], stderr=subprocess.DEVNULL)


def steps_logged(output: Path, stages: list[str]) -> int:
    """Steps in the logs of all stages, including those after the last checkpoint, which a killed run repeats."""
    total = 0
    for stage in stages:
        lines = output / stage / "metrics.jsonl"
        if lines.is_file():
            steps = [json.loads(line)["step"] for line in lines.read_text().splitlines() if line.endswith("}")]
            total += max(steps, default=0)
    return total


def run_to_end(arguments: argparse.Namespace, output: Path, stages: list[str]) -> tuple[float, float]:
    """Run to the end, and return the seconds until the first log and from there to the end."""
    began = time.monotonic()
    first = None
    process = recover(arguments, output)
    while process.poll() is None:
        if first is None and steps_logged(output, stages):
            first = time.monotonic()
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the undisturbed run ended with {process.returncode}; run it alone to see why")
    return first - began, time.monotonic() - first


def run_and_kill(arguments: argparse.Namespace, output: Path, seconds: float) -> bool:
    """Run for this many seconds, then kill all processes of the run; False if it ended before."""
    process = recover(arguments, output)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)  # of the launcher, in sessions of their own
        for member in (process, *children):
            member.kill()
        process.wait()
        psutil.wait_procs(children)
        return True
    if code:
        sys.exit(f"a resumed run ended with {code}; run it alone to see why")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages = load_recipe(arguments.recipe, arguments.set).stages
    undisturbed, killed = arguments.folder / "undisturbed", arguments.folder / "killed"
    startup, training = run_to_end(arguments, undisturbed, stages)
    print(f"undisturbed: {startup:.1f} s to the first log, then {training:.1f} s")

    moments = random.Random(arguments.seed)
    kills = 0
    while kills < arguments.kills:
        seconds = startup * moments.uniform(0.4, 1.1) + training * moments.uniform(0.0, 2.0 / arguments.kills)
        if not run_and_kill(arguments, killed, seconds):
            print(f"ended before kill {kills + 1}; take a longer recipe")
            break
        kills += 1
        partial = [path.name for path in killed.glob("*/checkpoints/.partial-*")]
        print(f"kill {kills} after {seconds:.1f} s, at step {steps_logged(killed, stages)}{', saving' if partial else ''}")
    if (code := recover(arguments, killed).wait()) != 0:
        sys.exit(f"the last run ended with {code}; run it alone to see why")

    different = 0
    for stage in stages:
        expected = {path.name: path for path in (undisturbed / stage / "model").glob("*.safetensors")}
        assert expected, f"{undisturbed / stage / 'model'} holds no weights"
        for name, path in expected.items():
            weights, after_kills = load_file(path), load_file(killed / stage / "model" / name)
            assert weights.keys() == after_kills.keys()
            different += sum(not torch.equal(weights[key], after_kills[key]) for key in weights)
    print(f"{kills} kills, {different} tensors differ")
    sys.exit(1 if different or kills < arguments.kills else 0)


if __name__ == "__main__":
    main()
