"""Builds the model that a stage trains, and gathers the trained weights."""

import hashlib
import json

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from dijiang.checkpoint.lineage import refuse_misfit
from dijiang.checkpoint.provenance import read_provenance
from dijiang.convert import load_source
from dijiang.modeling import DiJiangForCausalLM

from ..data.blocks import TrainingBlocks
from ..trainer.distributed import is_main, share_errors
from .align import AlignModel
from .distill import DistillModel
from .job_folder import StageFolder
from .teacher_logits import WithTeacherLogits, is_complete, layout_of, write_teacher_logits


def build_model(
    folder: StageFolder, blocks: TrainingBlocks, *, device: torch.device, dtype: torch.dtype, progress: bool
) -> tuple[nn.Module, Dataset]:
    """
    Build the model of one stage, the same in all processes, with the teacher on `device` and computations in `dtype`.

    Returns:
        The model to train, and `blocks`, with the teacher's logits if those come from disk.

    Raises:
        ValueError: if checkpoint, teacher and settings do not fit each other.
    """
    config = folder.config
    aligns = folder.stage == "align"
    from_disk = not aligns and config.teacher_top_k > 0
    with share_errors():
        # what trains starts from what is stored; DistillModel converts the rest to `dtype` itself
        loaded_dtype = (dtype if config.trains == "kernel" else torch.float32) if aligns else "auto"
        student, _ = load_source(folder.source, dtype=loaded_dtype)

    text: Dataset = blocks
    if from_disk:
        text = with_teacher_logits(folder, blocks, student, device=device, dtype=dtype, progress=progress)
    set_seed(config.seed)
    with share_errors():
        if aligns:
            model = AlignModel(student, load_teacher(folder, student, device, dtype), config, dtype)
        else:
            in_memory = config.kl_weight > 0 and not from_disk
            teacher = load_teacher(folder, student, device, dtype) if in_memory else None
            recall = folder.recipe.data.recall
            model = DistillModel(student, teacher, config, dtype, recall.answer_weight if recall else 1.0)
    if folder.recipe.run.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, text


def load_teacher(
    folder: StageFolder, student: DiJiangForCausalLM, device: torch.device, dtype: torch.dtype
) -> DiJiangForCausalLM:
    """The recipe's source in our decoder; ValueError if it does not fit the student."""
    teacher, _ = load_source(folder.recipe.source, dtype=dtype)
    refuse_misfit(student, teacher, folder.recipe.source)
    return teacher.to(device)


def with_teacher_logits(
    folder: StageFolder,
    blocks: TrainingBlocks,
    student: DiJiangForCausalLM,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
) -> WithTeacherLogits:
    """`blocks` with the teacher's most likely tokens, which all processes write together where they are not on disk."""
    config = folder.config
    data = folder.recipe.data
    provenance = read_provenance(folder.source)
    depends_on = [
        provenance["source_files"],
        [source["fingerprint"] for source in blocks.facts()["sources"]],
        [source.weight for source in data.train],
        data.respect_documents,
        *([data.recall.share, data.recall.kinds, data.recall.lengths, data.recall.seed] if data.recall else []),
        [config.seed, config.tokens, config.block_size, config.start_block_size, config.position_range, config.batch_size],
        str(dtype),
    ]
    layout = layout_of(
        blocks,
        top_k=config.teacher_top_k,
        vocab_size=student.config.vocab_size,
        temperature=config.temperature,
        fingerprint=hashlib.sha256(json.dumps(depends_on).encode()).hexdigest(),
    )
    with share_errors():
        if not is_complete(folder.teacher_logits, layout):
            write_teacher_logits(
                load_teacher(folder, student, device, dtype),
                blocks,
                folder.teacher_logits,
                layout,
                batch_size=folder.recipe.run.micro_batch_size,
                chunk_tokens=config.chunk_tokens,
                progress=progress,
            )
    return WithTeacherLogits(blocks, folder.teacher_logits, layout)


def gathered_parameters(student: DiJiangForCausalLM) -> dict[str, torch.Tensor]:
    """
    The parameters of `student` that its trained weights consist of, by name. All processes must call it; under ZeRO-3 only
    the main one gets the values, on the CPU.
    """
    named = student.named_parameters()
    parameters = {name: parameter for name, parameter in named if parameter.requires_grad or ".base_layer." in name}
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return parameters
    import deepspeed

    values = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_main():
                values[name] = parameter.detach().cpu().clone()
    return values
