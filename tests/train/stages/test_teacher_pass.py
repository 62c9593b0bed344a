"""A teacher pass records what attention reads and writes, and leaves no hooks."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.train.stages.teacher_pass import run_teacher


@pytest.fixture(scope="module")
def teacher(pair):
    return load_source(pair.teacher)[0]


def test_captures_are_what_attention_reads_and_writes(teacher, tokens):
    ids = tokens(20)
    teacher_pass = run_teacher(teacher, ids)
    hidden = teacher.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    causal = torch.full((20, 20), -torch.inf).triu(1)
    assert teacher_pass.inputs.keys() == teacher_pass.outputs.keys() == {0, 1}
    for i, layer in enumerate(teacher.model.layers):
        assert torch.equal(teacher_pass.inputs[i], layer.input_layernorm(hidden[i]))
        attention = layer.self_attn
        settings = {"position_embeddings": teacher_pass.position_embeddings, "attention_mask": None}
        output, _ = attention(teacher_pass.inputs[i], **settings)
        assert (teacher_pass.outputs[i] @ attention.o_proj.weight.T - output).abs().max() < 1e-5
        # the layer: attention on the residual stream, then the MLP
        stream = hidden[i] + teacher_pass.outputs[i] @ attention.o_proj.weight.T
        after = stream + layer.mlp(layer.post_attention_layernorm(stream))
        if i + 1 < len(teacher.model.layers):  # the last hidden state is normed
            assert (after - hidden[i + 1]).abs().max() < 1e-4
        # softmax attention, written out
        q, k, v = (x.transpose(1, 2) for x in attention.project(teacher_pass.inputs[i], teacher_pass.position_embeddings)[:3])
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        mixed = (q @ k.mT * 8**-0.5 + causal).softmax(-1) @ v
        assert (mixed.transpose(1, 2).flatten(2) - teacher_pass.outputs[i]).abs().max() < 1e-5
    cos, sin = teacher_pass.position_embeddings
    assert torch.equal(cos, teacher.model.rotary_emb(hidden[0], torch.arange(20)[None])[0]) and cos.shape == sin.shape


def test_a_teacher_pass_leaves_no_hooks_and_no_graph(teacher, tokens):
    teacher_pass = run_teacher(teacher, tokens(5))
    assert not any(x.requires_grad for x in (*teacher_pass.inputs.values(), *teacher_pass.outputs.values()))
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    with pytest.raises(IndexError):
        run_teacher(teacher, tokens(5) + 10_000)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_positions_that_all_shift_leave_the_teachers_attention_as_it_is(teacher, tokens):
    ids = tokens(20)
    plain, shifted = (run_teacher(teacher, ids, torch.arange(start, start + 20)[None]) for start in (0, 17))
    for i in plain.outputs:
        assert (plain.outputs[i] - shifted.outputs[i]).abs().max() < 1e-4
    assert (plain.position_embeddings[0] - shifted.position_embeddings[0]).abs().max() > 0.1
    assert torch.equal(run_teacher(teacher, ids).outputs[1], plain.outputs[1])
