"""The package as a whole: the front door, the rooms' import arrows, the wheel and the demo's text."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
spec = importlib.util.spec_from_file_location("import_arrows", ROOT / "scripts" / "import_arrows.py")
import_arrows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_arrows)
PACKAGES = {folder: package for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}


def python(code: str, cwd: Path) -> str:
    """Runs code in a fresh process, away from the source tree, and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the front door ---


def test_import_needs_no_torch(tmp_path):
    light = "dijiang, dijiang.cli, dijiang.compress.oneshot.config, dijiang.evaluate.quality.config"
    heavy = ("torch", "transformers", "scipy", "matplotlib", "dijiang.modeling")
    code = f"import sys, {light}; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, tmp_path) == "[]"


def test_public_names(tmp_path):
    code = "import dijiang; [getattr(dijiang, name) for name in dijiang.__all__]; assert {*dijiang.__all__} <= {*dir(dijiang)}"
    python(code, tmp_path)


def test_unknown_name():
    import dijiang

    for module in (dijiang, dijiang.train, dijiang.evaluate):
        with pytest.raises(AttributeError, match=rf"'{module.__name__}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_names_of_training():
    import dijiang
    from dijiang.train.recipe import load
    from dijiang.train.stages import run

    assert {"load_recipe", "recover", "run_stage"} <= {*dijiang.__all__} and "align" not in dijiang.__all__
    assert (dijiang.load_recipe, dijiang.recover, dijiang.run_stage) == (load.load_recipe, run.recover, run.run_stage)
    assert {"recover", "run_stage"} <= {*dijiang.train.__all__}


def test_recipes_and_estimates_need_no_package_of_training(tmp_path):
    code = """
import sys
sys.modules |= dict.fromkeys(["accelerate", "datasets", "deepspeed", "peft", "tensorboard"])
import dijiang
from dijiang.train.estimate.estimate import estimate
print(estimate(dijiang.load_recipe("smollm2-135m")).gpu)
"""
    assert python(code, tmp_path) == "h100"


ORDERS_OF_IMPORT = [
    "import dijiang, transformers",
    "import transformers, dijiang",
    "import dijiang; from transformers import AutoModelForCausalLM",  # modeling_auto is the outermost import
    "import dijiang; from transformers import LlamaForCausalLM",  # the auto classes are loaded in passing
    "from transformers import AutoConfig; import dijiang",  # they are loaded already
    "import dijiang.modeling",  # our own import loads them
    "from dijiang import DiJiangConfig",
]


def test_auto_classes_know_dijiang(tmp_path):
    """In a process for each order, forked from one that has imported torch, which takes longest, and nothing else."""
    code = f"""
import os, sys, torch
for imports in {ORDERS_OF_IMPORT!r}:
    child = os.fork()
    if not child:
        try:
            exec(imports)
            import transformers
            config = transformers.AutoConfig.for_model("dijiang")
            found = type(config).__name__, transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
            assert found == ("DiJiangConfig", "DiJiangForCausalLM"), found
            assert not any(type(finder).__module__ == "dijiang._register" for finder in sys.meta_path)
            print(imports, flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""
    assert python(code, tmp_path).splitlines() == ORDERS_OF_IMPORT


def test_transformers_alone_stays_light(tmp_path):
    assert python("import dijiang, transformers, sys; print('dijiang.modeling' in sys.modules)", tmp_path) == "False"


# --- the rooms ---


def test_rooms_import_along_the_arrows_and_files_in_no_circle():
    assert import_arrows.violations(import_arrows.modules()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("common", "from dijiang.checkpoint.source import open_source"),
        ("checkpoint", "from dijiang.convert.families import FAMILIES"),
        ("modeling", "import dijiang.modeling.feature_maps"),
        ("modeling", "from dijiang.convert import convert_model"),
        ("modeling", "from ..convert import convert_model"),
        ("modeling", "from . import feature_maps"),
        ("modeling", "from .maps.cosine import Cosine"),
        ("modeling", "def f():\n    import numpy"),
        ("modeling", "import fla"),
        ("modeling", "try:\n    pass\nexcept ImportError:\n    import fla"),
        ("modeling", "import triton.language as tl"),
        ("modeling", "def f():\n    import triton"),
        ("modeling", "try:\n    pass\nexcept ImportError:\n    from triton import jit"),
        ("convert", "from dijiang import __version__"),
        ("convert", "from dijiang import train"),
        ("convert", "from ..train.stages import recover"),
        ("train", "from dijiang.evaluate import perplexity"),
        ("evaluate", "if True:\n    import dijiang.train"),
        ("compress", "from dijiang.evaluate import perplexity"),
        ("compress", "from dijiang.convert import load_source"),
    ],
)
def test_arrows_are_seen_to_be_broken(room, source):
    assert import_arrows.broken_arrows(source, room, PACKAGES[room])


@pytest.mark.parametrize(
    ("graph", "circle"),
    [
        ({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}, ["b", "c", "d", "b"]),
    ],
)
def test_circles_are_seen(graph, circle):
    assert import_arrows.circles(graph) == [circle]
    assert import_arrows.circles({name: targets - {"a", "b"} for name, targets in graph.items()}) == []


def test_imports_inside_functions_make_no_circle(tmp_path):
    for name, source in {
        "a": "from dijiang.b import x",
        "b": "def f():\n    from dijiang import a\nif TYPE_CHECKING:\n    import dijiang.a",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    files = {f"dijiang.{name}": tmp_path / f"{name}.py" for name in "ab"}
    assert import_arrows.file_graph(files) == {"dijiang.a": {"dijiang.b"}, "dijiang.b": set()}


def test_modeling_is_flat():
    assert [p.name for p in (ROOT / "modeling").iterdir() if p.is_dir() and p.name != "__pycache__"] == []


# --- the wheel ---


def test_wheel_holds_every_room_the_configs_and_the_data(tmp_path):
    assert {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests"} == set(PACKAGES)
    packages = {
        ".".join([package, *init.relative_to(ROOT / folder).parent.parts])
        for folder, package in PACKAGES.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages
    assert set(PACKAGES) == {*import_arrows.ARROWS, "dijiang"}

    tree = tmp_path / "tree"  # a copy: the build leaves litter
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    expected = set()
    for folder, package in PACKAGES.items():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
        files = [p.relative_to(tree / folder) for p in (tree / folder).rglob("*") if p.is_file()]
        expected |= {f"{package.replace('.', '/')}/{file.as_posix()}" for file in files}
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"dijiang/modeling/__init__.py", "dijiang/configs/__init__.py", "dijiang/data/jargon_train.txt"} <= held


# --- the demo's text ---


def test_held_out_text_is_held_out():
    sides = {}
    for side in ("train", "heldout"):
        text = (ROOT / "dijiang" / "data" / f"jargon_{side}.txt").read_text(encoding="utf-8")
        sides[side] = [p.strip() for p in text.split("\n\n")]
        assert all(sides[side]), "an empty paragraph"
    assert not set(sides["train"]) & set(sides["heldout"])
    share = sum(map(len, sides["heldout"])) / sum(len(p) for side in sides.values() for p in side)
    assert 0.08 < share < 0.12
