"""
What SmolLM2-135M recalls with memories of several sizes, none of it trained: the configurations of docs/memory.md.

    python benchmarks/recall.py STUDY --text HELD_OUT [--text ...] [--output RESULT.json] [--plot RESULT.png] [--part I/N]

Studies: `frontier`, all kinds of recall and perplexity of several configurations; `controls`, the same of other ways to
choose heads and tokens, all with a silent linear branch; `lengths`, needle and associative recall with 48 samples a cell;
`far`, needle and perplexity to 8,192 tokens, which is as far as the source was made for. Heads are selected and scores
fitted on the package's own training text. Every cell is kept in the cache of `dijiang benchmark recall` as it comes, so the
same command continues after an interruption; --checkpoint measures a checkpoint, for example a trained one, in place of a
study's configurations; --part measures every N-th configuration, so that N processes share the work. The recorded runs used
the held-out sides of the Jargon File (in the package) and of debian-handbook and anarchism by scripts/make_recovery_text.py.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from dijiang.bundled import TRAIN_TEXT, packaged_model
from dijiang.checkpoint.provenance import public_name
from dijiang.checkpoint.source import open_source
from dijiang.convert import load_source
from dijiang.convert.families import open_convertible
from dijiang.evaluate.quality.variants import file_hashes
from dijiang.evaluate.recall_frontier.config import FrontierConfig
from dijiang.evaluate.recall_frontier.configurations import Configuration
from dijiang.evaluate.recall_frontier.report import frontier_page
from dijiang.evaluate.recall_frontier.run import Teacher, run_frontier
from dijiang.recall_benchmark import run_recall_benchmark
from dijiang.train.memories.config import FitConfig, SelectConfig

KEPT = Configuration(name="7 heads + 128 slots", full_heads=7, attention_memory=128)
SILENT = replace(KEPT, name="7 heads + 128 slots, no linear branch", linear_branch=False)
CONSTANT = replace(KEPT, name="7 heads of 2000 slots + 192 slots", large_slots=2000, attention_memory=192)
FRONTIER = {"recall_lengths": (1024,), "recall_samples": 8, "text_tokens": 4096}

CONSTANT_SILENT = replace(CONSTANT, name=f"{CONSTANT.name}, no linear branch", linear_branch=False)


def control(name: str, **facts) -> Configuration:
    """A configuration that is there to compare with."""
    return Configuration(name=name, control=True, **facts)


STUDIES: dict[str, tuple[dict, list[Configuration]]] = {
    "frontier": (
        FRONTIER,
        [
            KEPT,
            SILENT,
            CONSTANT,
            CONSTANT_SILENT,
            Configuration(name="7 heads", full_heads=7),
            Configuration(name="window 64", linear_branch=False),
        ],
    ),
    "controls": (
        FRONTIER | {"recall_kinds": ("needle", "associative recall", "copied span")},
        [
            Configuration(name="128 slots", attention_memory=128),
            control("window 192", attention_window=192),
            *(control(f"7 heads by {name}", full_heads=7, selection=name) for name in ("random", "uniform", "perplexity")),
            *(
                control(
                    f"7 heads + 128 slots in every head by {name}",
                    full_heads=7,
                    attention_memory=128,
                    memory_score=name,
                    spread=False,
                )
                for name in ("learned", "window_attention", "self_recall", "key_norm", "key_diff", "random")
            ),
        ],
    ),
    "lengths": (
        {
            "recall_kinds": ("needle", "associative recall"),
            "recall_lengths": (256, 512, 1024),
            "recall_samples": 48,
            "text_tokens": 4096,
        },
        [KEPT, SILENT, CONSTANT],
    ),
    "far": (
        {
            "recall_kinds": ("needle",),
            "recall_lengths": (4096, 8192),
            "recall_samples": 8,
            "text_tokens": 8192,
            "lengths": (8192,),
        },
        [KEPT, CONSTANT],
    ),
}


def run_of_checkpoint(folder: Path, config: FrontierConfig, **options) -> dict:
    """The same measurements of a checkpoint of the same source, trained or not, beside the source."""
    source = packaged_model()
    teacher, tokenizer = load_source(source, dtype=torch.float32)
    student, _ = load_source(folder, dtype=torch.float32)
    hashes = {"teacher": file_hashes(open_convertible(source)), "student": file_hashes(open_source(folder))}
    facts = student.config
    slots = [x for i in range(facts.num_hidden_layers) for x in facts.memory_slots(i) if x]
    item = Configuration(
        name="trained", full_heads=sum(map(len, facts.full_heads)), attention_memory=round(sum(slots) / max(len(slots), 1))
    )
    named = Teacher(model=teacher, tokenizer=tokenizer, name=public_name(source), identity=hashes)
    return run_frontier(named, lambda _: student, config, only=[item], **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out UTF-8 text; repeatable")
    parser.add_argument("--output", type=Path, help="new JSON file")
    parser.add_argument("--plot", type=Path, help="new PNG file")
    parser.add_argument("--cache", type=Path, help="folder of partial results")
    parser.add_argument("--checkpoint", type=Path, help="measure this folder in place of the study's configurations")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts of the configurations")
    arguments = parser.parse_args()
    settings, chosen = STUDIES[arguments.study]
    part, parts = map(int, arguments.part.split("/"))
    config = FrontierConfig(texts=tuple(arguments.text), **settings)
    names = {"output": arguments.output, "plot": arguments.plot, "cache": arguments.cache, "progress": os.isatty(2)}
    if arguments.checkpoint:
        result = run_of_checkpoint(arguments.checkpoint, config, **names)
    else:
        result = run_recall_benchmark(
            packaged_model(),
            config,
            fit_texts=[TRAIN_TEXT],
            select=SelectConfig(),
            fit=FitConfig(linear_branch=arguments.study != "controls"),
            only=chosen[part - 1 :: parts],
            **names,
        )
    print(frontier_page(result))


if __name__ == "__main__":
    main()
