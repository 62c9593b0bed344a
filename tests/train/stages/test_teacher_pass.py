"""What a teacher pass keeps, and which parameters are the kernels'."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train.stages.parameters import added_parameters
from dijiang.train.stages.teacher_pass import run_teacher


@pytest.fixture(scope="module")
def teacher(pair):
    return load_source(pair.teacher)[0]


@pytest.fixture
def make_student(pair):
    """make_student(**settings): the conversion of the teacher, with these settings; without any, the one on disk."""
    return lambda **settings: load_source(pair.teacher, **settings)[0] if settings else load_source(pair.checkpoint)[0]


def test_captures_are_what_attention_reads_and_writes(teacher, tokens):
    ids = tokens(20)
    kept = run_teacher(teacher, ids)
    hidden = teacher.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    causal = torch.full((20, 20), -torch.inf).triu(1)
    assert kept.inputs.keys() == kept.outputs.keys() == {0, 1}
    for i, layer in enumerate(teacher.model.layers):
        assert torch.equal(kept.inputs[i], layer.input_layernorm(hidden[i]))
        attention = layer.self_attn
        given, _ = attention(kept.inputs[i], position_embeddings=kept.position_embeddings, attention_mask=None)
        assert (kept.outputs[i] @ attention.o_proj.weight.T - given).abs().max() < 1e-5
        # the layer: attention on the residual stream, then the MLP
        stream = hidden[i] + kept.outputs[i] @ attention.o_proj.weight.T
        after = stream + layer.mlp(layer.post_attention_layernorm(stream))
        if i + 1 < len(teacher.model.layers):  # the last hidden state is normed
            assert (after - hidden[i + 1]).abs().max() < 1e-4
        # softmax attention, written out
        q, k, v = (x.transpose(1, 2) for x in attention.project(kept.inputs[i], kept.position_embeddings))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        mixed = (q @ k.mT * 8**-0.5 + causal).softmax(-1) @ v
        assert (mixed.transpose(1, 2).flatten(2) - kept.outputs[i]).abs().max() < 1e-5
    cos, sin = kept.position_embeddings
    assert torch.equal(cos, teacher.model.rotary_emb(hidden[0], torch.arange(20)[None])[0]) and cos.shape == sin.shape


def test_a_teacher_pass_leaves_no_hooks_and_no_graph(teacher, tokens):
    kept = run_teacher(teacher, tokens(5))
    assert not any(x.requires_grad for x in (*kept.inputs.values(), *kept.outputs.values()))
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    with pytest.raises(IndexError):
        run_teacher(teacher, tokens(5) + 10_000)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_kernel_parameters_are_those_that_conversion_added(teacher, make_student):
    for settings in ({}, {"layer_types": "linear_attention", "decay": "learned"}):
        student = make_student(**settings)
        added = {name for name, _ in student.named_parameters()} - {name for name, _ in teacher.named_parameters()}
        found = added_parameters(student)
        assert found.keys() == added
        assert all(found[name] is student.get_parameter(name) for name in found)
    fixed = added_parameters(make_student(layer_types="linear_attention", decay="retnet"))
    assert fixed.keys() == {name for name in found if "decay" not in name}
    assert added_parameters(teacher) == {} and linear_layers(teacher) == {}


def test_linear_layers_by_their_index(make_student):
    student = make_student(layer_types=["full_attention", "linear_attention"])
    assert {i: layer.layer_idx for i, layer in linear_layers(student).items()} == {1: 1}


def test_positions_that_all_shift_leave_the_teachers_attention_as_it_is(teacher, tokens):
    ids = tokens(20)
    plain, shifted = (run_teacher(teacher, ids, torch.arange(start, start + 20)[None]) for start in (0, 17))
    for i in plain.outputs:
        assert (plain.outputs[i] - shifted.outputs[i]).abs().max() < 1e-4
    assert (plain.position_embeddings[0] - shifted.position_embeddings[0]).abs().max() > 0.1
    assert torch.equal(run_teacher(teacher, ids).outputs[1], plain.outputs[1])
