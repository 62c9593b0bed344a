"""The align stage's model: the student, its teacher, and every layer's loss between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers
from dijiang.modeling.packing import PackedGroup, group_sequences, sequence_bounds

from ..recipe.schema import AlignConfig
from .base import RecoveryModel
from .calibrate import calibrate_layer
from .parameters import PROJECTIONS, added_parameters
from .teacher_pass import TeacherPass, run_teacher


class AlignModel(RecoveryModel):
    """
    A student whose linear layers learn to reproduce the teacher's attention on the teacher's own hidden states (LoLCATs, arXiv
    2410.10254; RADLADS, arXiv 2505.03005). Layers do not depend on one another, so one teacher pass trains all of them.

    Args:
        student: the model to train; what trains becomes float32 and requires gradients, nothing else does.
        teacher: the softmax model in our decoder, in the dtype in which it is to run, on the student's device.
        config: settings of the stage.
        dtype: of computations and frozen weights, bfloat16 or float32.

    Raises:
        ValueError: if the student has nothing to align, or outputs that cannot be compared with the teacher's.
    """

    def __init__(
        self, student: DiJiangForCausalLM, teacher: DiJiangForCausalLM, config: AlignConfig, dtype: torch.dtype = torch.float32
    ):
        super().__init__(student, teacher, dtype)
        refuse_what_cannot_be_aligned(student, config)
        self.stage = config
        self.parameters_of = trained_parameters(student, config)
        student.requires_grad_(False)
        for parameters in self.parameters_of.values():
            for parameter in parameters:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def parameter_groups(self) -> list[dict]:
        """The parameters that train, by learning rate: dicts of `name` (kernel or attention), `params` and `lr`."""
        rates = {"kernel": self.stage.kernel_learning_rate, "attention": self.stage.attention_learning_rate}
        groups = self.parameters_of.items()
        return [{"name": name, "params": params, "lr": rates[name]} for name, params in groups if params]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sample_indices: torch.Tensor | None = None,
        answers: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids: (B, T).
            position_ids: (B, T); where they do not rise by one, another document begins.
            sample_indices: (B,), numbers of the sequences; they give the step, which decides on window dropout.
            answers: (B, T), see `RecallSequences.sequence`; of no effect in training.

        Returns:
            In training `loss`, the mean over layers, and each layer's own, detached, as `layer_00`, ... In eval mode what
            `measured` returns.
        """
        if not self.training:
            return self.measured(input_ids, position_ids, answers)
        return self.losses(run_teacher(self.teacher, input_ids, position_ids), input_ids, position_ids, sample_indices)

    def losses(self, teacher_pass: TeacherPass, input_ids, position_ids=None, sample_indices=None) -> dict[str, torch.Tensor]:
        """`forward` in training, with the teacher's pass over these inputs."""
        bounds = None if position_ids is None else sequence_bounds(position_ids)
        groups = None if bounds is None else group_sequences(bounds, input_ids.numel())
        alone = self.drops_window(sample_indices)
        layers = linear_layers(self.student)
        if any(hasattr(parameter, "ds_id") for parameter in self.student.parameters()):
            # ZeRO-3 frees a layer's weights after its forward pass and gathers them again for its backward pass
            losses = {}
            for i, attention in layers.items():
                losses[i] = checkpoint(self.layer_loss, i, attention, teacher_pass, groups, alone, use_reentrant=False)
            total = torch.stack(list(losses.values())).mean()
        else:
            total, losses = self.loss_with_gradients(layers, teacher_pass, groups, alone)
        return {"loss": total} | {f"layer_{i:02d}": loss.detach() for i, loss in losses.items()}

    def drops_window(self, sample_indices: torch.Tensor | None) -> bool:
        """
        Whether the step of these sequences trains the linear branch alone: a function of the step's number, so that all
        processes and resumed runs agree.
        """
        if not self.stage.window_dropout:
            return False
        generator = torch.Generator().manual_seed(
            self.stage.seed * 1_000_003 + int(sample_indices[0]) // self.stage.batch_size
        )
        return torch.rand((), generator=generator).item() < self.stage.window_dropout

    def loss_with_gradients(
        self, layers: dict[int, DiJiangLinearAttention], teacher_pass: TeacherPass, groups, alone: bool
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """
        The mean of the layers' losses, and each layer's own, detached. Gradients are computed layer by layer, so that only one
        layer's graph exists at a time.
        """
        parameters = [p for group in self.parameter_groups() for p in group["params"]]
        gradients = dict.fromkeys(parameters)
        losses = {}
        for i, attention in layers.items():
            own = [p for p in attention.parameters() if p.requires_grad]
            loss = self.layer_loss(i, attention, teacher_pass, groups, alone)
            losses[i] = loss.detach()
            if torch.is_grad_enabled():
                # zeros, because data-parallel training waits for every parameter's gradient
                layer_gradients = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
                gradients.update(zip(own, layer_gradients, strict=True))
        total = torch.stack(list(losses.values())).mean()
        return WithGradients.apply(total, len(layers), list(gradients.values()), *parameters), losses

    def layer_loss(
        self, i: int, attention: DiJiangLinearAttention, teacher_pass: TeacherPass, groups, alone: bool
    ) -> torch.Tensor:
        """
        The squared error of a layer's attention over the squared target, summed over the combined output and the linear
        branch by their weights. With `trains: attention` outputs are compared after the output projection, whose weights
        train too, else before it. Heads that keep every token are the teacher's own and have no error.
        """
        config = self.stage
        target = teacher_pass.outputs[i]
        after = config.trains == "attention"
        with self.autocast(target.device):
            with nullcontext() if after else torch.no_grad():
                projected = attention.project(teacher_pass.inputs[i], teacher_pass.position_embeddings)
                own = [attention.take_linear_heads(x) for x in projected]
            by_head = target.unflatten(2, (attention.num_heads, -1))
            if after:
                target = self.teacher.model.layers[i].self_attn.o_proj(target)
            else:
                target = attention.take_linear_heads(by_head).flatten(2)
            target, total = target.float(), 0.0
            for weight, without_window in ((config.combined_weight, False), (config.linear_weight, True)):
                if alone:
                    weight = float(without_window)
                if not weight:
                    continue
                with linear_branch_alone(attention) if without_window else nullcontext():
                    output = attend(attention, own, groups)
                if after:
                    output = attention.with_kept_heads(by_head, output)
                    output = attention.o_proj(output.flatten(2).to(own[0].dtype))
                else:
                    output = output.flatten(2)
                total = total + weight * (output.float() - target).square().mean() / target.square().mean()
        return total

    @torch.no_grad()
    def calibrate(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> float | None:
        """
        Give all linear layers their closed-form start on input_ids (B, T), one document each; return the mean R^2 of the
        branch scales' fit, None if no layer has a window.
        """
        teacher_pass = run_teacher(self.teacher, input_ids, position_ids)
        fits = []
        for i, attention in linear_layers(self.student).items():
            with self.autocast(input_ids.device):
                projected = attention.project(teacher_pass.inputs[i], teacher_pass.position_embeddings)
            target = teacher_pass.outputs[i].float().view_as(projected.q)
            q, k, v, raw_k, target = (attention.take_linear_heads(x) for x in (*projected, target))
            fits.append(calibrate_layer(attention, q, k, v, target, self.stage.branch_scale_offset, raw_k))
        fits = [fit for fit in fits if fit is not None]
        return sum(fits) / len(fits) if fits else None


class WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to `parameters` are known already; `backward` returns them."""

    @staticmethod
    def forward(ctx, total, layers: int, gradients: list, *parameters):
        ctx.gradients, ctx.layers = gradients, layers
        return total.clone()

    @staticmethod
    def backward(ctx, grad):
        scale = grad / ctx.layers
        gradients = (None if gradient is None else gradient * scale for gradient in ctx.gradients)
        return None, None, None, *gradients


def refuse_what_cannot_be_aligned(student: DiJiangForCausalLM, config: AlignConfig) -> None:
    """Raise ValueError on a student without linear layers to train, or with outputs that softmax attention lacks."""
    if not linear_layers(student):
        raise ValueError("the checkpoint has no linear-attention layer, so there is nothing to align")
    if student.config.output_norm != "none" or student.config.output_gate:
        raise ValueError(
            "the checkpoint has output_norm or output_gate, so its outputs cannot be compared with softmax attention's; "
            "attention transfer is for layers without them, such as preset recommended or linear; leave the align section out"
        )
    if config.trains == "kernel" and not added_parameters(student):
        raise ValueError(
            "conversion added no parameters to the checkpoint's linear layers, so nothing can be aligned; set "
            "align.trains=attention"
        )
    windows = any(attention.window for attention in linear_layers(student).values())
    if not windows and (config.linear_weight or config.window_dropout):
        raise ValueError("linear_weight and window_dropout have no effect without a window; leave them out")


def trained_parameters(student: DiJiangForCausalLM, config: AlignConfig) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, by the name of their group."""
    groups = {"kernel": list(added_parameters(student).values()), "attention": []}
    if config.trains == "attention":
        for attention in linear_layers(student).values():
            groups["attention"] += [p for name in PROJECTIONS for p in getattr(attention, name).parameters()]
    return groups


def attend(
    attention: DiJiangLinearAttention, projected: Sequence[torch.Tensor], groups: list[PackedGroup] | None
) -> torch.Tensor:
    """
    The output (B, T, H, d) of heads that do not keep every token, from their `Projections`; documents of one row do not see
    each other.
    """
    q, k, v, raw_k = projected
    return attention.attend(q, k, v, raw_k=raw_k)[0] if groups is None else attention.attend_packed(q, k, v, groups, raw_k)


@contextmanager
def linear_branch_alone(attention: DiJiangLinearAttention) -> Iterator[None]:
    """Let the layer attend through its feature map to all tokens in the block, without window, sinks and exact memory."""
    saved = attention.window, attention.sinks, attention.slots
    attention.window = attention.sinks = 0
    attention.slots = (0,) * len(attention.slots)
    try:
        yield
    finally:
        attention.window, attention.sinks, attention.slots = saved
