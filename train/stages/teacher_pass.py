"""What attention transfer works on: a student's kernel parameters, and what goes into and out of its teacher's attention."""

from dataclasses import dataclass, field

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
KERNEL_PARTS = ("feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay")


def kernel_parameters(model: DiJiangForCausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters that conversion added to the linear layers' kernels, by name; fixed decays are not among them."""
    found = {}
    for i, attention in linear_layers(model).items():
        for part in KERNEL_PARTS:
            # loading sets requires_grad on fixed parts all the same
            if part == "decay" and attention.config.decay != "learned":
                continue
            if part.startswith("feature_map") and not attention.config.learn_features:
                continue
            if (module := getattr(attention, part)) is not None:
                prefix = f"model.layers.{i}.self_attn.{part}"
                found |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


@dataclass
class TeacherPass:
    """
    What one teacher pass leaves for the student.

    Attributes:
        inputs: by layer, the hidden states (B, T, hidden) that enter attention, after the norm.
        outputs: by layer, what attention gives before its output projection, (B, T, H * d).
        position_embeddings: cos and sin, as the layers take them.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None


@torch.no_grad()
def run_teacher(teacher: DiJiangForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> TeacherPass:
    """
    Run `teacher`, a softmax model in our own decoder, on input_ids (B, T) at position_ids (B, T), and keep every layer's
    attention in and out.
    """
    kept, handles = TeacherPass(), []
    for i, layer in enumerate(teacher.model.layers):

        def keep_input(module, args, kwargs, i=i):
            kept.inputs[i] = args[0]
            kept.position_embeddings = kwargs["position_embeddings"]

        def keep_output(module, args, i=i):
            kept.outputs[i] = args[0]

        handles.append(layer.self_attn.register_forward_pre_hook(keep_input, with_kwargs=True))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(keep_output))
    try:
        teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept
