"""Gates: closed they are the student, open they are the teacher, and their gradient is that of the loss."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, tiny_model

from dijiang.convert.selection.gates import candidates, count_heads, head_gates, wrapped_attention
from dijiang.convert.selection.job import SelectionJob, answer_loss, frozen, gate_gradient


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("gradient", [False, True])
def test_closed_gates_are_the_student_and_open_ones_the_teacher(teacher, student, tokens, gradient):
    ids = tokens(40)
    gates = torch.zeros(2, 2, requires_grad=gradient)
    own = logits(student, ids)
    with head_gates(student, gates):
        assert_close(logits(student, ids), own, "closed")
    with head_gates(student, torch.ones(2, 2, requires_grad=gradient)):
        opened = logits(student, ids)
    assert_close(opened, logits(teacher, ids), "open")
    assert not torch.allclose(opened, own, atol=1e-2)
    assert torch.equal(logits(student, ids), own)


def test_one_open_gate_changes_its_own_head_alone(student, tokens):
    """The output projection is fed by the head's group of query heads, and only their features change."""
    ids, fed = tokens(30), []
    layer = student.model.layers[0].self_attn
    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: fed.append(args[0].view(2, 30, 4, 8)))
    gates = torch.zeros(2, 2)
    gates[0, 1] = 1.0
    logits(student, ids)
    with head_gates(student, gates):
        logits(student, ids)
    handle.remove()
    changed = (fed[0] - fed[1]).abs().amax((0, 1, 3)) > 1e-4
    assert changed.tolist() == [False, False, True, True]


def test_the_gradient_is_that_of_the_loss(student, random_samples):
    (sample,) = random_samples(1)
    gates = torch.tensor([[0.2, 0.7], [0.4, 0.1]])

    def loss(gates):
        with torch.no_grad(), head_gates(student, gates):
            return answer_loss(student, sample)[0].item()

    with frozen(student):
        gradient, mean, share = gate_gradient(student, gates, [lambda: answer_loss(student, sample)] * 3, lambda done: None)
    assert mean == pytest.approx(loss(gates)) and share in (0.0, 0.5, 1.0)
    step = 2e-2
    for i in range(2):
        for g in range(2):
            change = torch.zeros(2, 2)
            change[i, g] = step
            expected = (loss(gates + change) - loss(gates - change)) / (2 * step)
            assert gradient[i, g].item() == pytest.approx(expected, rel=1e-2, abs=1e-3), (i, g)


def test_softmax_layers_have_no_gate_that_does_anything():
    kinds = ["full_attention", "linear_attention"]
    model = tiny_model(layer_types=kinds).requires_grad_(False)
    ids = random_ids(1, 30)
    assert candidates(model) == [(1, 0), (1, 1)]
    gates = torch.zeros(2, 2)
    gates[0] = 1.0
    own = logits(model, ids)
    with head_gates(model, gates):
        assert torch.equal(logits(model, ids), own)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_half_precision_by_autocast_reaches_the_layers_own_attention_once(student, tokens, value):
    gates = torch.full((2, 2), value)
    with torch.no_grad(), head_gates(student, gates), torch.autocast("cpu", torch.bfloat16):
        found = logits(student, tokens(30))
    with torch.no_grad(), head_gates(student, gates):
        expected = logits(student, tokens(30))
    assert_close(found.float(), expected, "logits", tolerance=0.1)


def test_what_gates_cannot_do_is_refused_and_layers_are_left_as_they_were(student, tokens):
    ids = tokens(12)
    with (
        pytest.raises(ValueError, match=r"gates have shape \(2, 3\); the model's heads need \(2, 2\)"),
        head_gates(student, torch.zeros(2, 3)),
    ):
        pass
    cache = student(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no cache"), head_gates(student, torch.zeros(2, 2)):
        student(input_ids=ids, past_key_values=cache)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="no padding"), head_gates(student, torch.zeros(2, 2)):
        student(input_ids=ids, attention_mask=mask, use_cache=False)
    student.model.layers[1].self_attn.full_heads = [0]
    with pytest.raises(ValueError, match="layer 1 keeps heads already"), head_gates(student, torch.zeros(2, 2)):
        pass
    assert all("attend" not in vars(layer.self_attn) for layer in student.model.layers)


def test_a_block_inside_another_wraps_it_and_gives_it_back(student, tokens):
    calls = []

    def counting(i, layer, attend):
        return lambda *args, **kwargs: calls.append(i) or attend(*args, **kwargs)

    ones = torch.ones(count_heads(student))
    with torch.no_grad(), head_gates(student, ones):
        outer = logits(student, tokens(20))
        with wrapped_attention(student, counting):
            assert torch.equal(logits(student, tokens(20)), outer)
        assert torch.equal(logits(student, tokens(20)), outer)
    assert calls == [0, 1]


def test_a_frozen_model_gets_its_mode_and_gradients_back(student):
    student.train()
    student.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    with frozen(student):
        assert not student.training and not any(p.requires_grad for p in student.parameters())
    assert student.training and before == {name: p.requires_grad for name, p in student.named_parameters()}


def test_gates_of_a_job_are_one_where_heads_are_kept(student):
    job = SelectionJob(model=student, heads=1)
    assert job.gates(kept=[(1, 0)]).tolist() == [[0, 0], [1, 0]]
    assert job.gates(0.5).tolist() == [[0.5, 0.5], [0.5, 0.5]]
