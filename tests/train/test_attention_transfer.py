"""What a teacher pass keeps, and the losses made from it."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.modeling.linear_layer import linear_layers
from dijiang.train.attention_transfer import kernel_parameters, layer_losses, run_teacher


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
        found = kernel_parameters(student)
        assert found.keys() == added
        assert all(found[name] is student.get_parameter(name) for name in found)
    fixed = kernel_parameters(make_student(layer_types="linear_attention", decay="retnet"))
    assert fixed.keys() == {name for name in found if "decay" not in name}
    assert kernel_parameters(teacher) == {} and linear_layers(teacher) == {}


def test_linear_layers_by_their_index(make_student, teacher, tokens):
    student = make_student(layer_types=["full_attention", "linear_attention"])
    assert {i: layer.layer_idx for i, layer in linear_layers(student).items()} == {1: 1}
    assert [i for i, _ in layer_losses(student, run_teacher(teacher, tokens(12)))] == [1]


def test_losses_are_relative_squared_errors_of_the_heads_output(teacher, make_student, tokens):
    student, ids = make_student(), tokens(24)
    kept = run_teacher(teacher, ids)
    losses = dict(layer_losses(student, kept))
    assert losses.keys() == {0, 1}
    for i, layer in enumerate(student.model.layers):
        said = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, said=said: said.append(args[0]))
        layer.self_attn(kept.inputs[i], kept.position_embeddings)
        handle.remove()
        expected = ((said[0] - kept.outputs[i]) ** 2).sum() / (kept.outputs[i] ** 2).sum()
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0.01


def test_a_window_over_the_whole_text_leaves_no_loss(teacher, make_student, tokens):
    student = make_student(layer_types="linear_attention", attention_window=24)
    for _, loss in layer_losses(student, run_teacher(teacher, tokens(24))):
        assert loss < 1e-10


def test_gradients_reach_every_kernel_parameter_and_nothing_else(teacher, make_student, tokens):
    student = make_student()
    for _, loss in layer_losses(student, run_teacher(teacher, tokens(24))):
        loss.backward()
    kernels = kernel_parameters(student)
    for name, parameter in student.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (name in kernels), name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_layers_loss_moves_that_layer_only(teacher, make_student, tokens):
    student = make_student()
    for i, loss in layer_losses(student, run_teacher(teacher, tokens(24))):
        student.zero_grad(set_to_none=True)
        loss.backward()
        moved = {name.split(".")[2] for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert moved == {str(i)}


def test_losses_of_half_precision_models_are_float32(pair, tokens):
    teacher, student = (load_source(folder, dtype=torch.bfloat16)[0] for folder in pair)
    kept = run_teacher(teacher, tokens(24))
    assert kept.outputs[0].dtype == torch.bfloat16
    exact = dict(layer_losses(load_source(pair.checkpoint)[0], run_teacher(load_source(pair.teacher)[0], tokens(24))))
    for i, loss in layer_losses(student, kept):
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[i].item(), rel=0.1)
