"""
The recall benchmark: many students of one teacher, none of them trained, that differ in what they remember. Rankings of heads
and fitted scores are made once and kept, so that an interrupted run continues.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dijiang.checkpoint.provenance import public_name
from dijiang.common.outputs import write_text_whole, write_whole
from dijiang.common.result_cache import cache_folder, code_fingerprint, hash_of
from dijiang.convert import PRESETS, load_source
from dijiang.convert.families import open_convertible
from dijiang.convert.fitting.fit import FitSettings, FittedScores, fit_memory
from dijiang.convert.memories import with_memories
from dijiang.convert.selection.selection import Selection, full_heads_of
from dijiang.evaluate.quality.variants import file_hashes
from dijiang.evaluate.recall_frontier.config import FrontierConfig
from dijiang.evaluate.recall_frontier.configurations import RECALL, Configuration, configurations
from dijiang.evaluate.recall_frontier.run import Teacher, run_frontier
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.memory_scores import MEMORY_SCORES
from dijiang.train.memories.branch import start_branches
from dijiang.train.memories.config import MOST_SLOTS, FitConfig, SelectConfig
from dijiang.train.memories.material import context_of, fit_rows, read_texts
from dijiang.train.memories.run import keep_heads

MAKING_CODE = (
    "dijiang.convert", "dijiang.modeling", "dijiang.train.memories", "dijiang.train.stages.calibrate",
    "dijiang.train.data.synthetic_recall",
)  # fmt: skip
PURSUED = 18  # heads that are ranked one after another, at most


class Students:
    """
    Makes the students of a benchmark.

    Args:
        teacher: softmax model in our decoder.
        tokenizer: its tokenizer.
        texts: UTF-8 files to select heads and fit scores on; none of them may be measured on.
        select: how heads are ranked.
        fit: how scores are fitted.
        folder: where rankings and scores are kept.
    """

    def __init__(
        self,
        teacher: DiJiangForCausalLM,
        tokenizer: Any,
        texts: Sequence[str | Path],
        select: SelectConfig,
        fit: FitConfig,
        folder: Path,
        *,
        progress: bool = True,
    ):
        self.teacher, self.tokenizer = teacher, tokenizer
        self.text = read_texts(tokenizer, texts).tokens
        self.select, self.fit = select, fit
        self.folder, self.progress = folder, progress
        self.context = context_of(teacher.config)
        self.base = with_memories(teacher, **{"layer_types": "linear_attention"} | PRESETS["recommended"])

    def identity(self) -> dict[str, Any]:
        """What rankings and scores depend on besides the teacher's weights."""
        return {
            "select": asdict(self.select),
            "fit": asdict(self.fit),
            "text": hash_of(self.text.numpy().tobytes()),
            "code": code_fingerprint(*MAKING_CODE),
        }

    def ranking(self, method: str, draw: int = 0, heads: int | None = None) -> Selection:
        """All heads in the order in which `method` keeps them; `uniform` spreads its layers for a number of heads."""
        own = method == "uniform" and heads is not None
        path = self.folder / f"selection-{method}-{heads if own else draw}.json"
        if path.is_file():
            return Selection.from_json(json.loads(path.read_text(encoding="utf-8")))
        chosen = self.select.method if method == RECALL else method
        config = replace(self.select, method=chosen, seed=self.select.seed + draw)
        config = replace(config, heads=heads) if own else config
        selection, _ = keep_heads(self.base, self.tokenizer, self.text, config, context=self.context, progress=self.progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, json.dumps(selection.to_json(), indent=1) + "\n")
        return selection

    @cached_property
    def fitted(self) -> FittedScores:
        """Scores of all heads, and what slots are spread by."""
        weights, facts = self.folder / "scores.safetensors", self.folder / "memory_fit.json"
        if not facts.is_file():
            rows = fit_rows(self.tokenizer, self.text, self.fit, self.context)
            settings = FitSettings(recall_share=self.fit.recall_share, steps=self.fit.steps, seed=self.fit.seed)
            fitted = fit_memory(self.base, self.teacher, rows, settings, progress=self.progress)
            self.folder.mkdir(parents=True, exist_ok=True)
            scores = {name: x.detach().contiguous() for name, x in fitted.model.named_parameters() if "memory_score" in name}
            write_whole(weights, lambda draft: save_file(scores, draft))
            write_text_whole(facts, json.dumps(fitted.facts, indent=1) + "\n")
            return fitted
        model = with_memories(self.base, attention_memory=1, memory_score="learned")
        model.load_state_dict(load_file(weights), strict=False)
        content = json.loads(facts.read_text(encoding="utf-8"))
        curves = {(layer, head): errors for layer, head, errors in content["errors"]}
        return FittedScores(model=model, curves=curves, facts=content)

    def build(self, item: Configuration) -> DiJiangForCausalLM:
        """The student of a configuration, its linear branch started if `fit` says so."""
        model = self.with_memories_of(item)
        if self.fit.linear_branch:
            rows = fit_rows(self.tokenizer, self.text, self.fit, self.context)
            start_branches(model, self.teacher, rows[0].input_ids)
        return model

    def with_memories_of(self, item: Configuration) -> DiJiangForCausalLM:
        """The student of a configuration, its linear branch silent."""
        full = [[] for _ in range(self.base.config.num_hidden_layers)]
        if item.full_heads:
            full = full_heads_of(self.ranking(item.selection, item.draw, item.full_heads), item.full_heads)
        window = {"attention_window": item.attention_window, "attention_sinks": item.attention_sinks}
        if not item.attention_memory:
            return with_memories(self.base, full_heads=full, **window)
        if item.memory_score != "learned" and not item.spread:
            slots = {"attention_memory": item.attention_memory, "memory_score": item.memory_score}
            return with_memories(self.base, full_heads=full, **slots, **window)
        large = tuple((layer, head) for layer, heads in enumerate(full) for head in heads) if item.large_slots else ()
        settings = FitSettings(
            slots=item.attention_memory, spread=item.spread, large_heads=large, large_slots=item.large_slots or 0,
            least_slots=min(self.fit.least_slots, item.attention_memory),
        )  # fmt: skip
        model = self.fitted.with_slots(settings, [[] for _ in full] if large else full)
        return with_memories(model, memory_score=item.memory_score, **window)


def refuse_impossible(chosen: Sequence[Configuration], there: int) -> None:
    """Raise ValueError if a model with `there` key/value heads cannot have one of these; nothing has been measured yet."""
    for item in chosen:
        if item.full_heads > there:
            raise ValueError(f"{item.name!r} keeps more than the {there} key/value heads of the model; give fewer heads")
        if item.memory_score not in MEMORY_SCORES:
            raise ValueError(f"scores holds {item.memory_score!r}; choose from {', '.join(MEMORY_SCORES)}")
        if item.spread and item.attention_memory > MOST_SLOTS:
            raise ValueError(f"{item.name!r} spreads more than {MOST_SLOTS} slots a head; give fewer slots")


def run_recall_benchmark(  # noqa: PLR0913
    source: str | Path,
    config: FrontierConfig,
    *,
    fit_texts: Sequence[str | Path],
    select: SelectConfig | None = None,
    fit: FitConfig | None = None,
    only: Sequence[Configuration] | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Measure what a model recalls, and its perplexity, with memories of many sizes, without training it.

    Args:
        source: the softmax model: hub id, folder or GGUF file.
        config: what is measured.
        fit_texts: UTF-8 files to select heads and fit scores on.
        select: how heads are ranked; by default one after another, up to the most heads that are asked for or `PURSUED`. The
            heads behind these follow by the score that they have then.
        fit: how scores are fitted; by default with a start of the linear branch.
        only: the configurations to measure; default `configurations(config)`.
        output: new JSON file for the result.
        plot: new PNG file for its plot.
        cache: folder of scores, rankings and fits; default `~/.cache/dijiang/recall-frontier`.
        progress: show progress on stderr.

    Returns:
        The content of `output`.

    Raises:
        ValueError: what `run_frontier` and `load_source` raise.
    """
    opened = open_convertible(source)
    teacher, tokenizer = load_source(source, dtype=torch.float32)
    teacher.requires_grad_(False)
    hashes = file_hashes(opened)
    folder = cache or cache_folder("recall-frontier")
    there = teacher.config.num_hidden_layers * teacher.config.num_key_value_heads
    refuse_impossible(configurations(config) if only is None else only, there)
    # the number does not depend on what is asked for, so that more configurations later find the cells of earlier ones
    select, fit = select or SelectConfig(heads=min(there, PURSUED)), fit or FitConfig(linear_branch=True)
    students = Students(teacher, tokenizer, fit_texts, select, fit, folder, progress=progress)
    identity = students.identity()
    facts = {"teacher": hashes, **identity}
    students.folder = folder / f"prepared-{hash_of(json.dumps(facts, sort_keys=True).encode())[:16]}"
    measured = Teacher(model=teacher, tokenizer=tokenizer, name=public_name(source), identity=facts)
    options: dict[str, Any] = {"only": only, "output": output, "plot": plot, "cache": folder, "progress": progress}
    return run_frontier(measured, students.build, config, **options)
