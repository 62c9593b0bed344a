"""A pass of the teacher that records what its attention layers read and write."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle

from dijiang.common.hooks import hooks
from dijiang.modeling import DiJiangForCausalLM


@dataclass
class TeacherPass:
    """
    What a teacher's forward pass leaves for the student.

    Attributes:
        inputs: by layer, the hidden states (B, T, hidden) that enter attention, after the norm.
        outputs: by layer, the output of attention before its output projection, (B, T, H * d).
        position_embeddings: cos and sin, as the layers take them.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None

    def recorders(self, teacher: DiJiangForCausalLM) -> Iterator[RemovableHandle]:
        """Hooks on every layer of `teacher` that fill this object."""
        for i, layer in enumerate(teacher.model.layers):

            def record_input(module, args, kwargs, i=i):
                self.inputs[i] = args[0]
                self.position_embeddings = kwargs["position_embeddings"]

            def record_output(module, args, i=i):
                self.outputs[i] = args[0]

            yield layer.self_attn.register_forward_pre_hook(record_input, with_kwargs=True)
            yield layer.self_attn.o_proj.register_forward_pre_hook(record_output)


@torch.no_grad()
def run_teacher(teacher: DiJiangForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> TeacherPass:
    """
    Run `teacher`, a softmax model in our own decoder, on input_ids (B, T) at position_ids (B, T), and record what every
    layer's attention reads and writes.
    """
    teacher_pass = TeacherPass()
    with hooks(teacher_pass.recorders(teacher)):
        teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return teacher_pass
