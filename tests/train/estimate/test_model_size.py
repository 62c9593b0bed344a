"""Numbers of weights against real models and against parameters that require gradients."""

import math

import pytest
import torch
from dijiang_testing.estimates import BOTH, LLAMA, NEOX, PUBLISHED_SIZES, TIED, build_recipe
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from dijiang.checkpoint.shapes import SHAPES
from dijiang.convert import PRESETS, convert_model
from dijiang.convert.families import dijiang_config
from dijiang.modeling import DiJiangForCausalLM
from dijiang.train.estimate.estimate import estimate
from dijiang.train.recipe.schema import DistillConfig
from dijiang.train.stages.parameters import added_parameters, select_trained


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_published_sizes(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    total = estimate(build_recipe(name, **BOTH)).teacher.total
    assert total == sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_SIZES[name]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "settings", [{}, {"feature_dim": 5, "attention_window": 0, "attention_sinks": 0}, {"feature_map": "hedgehog"}]
)
def test_parameters_of_a_converted_model(make_source, tmp_path, family, settings):
    source, teacher = make_source(family, tie_word_embeddings=family == "llama")
    folder = convert_model(source, tmp_path / "converted", progress=False, **settings)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    costs = estimate(build_recipe(source, settings=settings, **BOTH))
    assert costs.student.total == sum(math.prod(shape) for shape in shapes.values())
    assert costs.teacher.total == sum(parameter.numel() for parameter in teacher.parameters())
    assert costs.student.added == costs.student.total - costs.teacher.total == costs.stages["align"].trained


@pytest.mark.parametrize("config", [LLAMA, NEOX, TIED], ids=["llama", "neox", "tied"])
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("recommended", {}),
        ("linear", {}),
        ("paper", {}),
        ("recommended", {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    ],
    ids=["recommended", "linear", "paper", "hybrid"],
)
def test_what_trains_is_what_the_stage_trains(known, config, preset, settings):
    changes = [{"trains": "all"}, {"trains": "all", "train_embeddings": True}, {"trains": "attention"}]
    changes += [{"trains": "all", "lora_rank": 3}, {"trains": "attention", "lora_rank": 2}]
    changes += [{"trains": "kernel"}] if preset == "recommended" else []
    for change in changes:
        student_config = dijiang_config(config, {"layer_types": "linear_attention"} | PRESETS[preset] | settings)
        student = DiJiangForCausalLM(student_config)
        added = sum(p.numel() for p in added_parameters(student).values())
        select_trained(student, DistillConfig(**change))
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        costs = estimate(build_recipe(known(config), distill=change, preset=preset, settings=settings))
        assert costs.stages["distill"].trained == trained, change
        assert costs.student.added == added
