"""FLOPs and bytes against formulas written a second time, and against what autograd saves."""

import itertools

import pytest
import torch
from dijiang_testing.estimates import LLAMA, PUBLISHED_SIZES, build_recipe
from dijiang_testing.model_checks import tiny_config

from dijiang.checkpoint.shapes import SHAPES
from dijiang.modeling import DiJiangForCausalLM
from dijiang.train.estimate.estimate import GIB, estimate
from dijiang.train.estimate.stage_cost import LEVELS, layer_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [64, 0])
def test_flops(known, window, checkpointing):
    h, f, L, H, G, d, V, M, C = 48, 70, 3, 6, 2, 8, 331, 16, 64
    linear = 2 * h * H * d + 2 * h * G * d
    inside = L * (linear + 3 * h * f)
    P, soft = inside + h * V, 2 * H * d
    mix = 4 * (H + G) * M * d + 2 * H * C * (M + d) + (4 * H * d * (window + 4 + C) if window else 0)
    settings = {} if window else {"attention_window": 0, "attention_sinks": 0}
    align = {"tokens": 1000, "block_size": 64, "batch_size": 3, "start_block_size": 16}
    distill = {"tokens": 1001, "block_size": 40, "batch_size": 2}
    sections = {"align": align, "distill": distill, "settings": settings, "gradient_checkpointing": checkpointing}
    costs = estimate(build_recipe(known(LLAMA), **sections), gpus=3, gpu="l40s").stages
    # of 333 tokens each: 6 steps of 3 * 16, 3 of 3 * 32, 1 of 3 * 64
    tokens = 288 + 288 + 192
    T = (288 * 16 + 288 * 32 + 192 * 64) / tokens
    assert costs["align"].tokens == tokens
    assert costs["align"].flops["teacher"] == pytest.approx(tokens * (2 * inside + L * soft * T))
    assert costs["align"].flops["student"] == pytest.approx(tokens * L * (2 * linear + 3 * mix))
    tokens = 12 * 80
    assert costs["distill"].flops["teacher"] == pytest.approx(tokens * (2 * P + L * soft * 40))
    assert costs["distill"].flops["student forward"] == pytest.approx(tokens * (2 * P + L * mix))
    assert costs["distill"].flops["student backward"] == pytest.approx(tokens * (2 * P + 2 * inside + 2 * L * mix))
    again = tokens * (2 * inside + L * mix) if checkpointing else 0
    total = sum(costs["distill"].flops.values())
    assert total == pytest.approx(tokens * (8 * P + 2 * inside + L * (soft * 40 + 3 * mix)) - tokens * 2 * P + again)
    assert costs["distill"].hours == pytest.approx(total / (3 * 362e12 * 0.35 * 3600))


@pytest.mark.parametrize(
    ("change", "backward"),
    [
        ({"trains": "kernel"}, lambda P, inside, linear, sides: 2 * P),
        ({"trains": "attention"}, lambda P, inside, linear, sides: 2 * P + 2 * linear),
        ({"trains": "all", "train_embeddings": True}, lambda P, inside, linear, sides: 4 * P),
        ({"trains": "all", "lora_rank": 5}, lambda P, inside, linear, sides: 2 * P + 6 * 5 * sides),
    ],
)
def test_flops_of_what_is_frozen(known, change, backward):
    h, f, L, A, K, V = 48, 70, 3, 48, 16, 331
    linear = L * (2 * h * A + 2 * h * K)
    inside = linear + L * 3 * h * f
    sides = L * (2 * (h + A) + 2 * (h + K) + 3 * (h + f))
    distill = {"tokens": 64, "block_size": 64, "kl_weight": 0.0, "ce_weight": 1.0}
    stage = estimate(build_recipe(known(LLAMA), distill=distill | change)).stages["distill"]
    mixing = stage.flops["student forward"] - 64 * 2 * (inside + h * V)
    assert stage.flops["teacher"] == 0
    expected = 64 * backward(inside + h * V, inside, linear, sides) + 2 * mixing
    assert stage.flops["student backward"] == pytest.approx(expected)


@pytest.mark.parametrize(("gpu", "dtype", "e"), [("h100", "auto", 2), ("h100", "float32", 4), ("v100", "auto", 4)])
@pytest.mark.parametrize("N", [1, 8])
def test_bytes_of_the_model(gpu, dtype, e, N):
    name = "EleutherAI/pythia-2.8b"
    result = estimate(build_recipe(name, distill={}, dtype=dtype), gpu=gpu, gpus=N)
    cost, p = result.stages["distill"], PUBLISHED_SIZES[name]
    t = cost.trained
    z = result.student.total - t
    t_m = t - result.student.added
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


def test_a_teacher_takes_memory_only_where_it_runs(known):
    def teacher(**distill):
        return estimate(build_recipe(known(LLAMA), distill=distill)).stages["distill"].memory["zero2"]["teacher"]

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

    def saved_bytes(layers: int) -> int:
        torch.manual_seed(0)
        model = DiJiangForCausalLM(tiny_config(**settings, num_hidden_layers=layers)).train()
        tensors = itertools.chain(model.parameters(), model.buffers())
        own, casts = set(), set()
        for tensor in tensors:
            own.add(tensor.untyped_storage().data_ptr())
            casts |= {tuple(tensor.shape), tuple(tensor.shape[::-1])}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tuple(tensor.shape) not in casts:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(1, T, model.config.hidden_size, dtype=torch.bfloat16 if half else torch.float32)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = model.model(inputs_embeds=x, use_cache=False)
        assert result.last_hidden_state.requires_grad
        return sum(storages.values())

    measured = (saved_bytes(3) - saved_bytes(1)) / 2 / T
    assert layer_bytes(tiny_config(**settings), 2 if half else 4) == pytest.approx(measured, rel=0.15)
