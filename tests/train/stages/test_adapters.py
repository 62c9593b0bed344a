"""Adapters on a student's matrices, and the plain weights they amount to."""

import sys

import pytest
import torch
from dijiang_testing.model_checks import random_ids, tiny_config, tiny_model

from dijiang.modeling import DiJiangForCausalLM
from dijiang.train.stages.adapters import add_adapters, merged_state

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


def adapted(seed=0, rank=3, alpha=5.0, dtype=torch.float32, **overrides):
    """A student whose adapters have moved away from their start."""
    student = tiny_model(seed, **overrides).to(dtype)
    add_adapters(student, MODULES, rank, alpha, seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return student


@pytest.mark.parametrize("seed", range(3))
def test_merged_weights_compute_what_the_adapters_do(seed):
    student, ids = adapted(seed, attention_bias=seed == 1), random_ids(2, 13, seed)
    merged = merged_state(student)
    assert merged.keys() == {f"{name}.weight" for name in MODULES}
    plain = tiny_model(seed, attention_bias=seed == 1)
    before = plain(ids).logits
    plain.load_state_dict(merged, strict=False)
    with torch.no_grad():
        expected, found = student(ids).logits, plain(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max(), "the adapters do nothing"
    assert type(student) is DiJiangForCausalLM


def test_a_fresh_adapter_changes_nothing_and_alone_trains():
    plain, student, ids = tiny_model(1), tiny_model(1), random_ids(2, 9)
    add_adapters(student, MODULES, 2, 4.0)
    assert torch.equal(student(ids).logits, plain(ids).logits)
    trains = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert len(trains) == 2 * len(MODULES) and all(".lora_" in name for name in trains)
    assert {min(p.shape) for p in trains.values()} == {2}


def test_the_seed_alone_decides_the_start():
    def start(seed):
        student = tiny_model(0)
        add_adapters(student, MODULES, 2, 4.0, seed)
        return torch.cat([p.detach().flatten() for name, p in student.named_parameters() if ".lora_A." in name])

    torch.manual_seed(5)
    first, state = start(3), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(first, start(3)) and not torch.equal(first, start(4))
    torch.manual_seed(5)
    tiny_model(0)
    assert torch.equal(torch.get_rng_state(), state), "adapters must not move the generator of everything else"


def test_merging_is_in_float32_on_bfloat16_weights():
    student = adapted(2, rank=2, alpha=6.0, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in student.parameters() if p.requires_grad)
    found = merged_state(student)
    for name in MODULES:
        module = student.get_submodule(name)
        down, up = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        right = module.base_layer.weight.double() + 6.0 / 2 * (up @ down)
        assert found[f"{name}.weight"].dtype == torch.float32
        assert (found[f"{name}.weight"] - right).abs().max() < 1e-6 * right.abs().max()


def test_gathered_values_take_the_place_of_the_students_own():
    """As where each process holds a shard: here every parameter is emptied after its value has been put aside."""
    student = adapted(3)
    student.get_parameter("model.norm.weight").requires_grad_(True)
    expected = {name: value.clone() for name, value in merged_state(student).items()}
    state = {name: p.detach().clone() for name, p in student.named_parameters()}
    for parameter in student.parameters():
        parameter.data = torch.empty(0)
    found = merged_state(student, state)
    assert found.keys() == expected.keys() and "model.norm.weight" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_adapters_what_trains_is_given_as_it_is():
    model = DiJiangForCausalLM(tiny_config())
    model.requires_grad_(False)
    chosen = model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(True)
    (name, value), *others = merged_state(model).items()
    assert name == "model.layers.1.mlp.up_proj.weight" and value.data_ptr() == chosen.data_ptr() and not others


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="needs the package peft"):
        add_adapters(tiny_model(0), MODULES, 2, 4.0)
