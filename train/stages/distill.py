"""The distil stage's model: the student, its teacher, and the loss between them."""

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

from ..recipe.schema import DistillConfig
from .adapters import add_adapters
from .base import RecoveryModel, next_token_labels
from .teacher_pass import KERNEL_PARTS, PROJECTIONS, kernel_parameters

MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
ADDED_BESIDE_KERNELS = ("output_norm", "output_gate")  # by conversion, so they have to be learnt like the kernels


class DistillModel(RecoveryModel):
    """
    A student that learns the teacher's next-token distributions.

    Args:
        student: which `prepare` makes ready for training.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device. None if
            the batches bring the teacher's most likely tokens, or kl_weight is 0.
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
        places: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_logprobs: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids: (B, T).
            position_ids: (B, T), 0 where a document begins. Default: one document per row.
            teacher_ids, teacher_logprobs: (B, T, k), the teacher's most likely tokens and their log-probabilities at the
                config's temperature, in place of a teacher.
            places, num_items_in_batch: what batches and trainers bring along; the loss, a mean over all B * T tokens,
                does not depend on them.

        Returns:
            In training `loss`, and detached `ce` and, with a teacher, `kl`. In eval mode `loss` alone: the mean cross-entropy
            of the next tokens.

        Raises:
            ValueError: in training, if there is neither a teacher nor teacher_ids, and kl_weight is not 0.
        """
        if not self.training:
            return {"loss": self.text_loss(input_ids, position_ids)}
        config, targets = self.stage, {}
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
        loss, measures = self.loss_on(hidden, labels.flatten(), **targets, **settings)
        return {"loss": loss} | measures

    def parameter_groups(self) -> list[dict]:
        """
        What trains, by learning rate: dicts of `name` (kernel, attention or rest), `params` and `lr`; empty groups are left
        out.
        """
        kernel = {id(parameter) for parameter in kernel_parameters(self.student).values()}
        groups = {"kernel": [], "attention": [], "rest": []}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                attention = "attention" if ".self_attn." in name else "rest"
                groups["kernel" if id(parameter) in kernel else attention].append(parameter)
        config = self.stage
        rates = (config.kernel_learning_rate, config.attention_learning_rate, config.learning_rate)
        pairs = zip(groups.items(), rates, strict=True)
        return [{"name": name, "params": params, "lr": lr} for (name, params), lr in pairs if params]


def prepare(student: DiJiangForCausalLM, config: DistillConfig, dtype: torch.dtype = torch.float32) -> None:
    """
    Say which parameters of `student` train, by config.trains, and make them float32; the frozen ones become `dtype`, but for
    those of kernels, which are float32 always. With config.lora_rank adapters are added. What conversion added always trains.

    Raises:
        ValueError: if nothing is left to train.
    """
    weights = weights_that_train(student, config)
    if config.lora_rank:
        matrices = tuple(f".{part}.weight" for part in PROJECTIONS + MLP_MATRICES)
        modules = [name.removesuffix(".weight") for name in weights if name.endswith(matrices)]
        weights = [name for name in weights if name.endswith(EMBEDDINGS)]
        if modules:
            alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
            add_adapters(student, modules, config.lora_rank, alpha, config.seed)
    trained = {*weights, *kernel_parameters(student), *added_beside_kernels(student)}
    for name, parameter in student.named_parameters():
        adapter = config.lora_rank and ".lora_" in name
        parameter.requires_grad_(adapter or name in trained)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif not (is_kernel_part(name) or ".base_layer." in name):  # with which the adapters will be merged
            parameter.data = parameter.data.to(dtype)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"trains={config.trains} leaves nothing to train: the model has no linear-attention layer with parameters of that "
            "kind; choose trains=all"
        )


def weights_that_train(student: DiJiangForCausalLM, config: DistillConfig) -> list[str]:
    """Names of the source model's own parameters that config.trains covers."""
    if config.trains == "kernel":
        return []
    names = [name for name, _ in student.named_parameters() if not is_kernel_part(name)]
    if config.trains == "attention":
        prefixes = tuple(f"model.layers.{i}.self_attn.{part}." for i in linear_layers(student) for part in PROJECTIONS)
        return [name for name in names if name.startswith(prefixes)]
    return [name for name in names if config.train_embeddings or not name.endswith(EMBEDDINGS)]


def added_beside_kernels(student: DiJiangForCausalLM) -> list[str]:
    parts = tuple(f".self_attn.{part}." for part in ADDED_BESIDE_KERNELS)
    return [name for name, _ in student.named_parameters() if any(part in name for part in parts)]


def is_kernel_part(name: str) -> bool:
    return any(f".self_attn.{part}." in name for part in KERNEL_PARTS)
