"""Builds what a stage trains, from the checkpoint it starts from and the teacher, and takes the result out of it."""

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

from ..recipe.schema import Recipe
from ..trainer.distributed import is_main, rank, share_errors, world_size
from .align import AlignModel
from .distill import DistillModel
from .job_folder import StageFolder
from .teacher_logits import WithTeacherLogits, is_complete, write_teacher_logits


class StageModels:
    """
    Builds the model of one stage, the same in all processes.

    Args:
        dtype: of computations, frozen weights and the teacher.
        device: of the teacher.
        shown: whether to show progress.
    """

    def __init__(self, recipe: Recipe, stage: str, folder: StageFolder, dtype: torch.dtype, device: torch.device, shown: bool):
        self.recipe, self.stage, self.config, self.folder = recipe, stage, getattr(recipe, stage), folder
        self.dtype, self.device, self.shown = dtype, device, shown

    def build(self, blocks: Dataset) -> tuple[nn.Module, Dataset]:
        """
        The model to train, and `blocks`, with the teacher's logits if those come from disk.

        Raises:
            ValueError: if checkpoint, teacher and settings do not fit each other.
        """
        with share_errors():
            student, _ = load_source(self.folder.source, dtype=self.loaded_dtype())
        from_disk = self.stage == "distill" and self.config.teacher_top_k > 0
        if from_disk:
            blocks = self.with_teacher_logits(blocks, student)
        set_seed(self.config.seed)
        with share_errors():
            if self.stage == "align":
                model = AlignModel(student, self.load_teacher(student), self.config, self.dtype)
            else:
                beside = self.config.kl_weight > 0 and not from_disk
                model = DistillModel(student, self.load_teacher(student) if beside else None, self.config, self.dtype)
        if self.recipe.run.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model, blocks

    def loaded_dtype(self) -> torch.dtype | str:
        """Of the student: what trains starts from what is stored. The distil stage's model converts the rest itself."""
        if self.stage == "distill":
            return "auto"
        return self.dtype if self.config.trains == "kernel" else torch.float32

    def load_teacher(self, student: DiJiangForCausalLM) -> DiJiangForCausalLM:
        teacher, _ = load_source(self.recipe.source, dtype=self.dtype)
        refuse_misfit(student, teacher, self.recipe.source)
        return teacher.to(self.device)

    def with_teacher_logits(self, blocks: Dataset, student: DiJiangForCausalLM) -> WithTeacherLogits:
        """`blocks` with the teacher's most likely tokens, which all processes write together where they are not on disk."""
        folder, config, data = self.folder.path / "teacher_logits", self.config, self.recipe.data
        depends = [
            read_provenance(self.folder.source)["source_files"],
            [source["fingerprint"] for source in blocks.facts()["sources"]],
            [source.weight for source in data.train],
            data.respect_documents,
            [config.seed, config.tokens, config.block_size, config.start_block_size, config.position_range, config.batch_size],
            str(self.dtype),
        ]
        fingerprint = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        settings = {"top_k": config.teacher_top_k, "temperature": config.temperature, "fingerprint": fingerprint}
        with share_errors():
            if not is_complete(blocks, folder, vocab_size=student.config.vocab_size, **settings):
                write_teacher_logits(
                    self.load_teacher(student),
                    blocks,
                    folder,
                    batch_size=self.recipe.run.micro_batch_size,
                    chunk_tokens=config.chunk_tokens,
                    rank=rank(),
                    world_size=world_size(),
                    progress=self.shown,
                    **settings,
                )
        return WithTeacherLogits(blocks, folder, vocab_size=student.config.vocab_size, **settings)


def gathered_parameters(student: DiJiangForCausalLM) -> dict[str, torch.Tensor]:
    """
    By name, the parameters of `student` that its trained weights are made of. All processes call it; under ZeRO-3 the main one
    alone gets them, on the CPU.
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
