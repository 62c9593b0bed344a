"""The distill stage's model: the student, its teacher, and the loss between them."""

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

from ..data.mixture import random_below
from ..recipe.schema import DistillConfig
from .base import RecoveryModel, next_token_labels
from .distillation_loss import LossWeights
from .parameters import added_parameters, select_trained


class DistillModel(RecoveryModel):
    """
    A student that learns the teacher's next-token distributions.

    Args:
        student: the model to train; what trains becomes float32 and requires gradients, nothing else does.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device. None if the
            batches hold the teacher's most likely tokens, or kl_weight is 0.
        config: of the stage.
        dtype: of computations and frozen weights, bfloat16 or float32.
        answer_weight: how many times tokens of answers count in the loss.

    Raises:
        ValueError: if the teacher's vocabulary has another size, or nothing is left to train.
    """

    def __init__(
        self,
        student: DiJiangForCausalLM,
        teacher: DiJiangForCausalLM | None,
        config: DistillConfig,
        dtype: torch.dtype = torch.float32,
        answer_weight: float = 1.0,
    ):
        super().__init__(student, teacher, dtype)
        select_trained(student, config, dtype)
        self.stage, self.answer_weight = config, answer_weight

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sample_indices: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_logprobs: torch.Tensor | None = None,
        answers: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids: (B, T).
            position_ids: (B, T), 0 where a document begins. Default: one document per row.
            sample_indices: (B,), numbers of the sequences; they give the step, which decides on the share of the memory.
            teacher_ids: (B, T, k), the teacher's most likely tokens, if no teacher is in memory.
            teacher_logprobs: (B, T, k), their log-probabilities at the config's temperature.
            answers: (B, T), see `RecallSequences.sequence`; their tokens count `answer_weight` times.

        Returns:
            In training `loss`, a mean over all B * T tokens, and detached metrics of `distillation_loss`. In eval mode what
            `measured` returns.

        Raises:
            ValueError: in training, if there is neither a teacher nor teacher_ids, and kl_weight is not 0.
        """
        config = self.stage
        for layer in linear_layers(self.student).values():
            layer.gate_temperature = config.memory_temperature if self.training else None
        if config.least_memory < 1:
            limit_memory(self.student, self.memory_share(sample_indices) if self.training else 1.0)
        if not self.training:
            return self.measured(input_ids, position_ids, answers)
        targets = {}
        if teacher_ids is not None:
            targets["top_k"] = teacher_ids.flatten(0, 1), teacher_logprobs.flatten(0, 1)
        elif config.kl_weight and self.teacher is None:
            raise ValueError("kl_weight needs a teacher, or batches with teacher_ids and teacher_logprobs")
        elif config.kl_weight:
            with torch.no_grad(), self.compilation(self.teacher):
                run = self.teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            targets["teacher"] = run.last_hidden_state.flatten(0, 1), self.teacher.lm_head.weight
        weights = LossWeights(kl=config.kl_weight, ce=config.ce_weight, temperature=config.temperature)
        hidden, labels = self.last_hidden(input_ids, position_ids), next_token_labels(input_ids, position_ids)
        settings = {"weights": weights, "chunk_tokens": config.chunk_tokens}
        if answers is not None:
            settings["answers"] = answers.flatten() > 0, self.answer_weight
        loss, metrics = self.loss_on(hidden, labels.flatten(), **targets, **settings)
        return {"loss": loss} | metrics

    def memory_share(self, sample_indices: torch.Tensor | None) -> float:
        """The share of window and slots that the layers have in the step of these sequences, the same in all processes."""
        least = self.stage.least_memory
        if sample_indices is None:
            return 1.0
        step = int(sample_indices[0]) // self.stage.batch_size
        return least + (1 - least) * random_below(1 << 20, self.stage.seed + 1, step) / (1 << 20)

    def parameter_groups(self) -> list[dict]:
        """The parameters that train, by learning rate: dicts of `name` (kernel, attention or rest), `params` and `lr`."""
        added = {id(parameter) for parameter in added_parameters(self.student, scores=True).values()}
        stage = self.stage
        rates = {"kernel": stage.kernel_learning_rate, "attention": stage.attention_learning_rate, "rest": stage.learning_rate}
        groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                attention = "attention" if ".self_attn." in name else "rest"
                groups["kernel" if id(parameter) in added else attention].append(parameter)
        return [{"name": name, "params": params, "lr": rates[name]} for name, params in groups.items() if params]


def limit_memory(student: DiJiangForCausalLM, share: float) -> None:
    """
    Let linear layers have this share of their window and of their slots, at least one of each. It holds until the next call,
    since gradient checkpointing computes layers again in the backward pass.
    """
    config = student.config
    for i, layer in linear_layers(student).items():
        slots = [config.memory_slots(i)[head] for head in layer.linear_heads]
        layer.window = config.attention_window and max(round(share * config.attention_window), 1)
        layer.slots = tuple(count and max(round(share * count), 1) for count in slots)
