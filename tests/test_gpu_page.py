"""The tables of docs/gpu.md are those of the result files, its commands exist, and results of any kind can be drawn."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
MARKS = re.findall(r"<!-- ([\w-]+):start -->", PAGE)
VERSIONS = {"python": "3.12", "torch": "2.11", "triton": "3.6", "transformers": "5.17", "flash-linear-attention": None}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    return gpu_report


def synthetic_results(report, tmp_path: Path) -> dict:
    """Results of one card: a run that was cut short, with rows of every kind."""
    header = {"device": "Some GPU", "small": False, "versions": VERSIONS}
    limits = {"product_gflops": {"bfloat16": 7e5}, "copy_bytes_per_s": 3e12}
    op = {"pass": "forward", "tokens": 16384, "batch": 1, "features": 128}
    time = {"median_s": 5e-4, "floor_s": 5e-5, "of_floor": 10.0, "relative_error": {"o": 2e-3}}
    target = {"name": "speed", "target": ">= 4", "measured": 3.6, "met": False}
    rows = [
        op | {"features": None, "variant": "flash", "median_s": 1.8e-3},
        op | {"variant": "dijiang"} | time,
        op | {"variant": "dijiang", "tokens": 2048} | time,
        op | {"variant": "fla", "left_out": "not installed | anywhere"},
        op | {"pass": "parts", "variant": "maps", "median_s": 1e-4},
        op | {"pass": "forward + backward", "variant": "torch"} | time,
    ]
    step = {"phase": "decode", "shape": "pythia-70m", "batch": 32, "context": 2048}
    speed = {"median_s": 1e-3, "tokens_per_s": 32000.0, "peak_bytes": 1 << 30}
    model = [
        step | {"contender": "softmax"} | speed,
        step | {"contender": "dijiang graph", "context": 512} | speed,
        step | {"contender": "dijiang graph"} | speed | {"tokens_per_s": 96000.0},
        step | {"contender": "softmax static", "error": "RuntimeError: no"},
        step | {"phase": "prefill", "contender": "dijiang", "flex_attention": "ValueError: no"} | speed,
        step | {"phase": "prefill", "contender": "softmax", "left_out": "the GPU's memory ran out"},
    ]
    counts = {"collected": 3, "passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    details = [{"test": "tests/x.py::y", "outcome": "failed", "reason": "assert 1 == 2"}]
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    perplexity = {"baseline": {"1024": {"all": 99.8}}, "student": {"1024": {"all": 1.1}, "4096": {"all": 1.2}}}
    recall = {"needle": {"1024": {"share": 0.5, "chance": 0.1}}}
    recovery = {
        "recipe": "smollm2-135m-linear",
        "tokens": 50_000_000,
        "tokens_per_s": 2e5,
        "share_of_measured_peak": 0.31,
        "perplexity_ratio": perplexity,
        "quality": {"teacher": {"recall": recall}},
        "training_step": [{"stage": "distill", "name": "eager, fla", "left_out": "not there"}],
    }
    results = {
        "recovery_linear": header | {"complete": False} | recovery,
        "tests": header | counts | {"details": details},
        "op": header | {"limits": limits, "rows": rows, "targets": [target]},
        "model": header | {"limits": limits, "rows": model, "targets": []},
    }
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    return report.load(tmp_path)


def part(page: str, mark: str) -> str:
    return page.split(f"<!-- {mark}:start -->\n")[1].split(f"\n<!-- {mark}:end -->")[0]


def test_corpus_page_is_that_of_the_corpus(report):
    page = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    assert report.fill_corpus(page) == page
    facts = json.loads((report.GPU_RESULTS / "corpus.json").read_text(encoding="utf-8"))
    assert facts["tokens"] == sum(entry["tokens"] for entry in facts["sources"]) > 30_000_000
    assert all(entry["licence"] and entry["version"] for entry in facts["sources"])


def test_sources_of_the_corpus_are_drawn(report):
    entry = {"package": "a", "version": "1", "licence": "GPL|MIT", "documents": 2, "tokens": 3000}
    facts = {"sources": [entry | {"held_out": None, "held_out_tokens": 0}], "documents": 2, "tokens": 3000}
    assert "| a | 1 | GPL/MIT | 2 | 3,000 |  |  |" in report.corpus_table(facts | {"held_out_tokens": 0})


def test_tables_are_those_of_the_results(report):
    assert report.fill(PAGE, report.load()) == PAGE
    assert len(MARKS) == len(set(MARKS)) == 14


def test_without_results_every_table_says_so(report):
    page = report.fill(PAGE, {})
    assert {part(page, mark) for mark in MARKS} == {"Not measured yet."}


def test_results_that_were_cut_short_are_drawn(report, tmp_path):
    results = synthetic_results(report, tmp_path)
    page = report.fill(PAGE, results)
    assert "| Some GPU | 700 | 3.00 | 2.11 | 3.6 | 5.17 | none |" in part(page, "cards")
    assert "| Some GPU | 1 | 1 | 0 | 1 | no, stopped at its limit |" in part(page, "gpu-tests")
    assert "* Some GPU: `tests/x.py::y`: assert 1 == 2" in part(page, "gpu-tests")
    forward = "| Some GPU | 16,384 | 1 | 128 | 1.80 | 0.50 | - | - | - | 3.60 | 10.00 | dijiang |"
    assert forward in part(page, "op-forward")
    assert "| 2,048 | 1 | 128 | - | 0.50 | - | - | - | - | 10.00 | dijiang |" in part(page, "op-forward")
    assert "| - | - | - | 0.50 | - | 10.00 | torch |" in part(page, "op-backward")
    assert "| Some GPU | 128 | dijiang | 0.500 | 3.60 | 10.00 | 2.0e-03 |  |" in part(page, "op-variants")
    assert "| Some GPU | 128 | part: maps | 0.100 | - | - | - |  |" in part(page, "op-variants")
    assert "| not installed   anywhere |" in part(page, "op-variants")
    assert "| pythia-70m | 32 | 32,000 | - | - | - | 96,000 | 3.00 | - | 1.28 |  |" in part(page, "decode")
    assert "| pythia-70m | 32 | 512 | - | - | 32,000 | - | - | 1,024 |" in part(page, "lengths")
    assert "| pythia-70m | 32 | 2,048 | - | 1.00 | - | ValueError: no |" in part(page, "prefill")
    assert "| speed | Some GPU | >= 4 | 3.60 | no |" in part(page, "targets")
    row = "| smollm2-135m-linear | Some GPU | 50,000,000 | 200,000 | 31.0% | 99.800 | - | 1.100 | 1.200 | no |"
    assert row in part(page, "recovery")
    assert "| smollm2-135m-linear | Some GPU | needle | 1,024 | 0.50 | - | 0.10 |" in part(page, "recall")
    assert "| distill | eager, fla | - | - | - | not there |" in part(page, "training-speed")
    assert "at 1,024 tokens | Some GPU | <= 1.15 | 1.10 | yes |" in part(page, "targets")
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_commands_of_the_page_exist():
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M)[0].splitlines()]
    assert len(lines) == 6
    calls = ([str(ROOT / "scripts" / "gpu" / "run.sh")], [sys.executable, str(ROOT / "scripts" / "gpu" / "programme.py")])
    usage = "".join(subprocess.run([*call, "--help"], capture_output=True, text=True, check=True).stdout for call in calls)
    for program, *words in lines:
        path = ROOT / (words[0] if program == "python" else program)
        assert path.is_file(), path
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z]+", usage))
