"""
The GPU programme: steps in the order of their value, each in a process of its own with a time limit.

    python scripts/gpu/programme.py [--data DATA] [--results FOLDER] [--small] [--only STEP...] [--limit STEP=S] [--fresh]

Each step writes RESULTS/<step>.json after every measurement, and RESULTS/<step>.log. A step is passed over if its JSON says
that it is complete, so the command can be called again, or if its inputs have not arrived. A step past its limit gets SIGTERM,
then SIGKILL, and the next one begins.

Exit code 0 if every step is done, was passed over, or wrote a JSON before its limit; else 1.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS_FOLDER = Path(__file__).resolve().parent / "steps"
AGAIN = 75  # exit code of a step that asks for another process, because the GPU no longer works in its own
STOPPED = "stopped"
GRACE_S = 10  # between SIGTERM and SIGKILL
SMALL_RESULTS = "runs/gpu-small"


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    One step.

    Attributes:
        name: of its JSON and of its log.
        seconds: time limit.
        small_seconds: time limit in a small run; None if it is not part of one.
        script: name of the file in steps/; default: `name`.
        words: options of the script.
        inputs: required files and folders below DATA; a small run needs none.
    """

    name: str
    seconds: float
    small_seconds: float | None
    script: str = ""
    words: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return STEPS_FOLDER / f"{self.script or self.name}.py"


TRAIN = tuple(f"corpus/train/{name}" for name in ("tokens.bin", "starts.bin", "meta.json"))
RECOVERY = {"script": "recovery", "inputs": ("weights", *TRAIN, "corpus/held"), "seconds": 300}
STEPS = (
    Step(name="tests", seconds=60, small_seconds=90),
    Step(name="op", seconds=90, small_seconds=120),
    Step(name="model", seconds=120, small_seconds=120),
    Step(name="recovery_linear", small_seconds=120, **RECOVERY),
    Step(name="recovery_window", small_seconds=None, words=("--recipe", "smollm2-135m"), **RECOVERY),
)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options; SystemExit with one line on unknown steps and malformed limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "gpu-parcel" / "data", help="folder of weights, corpus and wheels")
    parser.add_argument("--results", type=Path, help=f"default: benchmarks/results/gpu/<device>, {SMALL_RESULTS} if --small")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to try the programme")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone")
    parser.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS", help="another time limit")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results of these steps")
    options = parser.parse_args(words)
    names = [step.name for step in STEPS]
    limits = {}
    for limit in options.limit:
        name, _, seconds = limit.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise SystemExit(f"--limit {limit}: give a step and its seconds, as in --limit op=120")
        limits[name] = float(seconds)
    if unknown := [name for name in (*options.only, *limits) if name not in names]:
        raise SystemExit(f"step {unknown[0]!r} is unknown; choose from {', '.join(names)}")
    options.limit = limits
    return options


def default_results(small: bool) -> Path:
    """A folder named after the GPU, or that of small runs; SystemExit if there is no GPU and the run is not small."""
    if small:
        return ROOT / SMALL_RESULTS
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; to try the programme on a CPU, add --small")
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / "gpu" / slug


def read_json(path: Path) -> dict:
    """The object in a file; empty if there is no file or it is not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def why_passed_over(step: Step, options: argparse.Namespace) -> str | None:
    """The reason why a step does not run now, or None."""
    if not step.path.is_file():
        return "passed over: the step is not there"
    if options.small and step.small_seconds is None:
        return "passed over: no part of a small run"
    earlier = read_json(options.results / f"{step.name}.json")
    if earlier.get("complete") and earlier.get("small") == options.small:
        return "passed over: complete already"
    missing = [name for name in step.inputs if not options.small and not (options.data / name).exists()]
    return f"passed over: {', '.join(missing)} not there yet" if missing else None


def run_step(step: Step, options: argparse.Namespace, limit: float) -> str:
    """Run a step until it ends or reaches its limit, and return the outcome in words."""
    output = options.results / f"{step.name}.json"
    before = output.stat().st_mtime_ns if output.is_file() else None
    command = [sys.executable, str(step.path), *step.words, "--data", str(options.data)]
    command += ["--results", str(options.results), "--seconds", str(limit), *(["--small"] if options.small else [])]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment |= os.environ | {"STEP_STARTED": repr(time.time())}
    until = time.monotonic() + limit
    code = AGAIN
    with open(options.results / f"{step.name}.log", "ab") as log:
        while code == AGAIN and time.monotonic() < until:
            # in another folder, because with the repository's on the path `import evaluate` would find our room
            streams = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(command, cwd=options.results, env=environment, start_new_session=True, **streams)
            try:
                code = process.wait(timeout=until - time.monotonic())
            except subprocess.TimeoutExpired:
                code = STOPPED
            finally:  # also when this process gets SIGTERM
                end_group(process)
    written = output.is_file() and output.stat().st_mtime_ns != before and bool(read_json(output))
    if code in (STOPPED, AGAIN):
        return "stopped at its limit" if written else "FAILED: stopped at its limit without a JSON"
    if code or not written:
        reason = f"exit code {code}" if code else "no JSON was written"
        return f"FAILED: {reason}; {step.name}.log ends with: {last_line(options.results / f'{step.name}.log')}"
    return "done" if read_json(output).get("complete") else "out of time; call again for the rest"


def end_group(process: subprocess.Popen) -> None:
    """Send SIGTERM to a process and its children unless it has ended, and SIGKILL to the remaining ones after GRACE_S."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "(nothing)"


def print_targets(results: Path, names: list[str]) -> None:
    """Print the targets that the steps have measured."""
    lines = [line for name in names for line in read_json(results / f"{name}.json").get("targets", [])]
    for line in lines:
        print(f"{'met' if line['met'] else 'MISSED':<7} {line['name']}: {line['measured']:.2f}, aimed for {line['target']}")


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step is ended too
    default = default_results(options.small)  # called in any case, because it refuses machines without a GPU
    options.results = (options.results or default).resolve()
    options.data = options.data.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    table = []
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        if options.fresh:
            for suffix in ("json", "log"):
                (options.results / f"{step.name}.{suffix}").unlink(missing_ok=True)
        began = time.monotonic()
        limit = options.limit.get(step.name, step.small_seconds if options.small else step.seconds)
        state = why_passed_over(step, options)
        if state is None:
            print(f"{step.name}: at most {limit:g} s", flush=True)
            state = run_step(step, options, limit)
        table.append((step.name, time.monotonic() - began, state))
        print(f"{step.name}: {state}", flush=True)
    print(f"\n{'step':<16}{'seconds':>8}  state")
    for name, seconds, state in table:
        print(f"{name:<16}{seconds:>8.1f}  {state}")
    print_targets(options.results, [name for name, _, _ in table])
    sys.exit(any(state.startswith("FAILED") for _, _, state in table))


if __name__ == "__main__":
    main()
