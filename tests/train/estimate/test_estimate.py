"""The estimate: counts against real models, FLOPs and bytes against formulas written a second time."""

import itertools
import math

import pytest
import torch
from dijiang_testing.model_checks import tiny_config
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from dijiang.checkpoint.shapes import SHAPES
from dijiang.convert import PRESETS, convert_model
from dijiang.convert.families import dijiang_config
from dijiang.modeling import DiJiangForCausalLM
from dijiang.train.estimate.estimate import GIB, LEVELS, estimate, layer_bytes, render
from dijiang.train.estimate.hardware import DEVICES
from dijiang.train.recipe.schema import (
    AlignConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)
from dijiang.train.stages.distill import prepare
from dijiang.train.stages.parameters import added_parameters

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
}
SMALL = {"vocab_size": 331, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 6}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2)
NEOX = GPTNeoXConfig(**SMALL, tie_word_embeddings=False)
TIED = LlamaConfig(**SMALL, num_key_value_heads=3, tie_word_embeddings=True)


def recipe(source="nowhere", *, align=None, distill=None, settings=None, preset="recommended", **run) -> Recipe:
    return Recipe(
        source=str(source),
        output="out",
        data=DataConfig(train=[SourceConfig(path="text.txt")]),
        convert=ConvertConfig(preset=preset, settings=settings or {}),
        align=None if align is None else AlignConfig(**align),
        distill=None if distill is None else DistillConfig(**distill),
        run=RunConfig(**run),
    )


BOTH = {"align": {}, "distill": {}}


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_published_sizes(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    found = estimate(recipe(name, **BOTH)).teacher.total
    assert found == sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "settings", [{}, {"feature_dim": 5, "attention_window": 0, "attention_sinks": 0}, {"feature_map": "hedgehog"}]
)
def test_parameters_of_a_converted_model(make_source, tmp_path, family, settings):
    source, teacher = make_source(family, tie_word_embeddings=family == "llama")
    folder = convert_model(source, tmp_path / "converted", progress=False, **settings)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    found = estimate(recipe(source, settings=settings, **BOTH))
    assert found.student.total == sum(math.prod(shape) for shape in shapes.values())
    assert found.teacher.total == sum(parameter.numel() for parameter in teacher.parameters())
    assert found.student.kernel == found.student.total - found.teacher.total == found.stages["align"].trained


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
def test_what_trains_is_what_the_stage_trains(config, preset, settings):
    changes = [{"trains": "all"}, {"trains": "all", "train_embeddings": True}, {"trains": "attention"}]
    changes += [{"trains": "all", "lora_rank": 3}, {"trains": "attention", "lora_rank": 2}]
    changes += [{"trains": "kernel"}] if preset == "recommended" else []
    for change in changes:
        made = dijiang_config(config, {"layer_types": "linear_attention"} | PRESETS[preset] | settings)
        student = DiJiangForCausalLM(made)
        kernel = sum(p.numel() for p in added_parameters(student).values())
        prepare(student, DistillConfig(**change))
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        found = estimate(recipe(distill=change, preset=preset, settings=settings), shape=config)
        assert found.stages["distill"].trained == trained, change
        assert found.student.kernel == kernel


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [64, 0])
def test_flops(window, checkpointing):
    h, f, L, H, G, d, V, M, C = 48, 70, 3, 6, 2, 8, 331, 16, 64
    linear = 2 * h * H * d + 2 * h * G * d
    inside = L * (linear + 3 * h * f)
    P, soft = inside + h * V, 2 * H * d
    mix = 4 * (H + G) * M * d + 2 * H * C * (M + d) + (4 * H * d * (window + 4 + C) if window else 0)
    settings = {} if window else {"attention_window": 0, "attention_sinks": 0}
    align = {"tokens": 1000, "block_size": 64, "batch_size": 3, "start_block_size": 16}
    distill = {"tokens": 1001, "block_size": 40, "batch_size": 2}
    made = recipe(align=align, distill=distill, settings=settings, gradient_checkpointing=checkpointing)
    found = estimate(made, shape=LLAMA, gpus=3, gpu="l40s").stages
    # of 333 tokens each: 6 steps of 3 * 16, 3 of 3 * 32, 1 of 3 * 64
    tokens = 288 + 288 + 192
    T = (288 * 16 + 288 * 32 + 192 * 64) / tokens
    assert found["align"].tokens == tokens
    assert found["align"].flops["teacher"] == pytest.approx(tokens * (2 * inside + L * soft * T))
    assert found["align"].flops["student"] == pytest.approx(tokens * L * (2 * linear + 3 * mix))
    tokens = 12 * 80
    assert found["distill"].flops["teacher"] == pytest.approx(tokens * (2 * P + L * soft * 40))
    assert found["distill"].flops["student forward"] == pytest.approx(tokens * (2 * P + L * mix))
    assert found["distill"].flops["student backward"] == pytest.approx(tokens * (2 * P + 2 * inside + 2 * L * mix))
    again = tokens * (2 * inside + L * mix) if checkpointing else 0
    total = sum(found["distill"].flops.values())
    assert total == pytest.approx(tokens * (8 * P + 2 * inside + L * (soft * 40 + 3 * mix)) - tokens * 2 * P + again)
    assert found["distill"].hours == pytest.approx(total / (3 * 362e12 * 0.35 * 3600))


@pytest.mark.parametrize(
    ("change", "backward"),
    [
        ({"trains": "kernel"}, lambda P, inside, linear, sides: 2 * P),
        ({"trains": "attention"}, lambda P, inside, linear, sides: 2 * P + 2 * linear),
        ({"trains": "all", "train_embeddings": True}, lambda P, inside, linear, sides: 4 * P),
        ({"trains": "all", "lora_rank": 5}, lambda P, inside, linear, sides: 2 * P + 6 * 5 * sides),
    ],
)
def test_flops_of_what_is_frozen(change, backward):
    h, f, L, A, K, V = 48, 70, 3, 48, 16, 331
    linear = L * (2 * h * A + 2 * h * K)
    inside = linear + L * 3 * h * f
    sides = L * (2 * (h + A) + 2 * (h + K) + 3 * (h + f))
    distill = {"tokens": 64, "block_size": 64, "kl_weight": 0.0, "ce_weight": 1.0}
    stage = estimate(recipe(distill=distill | change), shape=LLAMA).stages["distill"]
    mixing = stage.flops["student forward"] - 64 * 2 * (inside + h * V)
    assert stage.flops["teacher"] == 0
    expected = 64 * backward(inside + h * V, inside, linear, sides) + 2 * mixing
    assert stage.flops["student backward"] == pytest.approx(expected)


@pytest.mark.parametrize(("gpu", "dtype", "e"), [("h100", "auto", 2), ("h100", "float32", 4), ("v100", "auto", 4)])
@pytest.mark.parametrize("N", [1, 8])
def test_bytes_of_the_model(gpu, dtype, e, N):
    name = "EleutherAI/pythia-2.8b"
    found = estimate(recipe(name, distill={}, dtype=dtype), gpu=gpu, gpus=N)
    cost, p = found.stages["distill"], PUBLISHED[name]
    t = cost.trained
    z = found.student.total - t
    t_m = t - found.student.kernel
    live, bucket = 5e8 / (t + z), 5e7
    w = 4 * t + e * z
    copies = 2 * t_m if e == 2 else 0
    expected = {  # weights, copies, gradients, master weights, optimizer states, buffers
        "zero0": (w, copies, 4 * t, 0, 8 * t, 4 * t if N > 1 else 0),
        "zero1": (w, copies, 4 * t, 4 * t / N, 8 * t / N, 4 * bucket),
        "zero2": (w, copies, 4 * t / N, 4 * t / N, 8 * t / N, 4 * bucket),
        "zero3": (w / N + w * live, copies, 4 * t / N, 0, 8 * t / N, 8 * bucket),
        "zero2_offload": (w, copies, 0, 0, 0, 4 * bucket),
        "zero3_offload": (w * live, copies, 0, 0, 0, 8 * bucket),
    }
    assert set(expected) == set(LEVELS)
    for level, parts in expected.items():
        memory = cost.memory[level]
        assert list(memory.values())[:6] == pytest.approx(parts), level
        assert memory["teacher"] == e * p and memory["runtime"] == GIB
        n, V = 1024, 50304
        assert memory["logits"] == (16 + 2 * e) * 256 * V
        assert memory["activations"] == cost.activations[False]
        assert cost.activations[False] - cost.activations[True] == pytest.approx(
            n * (31 * cost_of_layer(name, e) - e * 32 * 2560)
        )
    assert cost.host["zero2"] == 0 and cost.host["zero2_offload"] == pytest.approx(16 * t / N)
    assert cost.host["zero3_offload"] == pytest.approx((16 * t + w) / N)


def cost_of_layer(name: str, e: int) -> float:
    """Written out for one GPT-NeoX shape with the recommended preset."""
    shape = SHAPES[name]
    h, f, H = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    d = h // H
    M = 2 * d
    branch = (8 + 2.5 * e) * h + (3 + e) * H * M + (10 + 2 * e) * H * M + 8 / e * H * M * d / 64
    return 3 * e * h + 2 * e * f + branch + 4.6 * H * (64 + 4 + 65) + 8 * h


def test_a_teacher_takes_memory_only_where_it_runs():
    def teacher(**distill):
        return estimate(recipe(distill=distill), shape=LLAMA).stages["distill"].memory["zero2"]["teacher"]

    assert teacher() > 0 and teacher(teacher_top_k=16) == teacher(kl_weight=0.0, ce_weight=1.0) == 0


SHAPES_OF_LAYERS = [
    {},
    {"num_key_value_heads": 6, "feature_dim": 24},
    {"norm_type": "layer_norm", "mlp_type": "plain", "parallel_residual": True, "num_key_value_heads": 3},
    {"attention_window": 0, "attention_sinks": 0, "intermediate_size": 333},
    {"attention_window": 1, "decay": "learned", "feature_map": "ldcf"},
    {"decay": "retnet"},
    {"hidden_size": 192, "num_attention_heads": 4, "head_dim": 40},
]


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("change", SHAPES_OF_LAYERS)
def test_bytes_that_a_layer_keeps(change, half):
    """The fitted formula against what autograd saves, by unique storage, per token of one layer more."""
    settings = {"hidden_size": 144, "intermediate_size": 200, "num_attention_heads": 6, "head_dim": 24, "feature_dim": None}
    settings |= {"num_key_value_heads": 2, "attention_window": 64, "attention_sinks": 4} | change
    T = 320

    def kept(layers: int) -> int:
        torch.manual_seed(0)
        model = DiJiangForCausalLM(tiny_config(**settings, num_hidden_layers=layers)).train()
        tensors = itertools.chain(model.parameters(), model.buffers())
        own, casts = set(), set()
        for tensor in tensors:
            own.add(tensor.untyped_storage().data_ptr())
            casts |= {tuple(tensor.shape), tuple(tensor.shape[::-1])}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tuple(tensor.shape) not in casts:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1, T, model.config.hidden_size, dtype=torch.bfloat16 if half else torch.float32)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = model.model(inputs_embeds=x, use_cache=False)
        assert result.last_hidden_state.requires_grad
        return sum(found.values())

    found = (kept(3) - kept(1)) / 2 / T
    assert layer_bytes(tiny_config(**settings), 2 if half else 4) == pytest.approx(found, rel=0.15)


def test_what_fits_is_marked():
    found = estimate(recipe("meta-llama/Llama-2-7b-hf", distill={}, deepspeed="zero3"), gpu="h100", gpus=8)
    text = render(found).splitlines()
    marks = next(line for line in text if line.strip().startswith("of 79 GiB"))
    for level in LEVELS:
        total = sum(found.stages["distill"].memory[level].values()) / GIB
        assert found.fits("distill", level) == (total <= 0.9 * DEVICES["h100"].memory)
    assert not found.fits("distill", "zero0") and found.fits("distill", "zero3")
    assert marks.count("fits") + marks.count("too large") == len(LEVELS) and "too large" in marks
    assert text[0].startswith("meta-llama/Llama-2-7b-hf: 6,738,415,616 parameters")
    assert "8 x h100 at 35% of its peak: distill" in text[1] and text[1].endswith("GiB per device with zero3")


def test_a_deepspeed_file_of_the_users_own_has_no_level():
    found = estimate(recipe(distill={}, deepspeed="mine.json"), shape=LLAMA)
    assert found.level is None and "with" not in found.summary


def test_refusals(pair, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain = recipe(distill={})
    refused(tmp_path, lambda: estimate(plain, gpu="h1000", shape=LLAMA), "^gpu 'h1000' is unknown; choose from h200, ")
    refused(tmp_path, lambda: estimate(plain, gpus=0, shape=LLAMA), "^gpus=0 must be at least 1$")
    refused(
        tmp_path, lambda: estimate(recipe(pair.checkpoint, distill={})), "is a dijiang model, whose conversion starts from"
    )
    refused(tmp_path, lambda: estimate(plain, shape={"model_type": "bert"}), "^nowhere is a bert model")
    refused(tmp_path, lambda: estimate(recipe("nobody/nothing-here", distill={})), "^the config of nobody/nothing-here cannot")
