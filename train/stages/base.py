"""Base class of the models of both stages: a student that trains, and its frozen teacher."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from dijiang.modeling import DiJiangForCausalLM

from .distillation_loss import LossWeights, distillation_loss

if TYPE_CHECKING:
    from .compiled import CompiledParts

CROSS_ENTROPY = LossWeights(kl=0.0, ce=1.0)


class RecoveryModel(nn.Module):
    """
    A student with the loss that trains it. The teacher is no submodule: it is not saved, sharded or moved.

    Args:
        student: the subclass makes it ready for training: what trains is float32, the rest may be of another dtype.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device, or None.
        dtype: of computations, bfloat16 or float32.

    Attributes:
        compiled: the parts that run through torch.compile while training, if any; see compiled.py.

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
        self.student = student
        self.dtype = dtype
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> DiJiangForCausalLM | None:
        return self._teacher[0] if self._teacher else None

    def autocast(self, device: torch.device):
        """Context in which computations have `dtype`, although trained weights are float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)

    def compilation(self, model: DiJiangForCausalLM):
        """Context in which `model`, student or teacher, runs compiled, if it is compiled and this is training."""
        return self.compiled.inside(model) if self.compiled is not None and self.training else nullcontext()

    def last_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """The student's last hidden states, (B * T, hidden)."""
        with self.autocast(input_ids.device), self.compilation(self.student):
            # autocast leaves embeddings alone, and the residual stream follows their dtype
            embedded = self.student.model.embed_tokens(input_ids).to(self.dtype)
            if self.compiled is not None and self.training and not embedded.requires_grad:
                embedded.requires_grad_()  # so that the first layer shares the compiled code of the others
            run = self.student.model(inputs_embeds=embedded, position_ids=position_ids, use_cache=False)
        return run.last_hidden_state.flatten(0, 1)

    def loss_on(self, hidden: torch.Tensor, labels: torch.Tensor, **settings):
        """`distillation_loss` through the student's head, in the dtype of computations."""
        rows = self.compiled.rows if self.compiled is not None and self.training else None
        with self.autocast(hidden.device):
            return distillation_loss(hidden, self.student.lm_head.weight, labels, rows_of=rows, **settings)

    def measured(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, answers: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        What the student is measured by: `loss`, the mean cross-entropy of the next tokens of input_ids (B, T). With `answers`
        (B, T), see `RecallSequences.sequence`, instead `right` and `asked`, how many of them it gives, and how many there are.
        """
        hidden, labels = self.last_hidden(input_ids, position_ids), next_token_labels(input_ids, position_ids)
        if answers is not None:
            return count_answers(hidden, self.student.lm_head.weight, labels, answers)
        return {"loss": self.loss_on(hidden, labels.flatten(), weights=CROSS_ENTROPY)[1]["ce"]}

    @torch.no_grad()
    def teacher_measured(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, answers: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`measured` of the teacher."""
        run = self.teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden, labels = run.last_hidden_state.flatten(0, 1), next_token_labels(input_ids, position_ids)
        head = self.teacher.lm_head.weight
        if answers is not None:
            return count_answers(hidden, head, labels, answers)
        return {"loss": distillation_loss(hidden, head, labels.flatten(), weights=CROSS_ENTROPY)[1]["ce"]}


def count_answers(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, answers: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    How many answers the likeliest tokens give, `right`, of how many, `asked`; an answer counts if all of it is right.

    Args:
        hidden: (B * T, C).
        head: (V, C).
        labels: (B, T), the next tokens.
        answers: (B, T), see `RecallSequences.sequence`.
    """
    numbers = answers + torch.arange(len(answers), device=answers.device)[:, None] * (answers.max() + 1)  # by row
    at = answers.flatten().nonzero().squeeze(-1)
    wrong = (hidden[at] @ head.to(hidden.dtype).T).argmax(-1) != labels.flatten()[at]
    asked, which = numbers.flatten()[at].unique(return_inverse=True)
    misses = torch.zeros(len(asked), device=hidden.device).index_add_(0, which, wrong.float())
    return {"right": (misses == 0).sum().double(), "asked": misses.new_tensor(len(asked), dtype=torch.float64)}


def next_token_labels(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """The token that each of input_ids (B, T) is to predict, (B, T); -100 at the end of a row and of a document."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    if position_ids is not None:
        labels[:, :-1].masked_fill_(position_ids.diff(dim=-1) != 1, -100)
    return labels
