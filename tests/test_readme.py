"""The README's commands and snippets run as written, with a tiny model under the name they use."""

import json
import re
import sys
from functools import partial

from dijiang_testing.doc_commands import (
    LAUNCHERS,
    ROOT,
    blocks,
    exit_code,
    run,
    run_without_package,
    shell_lines,
    write_text,
)

from dijiang.evaluate.latency.timing import machine_limits
from dijiang.evaluate.report import tables
from dijiang.train import load_recipe
from dijiang.train.__main__ import parse_arguments

# options that make the commands train and measure less; everything else is as written
STAGE = {"tokens": 1024, "block_size": 512, "start_block_size": "null"}  # twice the widest window and more
BUDGET = [f"{stage}.{key}={value}" for stage in ("align", "distill") for key, value in STAGE.items()]
BUDGET.append("data.held_out_tokens=1024")
SMALLER = {
    "convert": ["--heads", "1"],
    "recover": [word for setting in BUDGET for word in ("--set", setting)],
    "evaluate": ["--quick", "--cache", "cache"],
    "prune": ["--samples", "4", "--cache", "cache"],
    "benchmark": ["--rounds", "1", "--phases", "decode"],
}
SHORTER = {"1024": "96", "4096": "192"}  # contexts of the latency benchmark
COMMANDS = ["convert", "convert", "estimate", "recover", "prune", "evaluate", "benchmark", "report", "card"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "benchmarks" / "results" / "demo"


def test_commands_and_snippets_work_as_written(make_source, tmp_path, monkeypatch):
    make_source(name="HuggingFaceTB/SmolLM2-135M", num_key_value_heads=2, max_position_embeddings=8192)
    for seed, name in enumerate(("book.txt", "other.txt")):
        write_text(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dijiang.evaluate.latency.measure.machine_limits", partial(machine_limits, quick=True))

    commands = [words for words in shell_lines(README) if words[0] == "dijiang"]
    assert [command[1] for command in commands] == COMMANDS
    for command in commands:
        smaller = SMALLER.get(command[1], []) if command[1] != "convert" or "--fit" in command else []
        words = [SHORTER.get(word, word) if command[1] == "benchmark" else word for word in command[1:]]
        assert not exit_code([*words, *smaller], monkeypatch), command

    use, convert = blocks(README, "python")
    assert run_without_package(use, tmp_path).startswith("A hacker is")

    for folder in ("smollm2-dijiang", "smollm2-recovered"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-by-command")
    assert "own = [" in convert
    small = convert.replace("own = [", f"own = [*{BUDGET}, ")
    (tmp_path / "convert.py").write_text(small, encoding="utf-8")
    run([sys.executable, "convert.py"], tmp_path)
    config = tmp_path / "smollm2-recovered" / "distill" / "model" / "config.json"
    assert '"attention_window": 128' in config.read_text(encoding="utf-8")


def test_launch_lines_are_of_recipes_and_options_that_exist():
    lines = [words for words in shell_lines(README) if words[0] in LAUNCHERS]
    assert {words[0] for words in lines} == {"deepspeed", "torchrun"}
    for words in lines:
        arguments = parse_arguments(words[words.index("dijiang.train") + 1 :])
        assert load_recipe(arguments.recipe, arguments.set).stages == ["align", "distill"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in shell_lines(README) if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def recorded(kind: str) -> dict:
    return json.loads((DEMO / f"{kind}.json").read_text(encoding="utf-8"))


def test_tables_are_those_of_the_recorded_demo_run():
    evaluation, latency, demo = (recorded(kind) for kind in ("evaluation", "latency", "demo"))
    for header, rows in (tables.score_table(evaluation), tables.decode_table(latency)):
        assert tables.markdown_table(header, rows) in README
    words = " ".join(README.split())
    assert (
        f"by `make demo ARGS=--full` in {demo['seconds']:.0f} s with a peak of {demo['peak_memory_bytes'] / 2**30:.1f} GiB"
        in words
    )
    stages = {stage["stage"]: stage for stage in evaluation["student"]["stages"]}
    for stage in ("align", "distill"):
        assert f"{stages[stage]['tokens']:,} tokens in {stages[stage]['seconds']:.0f} s" in words
    (perplexity,) = (task for task in evaluation["tasks"] if task["kind"] == "perplexity")
    assert f"wins back {perplexity['over_training_free']['value']:.0%} of what" in words
    assert f"without its linear branches the student has {perplexity['values']['window_only']['value']:.2f}." in words
    longest = [task["values"] for task in evaluation["tasks"] if task["kind"] == "recall" and "1,024" in task["name"]]
    assert len(longest) == 2 and "Recall is not won back" in words
    for values in longest:
        assert values["student"]["value"] < values["window_sinks"]["value"] + 0.1 < values["teacher"]["value"]


def test_memory_line_is_that_of_the_recorded_benchmark():
    rows = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))["rows"]
    peaks = {row["tokens"]: row["peak_bytes"] / 2**20 for row in rows if row["pass"] == "backward"}
    line = ", ".join(f"{peaks[tokens]:,.0f} MiB at {tokens:,} tokens" for tokens in sorted(peaks))
    assert line in " ".join(README.split())
    (state,) = {row["state_bytes"] for row in rows}
    assert f"{state:,} bytes" in README


def kernel_rows(recorded: dict) -> list[str]:
    """Milliseconds of SDPA, then of the op with m = 64 and m = 128 and how many times faster they are."""
    rows = []
    for r in recorded["forward"]:
        times = {name: 1e3 * x["median_s"] for name, x in r["timings"].items()}
        ours = [f"{times[name]:,.1f} ({r['ratios'][name]:.1f}x)" for name in ("softmax m=64", "softmax m=128")]
        rows.append(f"| {r['dtype']} | {r['tokens']:,} | {times['sdpa']:,.1f} | {ours[0]} | {ours[1]} |")
    return rows


def decode_rows(recorded: dict) -> list[str]:
    """Tokens per second of the LLaMA with its default and with a static cache, then ours; bytes of cache over state."""
    rows = []
    for r in recorded["decode"]:
        rates = [r["tokens_per_s"][name] for name in ("llama", "llama static", "dijiang")]
        shown = " | ".join(f"{rate:,.1f}" for rate in rates)
        rows.append(f"| {r['dtype']} | {r['batch']} | {r['tokens']:,} | {shown} | {r['cache_per_state']:,.1f}x |")
    return rows


def test_speeds_are_those_of_the_recorded_benchmarks():
    for name, render in (("attention", kernel_rows), ("model", decode_rows)):
        recorded = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for row in render(recorded):
            assert row in README, row
