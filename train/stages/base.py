"""What the models of both stages share: a student that trains, and its frozen teacher."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from dijiang.modeling import DiJiangForCausalLM

from .distillation_loss import distillation_loss

if TYPE_CHECKING:
    from .compiled import CompiledParts

CROSS_ENTROPY = {"kl_weight": 0.0, "ce_weight": 1.0, "chunk_tokens": 256}


class RecoveryModel(nn.Module):
    """
    A student with the loss that trains it. The teacher is no submodule: it is not saved, sharded or moved.

    Args:
        student: made ready for training by the subclass: what trains is float32, the rest may be of another dtype.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device, or None.
        dtype: of computations, bfloat16 or float32.

    Attributes:
        compiled: what runs through torch.compile while training, if anything does; see compiled.py.

    Raises:
        ValueError: if the teacher's vocabulary has another size.
    """

    compiled: "CompiledParts | None" = None

    def __init__(self, student: DiJiangForCausalLM, teacher: DiJiangForCausalLM | None, dtype: torch.dtype):
        super().__init__()
        if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
            raise ValueError(
                f"the teacher has {teacher.config.vocab_size} vocabulary entries, the student {student.config.vocab_size}; "
                "give the model that the student was converted from"
            )
        self.student, self.dtype = student, dtype
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> DiJiangForCausalLM | None:
        return self._teacher[0] if self._teacher else None

    def autocast(self, device: torch.device):
        """Trained weights are float32, whatever the dtype of computations."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def compilation(self, model: DiJiangForCausalLM):
        """Within the block `model`, student or teacher, runs compiled, if that is wanted and this is training."""
        return self.compiled.inside(model) if self.compiled is not None and self.training else nullcontext()

    def last_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """(B * T, hidden) of the student."""
        with self.autocast(input_ids.device), self.compilation(self.student):
            # autocast leaves embeddings alone, and the residual stream follows their dtype
            embedded = self.student.model.embed_tokens(input_ids).to(self.dtype)
            if self.compiled is not None and self.training and not embedded.requires_grad:
                embedded.requires_grad_()  # as the inputs of all other layers do, so that the first one shares their code
            run = self.student.model(inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
        return run.last_hidden_state.flatten(0, 1)

    def loss_on(self, hidden: torch.Tensor, labels: torch.Tensor, **settings):
        """`distillation_loss` through the student's head, in the dtype of computations."""
        rows = self.compiled.rows if self.compiled is not None and self.training else None
        with self.autocast(hidden.device):
            return distillation_loss(hidden, self.student.lm_head.weight, labels, rows_of=rows, **settings)

    def text_loss(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """The student's mean cross-entropy of the next tokens of input_ids (B, T)."""
        hidden, labels = self.last_hidden(input_ids, position_ids), next_token_labels(input_ids, position_ids)
        return self.loss_on(hidden, labels.flatten(), **CROSS_ENTROPY)[1]["ce"]

    @torch.no_grad()
    def teacher_text_loss(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """`text_loss` of the teacher."""
        run = self.teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden, labels = run.last_hidden_state.flatten(0, 1), next_token_labels(input_ids, position_ids)
        return distillation_loss(hidden, self.teacher.lm_head.weight, labels.flatten(), **CROSS_ENTROPY)[1]["ce"]


def next_token_labels(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """What each of the tokens (B, T) is to predict, (B, T); -100 at the end of a row and of a document."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    if position_ids is not None:
        labels[:, :-1].masked_fill_(position_ids.diff(dim=-1) != 1, -100)
    return labels
