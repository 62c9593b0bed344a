"""Checkpoint in, checkpoint out: selection of heads that keep every token, and the fit of the others' exact memory."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dijiang.checkpoint.code_files import with_newest_code
from dijiang.checkpoint.lineage import refuse_misfit, refuse_other_source
from dijiang.checkpoint.provenance import add_stage, public_name, read_provenance, write_provenance
from dijiang.checkpoint.source import load_tokenizer, open_source
from dijiang.common.errors import print_line
from dijiang.common.outputs import new_folder
from dijiang.common.progress import progress_bar
from dijiang.common.recall import RecallSample
from dijiang.convert import convert_model, load_source
from dijiang.convert.families import open_convertible
from dijiang.convert.fitting.fit import FitSettings, fit_memory
from dijiang.convert.memories import with_memories, write_with_memories
from dijiang.convert.selection.job import SelectionJob
from dijiang.convert.selection.methods import select_heads
from dijiang.convert.selection.selection import Selection, full_heads_of, heads_within
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

from .branch import start_branches
from .config import FitConfig, SelectConfig
from .material import Text, context_of, fit_rows, read_texts, selection_samples

SELECTION_FILE = "selection.json"
FIT_FILE = "memory_fit.json"
STEPPED = ("greedy", "layers")  # methods that look at some samples in each step
PURSUITS = (*STEPPED, "perplexity")  # that choose one head, or layer, after another
TEXT_ROWS, TEXT_LENGTH = 4, 512  # of plain text, for the methods that rank heads by it


def add_memories(
    checkpoint: str | Path,
    output: str | Path,
    *,
    teacher: str | Path,
    select: SelectConfig | None = None,
    fit: FitConfig | None = None,
    texts: Sequence[str | Path] | Text,
    progress: bool = True,
) -> Path:
    """
    Give a checkpoint memories that recall what its window lost, without training any weight of the model.

    Args:
        checkpoint: folder of a DiJiang checkpoint with a window.
        output: folder that does not exist yet, or is empty. It appears only when it is complete, with `selection.json` and
            `memory_fit.json`.
        teacher: the softmax model that the checkpoint was converted from.
        select: which heads keep every token; None: those that do already.
        fit: the exact memory of the others; None: the one that there is.
        texts: UTF-8 files to select and fit on, or their tokens.
        progress: show progress on stderr.

    Returns:
        The output folder.

    Raises:
        ValueError: if checkpoint, teacher, texts and settings do not fit each other; nothing is left on disk then.
    """
    source = open_source(checkpoint)
    if not source.is_dijiang:
        raise ValueError(f"{checkpoint} is no DiJiang checkpoint; make one with `dijiang convert`")
    provenance = read_provenance(source.folder)
    refuse_other_source(provenance, teacher)
    trained = [stage["stage"] for stage in provenance["stages"] if stage["stage"] in ("align", "distill")]
    if trained and fit is not None and fit.linear_branch:
        raise ValueError(f"{trained[-1]} has trained the linear branch already; keep it with `linear_branch=false`")
    with new_folder(output) as folder:
        student, tokenizer = load_source(source.folder, dtype=torch.float32)
        student.config.dtype = source.config.dtype  # of the stored weights, in which others will load the result
        teacher_model, _ = load_source(teacher, dtype=torch.float32)
        refuse_misfit(student, teacher_model, teacher)
        if select is not None:
            refuse_memories(teacher_model.config, select, fit)
        context = context_of(teacher_model.config)
        text, names = texts if isinstance(texts, Text) else read_texts(tokenizer, texts)
        if fit is not None:
            rows = rows_to_fit(student, tokenizer, text, fit, context)  # before the selection, which takes minutes
        model = student
        records: dict[str, Any] = {}
        if select is not None:
            selection, model = keep_heads(model, tokenizer, text, select, context=context, progress=progress)
            records[SELECTION_FILE] = selection.to_json()
            facts = {"config": asdict(select), "full_heads": model.config.full_heads, "seconds": selection.seconds}
            provenance = add_stage(provenance, "select", teacher=public_name(teacher), texts=names, **facts)
        if fit is not None:
            model, found = fit_slots(model, teacher_model, rows, fit, progress=progress)
            records[FIT_FILE] = found
            facts = {"config": asdict(fit), "fitted_tokens": found["tokens"], "seconds": found["seconds"]["all"]}
            provenance = add_stage(provenance, "fit", teacher=public_name(teacher), texts=names, **facts)
        write_with_memories(source.folder, folder, model)  # and what accompanies it, an earlier fit's record perhaps
        for name, record in records.items():
            write_json(folder / name, record)
        write_provenance(folder, with_newest_code(folder, provenance))
    return Path(output)


def refuse_memories(source: Any, select: SelectConfig | None, fit: FitConfig | None) -> None:
    """Raise ValueError if a source of this config cannot have these memories."""
    heads = getattr(source, "num_key_value_heads", None) or source.num_attention_heads
    if select is not None and select.bytes_per_token is None and select.heads > (there := source.num_hidden_layers * heads):
        raise ValueError(f"heads={select.heads} is more than the {there} key/value heads of the model")
    if select is None and fit is not None and fit.large_slots is not None:
        raise ValueError("constant memory gives its slots to chosen heads, and none is chosen; keep at least one")
    sliding, kept = getattr(source, "sliding_window", None), fit is None or fit.large_slots is None
    if select is not None and kept and sliding and sliding < source.max_position_embeddings:
        raise ValueError(
            f"heads that keep every token would see more than the source's last sliding_window={sliding:,} tokens; give them "
            "slots instead (`--constant` of `dijiang convert`, or large_slots)"
        )


def keep_heads(
    student: DiJiangForCausalLM,
    tokenizer: Any,
    text: torch.Tensor,
    config: SelectConfig,
    *,
    context: int,
    progress: bool = True,
) -> tuple[Selection, DiJiangForCausalLM]:
    """
    Rank the heads of `student`, whose source reads `context` tokens; the ranking, and the model in which the first of them
    keep every token.
    """
    if any(student.config.full_heads):
        raise ValueError("the checkpoint keeps heads already; select heads on the one that it was made from")
    if not linear_layers(student):
        raise ValueError("the checkpoint has no linear layer; convert with linear layers to select heads or fit a memory")
    window = student.config.attention_window
    if config.reads_samples and max(config.lengths) > context:
        raise ValueError(
            f"the source was made for {context} tokens, and samples have {max(config.lengths)}; give shorter `lengths`"
        )
    if config.reads_samples and min(config.lengths) <= window:
        raise ValueError(
            f"samples of {min(config.lengths)} tokens show no loss with a window of {window}; give longer `lengths`"
        )
    count = config.heads
    if config.bytes_per_token is not None:
        size = (student.config.dtype or torch.float32).itemsize
        count = heads_within(config.bytes_per_token, student.config, size)
        if not count:
            needed = 2 * student.config.head_dim * size
            raise ValueError(f"bytes_per_token={config.bytes_per_token} is less than the {needed} that one head needs")
    samples = selection_samples(tokenizer, text, config) if config.reads_samples else []
    aside = replace(config, samples=max(min(config.held_aside, config.samples), 1), seed=config.seed + 1)
    rows = text[: TEXT_ROWS * TEXT_LENGTH]
    job = SelectionJob(
        model=student,
        samples=samples,
        held_aside=selection_samples(tokenizer, text, aside) if config.held_aside and config.method in PURSUITS else (),
        text=rows[: len(rows) // TEXT_LENGTH * TEXT_LENGTH].view(-1, TEXT_LENGTH) if len(rows) >= TEXT_LENGTH else None,
        heads=count,
        seed=config.seed,
        progress=progress,
    )
    options = {"per_step": config.per_step} if config.method in STEPPED else {}
    selection = select_heads(job, config.method, **options)
    return selection, with_memories(student, full_heads=full_heads_of(selection, count))


def rows_to_fit(
    student: DiJiangForCausalLM, tokenizer: Any, text: torch.Tensor, config: FitConfig, context: int
) -> list[RecallSample]:
    """What to fit on. ValueError if the student has no window, or the sequences are too short for it."""
    window = student.config.attention_window
    if not window:
        raise ValueError("an exact memory needs a window; convert with attention_window of at least 1")
    rows = fit_rows(tokenizer, text, config, context)
    if len(rows[0].input_ids) < 3 * window:
        raise ValueError(
            f"text_tokens={config.text_tokens}, block_size={config.block_size} and the source's context of {context} make "
            f"sequences shorter than three windows of {window}; raise the first two, or convert with a narrower window"
        )
    return rows


def fit_slots(
    student: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    rows: list[RecallSample],
    config: FitConfig,
    *,
    progress: bool = True,
) -> tuple[DiJiangForCausalLM, dict[str, Any]]:
    """The model with a fitted memory, and the facts of the fit."""
    large: tuple[tuple[int, int], ...] = ()
    if config.large_slots is not None:
        large = tuple((layer, head) for layer, heads in enumerate(student.config.full_heads) for head in heads)
        if not large:
            raise ValueError("large_slots is for heads that keep every token, and there are none; select some first")
        student = with_memories(student, full_heads=[[] for _ in student.config.full_heads])
    settings = FitSettings(
        slots=config.slots,
        spread=config.spread,
        least_slots=config.least_slots,
        large_heads=large,
        large_slots=config.large_slots or 0,
        recall_share=config.recall_share,
        steps=config.steps,
        seed=config.seed,
    )
    fitted = fit_memory(student, teacher, rows, settings, progress=progress)
    model = fitted.with_slots(settings)
    facts = fitted.facts | {"slots": model.config.attention_memory}
    if config.linear_branch:
        read, context = len(rows[0].input_ids), context_of(teacher.config)
        if read < context:
            print_line(f"the linear branch is fitted to {read:,} tokens and does harm beyond; the source reads {context:,}")
        layers = len(linear_layers(model))
        with progress_bar("Starting the linear branch", layers, shown=progress, unit="items") as advance:
            facts["branch_errors"] = start_branches(model, teacher, rows[0].input_ids, advance)
    return model, facts


def convert_with_memories(
    source: str | Path,
    output: str | Path,
    preset: str = "recommended",
    *,
    select: SelectConfig | None = None,
    fit: FitConfig | None = None,
    texts: Sequence[str | Path],
    dtype: str = "auto",
    progress: bool = True,
    **config_overrides: Any,
) -> Path:
    """
    `convert_model` and `add_memories` in one: the model that is worth using without training. Arguments are theirs;
    `SelectConfig()` and `FitConfig()` keep seven heads and let the others hold 128 tokens.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(output))
        opened = open_convertible(source)  # what is wrong is said before the source is converted, which may take minutes
        refuse_memories(opened.config, select, fit)
        text = read_texts(load_tokenizer(opened), texts)
        converted = folder / "converted"
        convert_model(source, converted, preset, dtype=dtype, progress=progress, **config_overrides)
        finished = add_memories(
            converted,
            folder / "finished",
            teacher=source,
            select=select,
            fit=fit,
            texts=text,
            progress=progress,
        )
        shutil.rmtree(converted)
        for path in [*finished.iterdir()]:
            path.rename(folder / path.name)
        finished.rmdir()
    return Path(output)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
