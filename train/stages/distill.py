"""The distill stage's model: the student, its teacher, and the loss between them."""

import torch

from dijiang.modeling import DiJiangForCausalLM

from ..recipe.schema import DistillConfig
from .adapters import add_adapters
from .base import RecoveryModel, next_token_labels
from .parameters import (
    ADDED_PARTS,
    EMBEDDINGS,
    MLP_MATRICES,
    PROJECTIONS,
    added_parameters,
    belongs_to,
    output_parameter_names,
    source_weight_names,
)


class DistillModel(RecoveryModel):
    """
    A student that learns the teacher's next-token distributions.

    Args:
        student: the model to train; `prepare` makes it ready.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device. None if the
            batches hold the teacher's most likely tokens, or kl_weight is 0.
        config: of the stage.
        dtype: of computations and frozen weights, bfloat16 or float32.

    Raises:
        ValueError: if the teacher's vocabulary has another size, or nothing is left to train.
    """

    def __init__(
        self,
        student: DiJiangForCausalLM,
        teacher: DiJiangForCausalLM | None,
        config: DistillConfig,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(student, teacher, dtype)
        prepare(student, config, dtype)
        self.stage = config

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sample_indices: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_logprobs: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids: (B, T).
            position_ids: (B, T), 0 where a document begins. Default: one document per row.
            sample_indices: (B,), unused; batches hold them.
            teacher_ids: (B, T, k), the teacher's most likely tokens, in place of a teacher.
            teacher_logprobs: (B, T, k), their log-probabilities at the config's temperature.
            num_items_in_batch: unused, because the loss is a mean over all B * T tokens; trainers pass it.

        Returns:
            In training `loss`, and detached `ce` and, with a teacher, `kl`. In eval mode `loss` alone: the mean cross-entropy
            of the next tokens.

        Raises:
            ValueError: in training, if there is neither a teacher nor teacher_ids, and kl_weight is not 0.
        """
        if not self.training:
            return {"loss": self.text_loss(input_ids, position_ids)}
        config = self.stage
        targets = {}
        if teacher_ids is not None:
            targets["top_k"] = teacher_ids.flatten(0, 1), teacher_logprobs.flatten(0, 1)
        elif config.kl_weight and self.teacher is None:
            raise ValueError("kl_weight needs a teacher, or batches with teacher_ids and teacher_logprobs")
        elif config.kl_weight:
            with torch.no_grad(), self.compilation(self.teacher):
                run = self.teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            targets = {"teacher_hidden": run.last_hidden_state.flatten(0, 1), "teacher_head": self.teacher.lm_head.weight}
        settings = {key: getattr(config, key) for key in ("kl_weight", "ce_weight", "temperature", "chunk_tokens")}
        hidden, labels = self.last_hidden(input_ids, position_ids), next_token_labels(input_ids, position_ids)
        loss, metrics = self.loss_on(hidden, labels.flatten(), **targets, **settings)
        return {"loss": loss} | metrics

    def parameter_groups(self) -> list[dict]:
        """
        The parameters that train, by learning rate.

        Returns:
            Dicts of `name` (kernel, attention or rest), `params` and `lr`; empty groups are left out.
        """
        added = {id(parameter) for parameter in added_parameters(self.student).values()}
        config = self.stage
        rates = {
            "kernel": config.kernel_learning_rate,
            "attention": config.attention_learning_rate,
            "rest": config.learning_rate,
        }
        groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                attention = "attention" if ".self_attn." in name else "rest"
                groups["kernel" if id(parameter) in added else attention].append(parameter)
        return [{"name": name, "params": params, "lr": rates[name]} for name, params in groups.items() if params]


def prepare(student: DiJiangForCausalLM, config: DistillConfig, dtype: torch.dtype = torch.float32) -> None:
    """
    Choose by config.trains which parameters of `student` train, and make them float32. The frozen ones become `dtype`, except
    those that conversion added, which are float32 always; of the latter all train that are not fixed. With config.lora_rank
    adapters are added.

    Raises:
        ValueError: if nothing is left to train.
    """
    weights = source_weight_names(student, config)
    if config.lora_rank:
        matrices = tuple(f".{part}.weight" for part in PROJECTIONS + MLP_MATRICES)
        modules = [name.removesuffix(".weight") for name in weights if name.endswith(matrices)]
        weights = [name for name in weights if name.endswith(EMBEDDINGS)]
        if modules:
            alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
            add_adapters(student, modules, config.lora_rank, alpha, config.seed)
    trained = {*weights, *added_parameters(student), *output_parameter_names(student)}
    for name, parameter in student.named_parameters():
        adapter = config.lora_rank and ".lora_" in name
        parameter.requires_grad_(adapter or name in trained)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif not (belongs_to(name, ADDED_PARTS) or ".base_layer." in name):  # adapters are merged with base layers as stored
            parameter.data = parameter.data.to(dtype)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"trains={config.trains} leaves nothing to train: the model has no linear-attention layer with parameters of that "
            "kind; choose trains=all"
        )
