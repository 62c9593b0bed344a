"""
Kill a recovery run with SIGKILL at ten random moments, let it end, and compare its weights with those of an undisturbed run.

    python scripts/kill_ten_times.py RECIPE FOLDER [--set KEY=VALUE ...] [--processes 2] [--kills 10] [--seed 0]

Both runs write below FOLDER. They need `run.save_every` well below the number of steps and a fixed `run.dtype`. Exits with 1
if a single bit differs. Moments fall into the start, into steps and into saves alike; where each fell is printed.
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


def command(given: argparse.Namespace, output: Path) -> list[str]:
    start = [sys.executable, "-m"]
    if given.processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = str(given.processes)
        start += ["torch.distributed.run", "--nproc-per-node", processes, "--master-port", port, "-m"]
    sets = [word for setting in (*given.set, f"output={output}") for word in ("--set", setting)]
    return [*start, "dijiang.train", given.recipe, *sets]


def steps_logged(output: Path, stages: list[str]) -> int:
    """Over all stages; the logs that a kill made void count until the run has gone on."""
    done = 0
    for stage in stages:
        lines = output / stage / "metrics.jsonl"
        if lines.is_file():
            steps = [json.loads(line)["step"] for line in lines.read_text().splitlines() if line.endswith("}")]
            done += max(steps, default=0)
    return done


def undisturbed(given: argparse.Namespace, output: Path, stages: list[str]) -> tuple[float, float]:
    """Run to the end; seconds until the first log, and from there to the end."""
    begun, first = time.monotonic(), None
    process = subprocess.Popen(command(given, output), stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and steps_logged(output, stages):
            first = time.monotonic()
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"the undisturbed run ended with {process.returncode}; run it alone to see why")
    return first - begun, time.monotonic() - first


def killed(given: argparse.Namespace, output: Path, seconds: float) -> bool:
    """Run for so long, then kill all its processes; False if it ended before."""
    process = subprocess.Popen(command(given, output), stderr=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        children = psutil.Process(process.pid).children(recursive=True)  # a launcher's, in sessions of their own
        for doomed in (process, *children):
            doomed.kill()
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
    given = parser.parse_args()
    stages = load_recipe(given.recipe, given.set).stages
    alone, disturbed = given.folder / "undisturbed", given.folder / "killed"
    startup, training = undisturbed(given, alone, stages)
    print(f"undisturbed: {startup:.1f} s to the first log, then {training:.1f} s")

    moments, kills = random.Random(given.seed), 0
    while kills < given.kills:
        seconds = startup * moments.uniform(0.4, 1.1) + training * moments.uniform(0.0, 2.0 / given.kills)
        if not killed(given, disturbed, seconds):
            print(f"ended before kill {kills + 1}; take a longer recipe")
            break
        kills += 1
        partial = [path.name for path in disturbed.glob("*/checkpoints/.partial-*")]
        print(f"kill {kills} after {seconds:.1f} s, at step {steps_logged(disturbed, stages)}{', saving' if partial else ''}")
    if (code := subprocess.run(command(given, disturbed), stderr=subprocess.DEVNULL).returncode) != 0:
        sys.exit(f"the last run ended with {code}; run it alone to see why")

    differ = 0
    for stage in stages:
        expected = {path.name: path for path in (alone / stage / "model").glob("*.safetensors")}
        assert expected, f"{alone / stage / 'model'} holds no weights"
        for name, path in expected.items():
            one, other = load_file(path), load_file(disturbed / stage / "model" / name)
            assert one.keys() == other.keys()
            differ += sum(not torch.equal(one[key], other[key]) for key in one)
    print(f"{kills} kills, {differ} tensors differ")
    sys.exit(1 if differ or kills < given.kills else 0)


if __name__ == "__main__":
    main()
