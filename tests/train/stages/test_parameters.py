"""Which parameters conversion added. What trains is tested with the model that trains it, in test_distill.py."""

import pytest

from dijiang.convert import load_source
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train.stages.parameters import added_parameters


@pytest.fixture(scope="module")
def teacher(pair):
    return load_source(pair.teacher)[0]


@pytest.fixture
def make_student(pair):
    """make_student(**settings): the conversion of the teacher, with these settings; without any, the one on disk."""
    return lambda **settings: load_source(pair.teacher, **settings)[0] if settings else load_source(pair.checkpoint)[0]


def test_added_parameters_are_those_that_conversion_added(teacher, make_student):
    for settings in ({}, {"layer_types": "linear_attention", "decay": "learned"}):
        student = make_student(**settings)
        added = {name for name, _ in student.named_parameters()} - {name for name, _ in teacher.named_parameters()}
        parameters = added_parameters(student)
        assert parameters.keys() == added
        assert all(parameters[name] is student.get_parameter(name) for name in parameters)
    fixed = added_parameters(make_student(layer_types="linear_attention", decay="retnet"))
    assert fixed.keys() == {name for name in parameters if "decay" not in name}
    assert added_parameters(teacher) == {} and linear_layers(teacher) == {}


def test_linear_layers_by_their_index(make_student):
    student = make_student(layer_types=["full_attention", "linear_attention"])
    assert {i: layer.layer_idx for i, layer in linear_layers(student).items()} == {1: 1}
