"""Whether a teacher and a student belong together."""

from pathlib import Path

from dijiang.modeling import DiJiangForCausalLM

SAME_IN_TEACHER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def refuse_misfit(student: DiJiangForCausalLM, teacher_model: DiJiangForCausalLM, teacher: str | Path) -> None:
    """Raise ValueError unless `teacher_model` is a softmax model of the student's shape."""
    if teacher_model.config.has_linear_layers:
        raise ValueError(f"teacher {teacher} has linear-attention layers; give the softmax model that was converted")
    for key in SAME_IN_TEACHER:
        ours, theirs = getattr(student.config, key), getattr(teacher_model.config, key)
        if ours != theirs:
            raise ValueError(f"teacher {teacher} does not fit the checkpoint: {key} is {theirs}, expected {ours}")
