"""What the model tests share: tiny configs with every feature on, and comparison by relative error."""

import torch

from dijiang.modeling import FEATURE_MAPS, DiJiangConfig, DiJiangForCausalLM, build_feature_map

MAPS = tuple(FEATURE_MAPS)
SIGNED_MAPS = tuple(name for name, feature_map in FEATURE_MAPS.items() if not feature_map.positive)
DECAYS = ("none", "retnet", "learned")
WINDOWS = ((0, 0), (1, 0), (5, 2))
# what a layer may remember besides its window, as settings by name
MEMORIES = {
    "slots": {"attention_memory": 3, "memory_score": "learned"},
    "kept": {"full_heads": [[0], [1]]},
    "both": {"full_heads": [[1], []], "attention_memory": [[4, 2], [1, 3]], "memory_score": "learned"},
}
# every layer that a config allows, (map, decay, (window, sinks[, memory])): features with signs have no denominator that a
# window could share
EVERY = tuple(
    (name, decay, window)
    for name in MAPS
    for decay in DECAYS
    for window in (WINDOWS[:1] if name in SIGNED_MAPS else (*WINDOWS, *((*WINDOWS[-1], memory) for memory in MEMORIES)))
)
# the same for a state that overwrites, which needs no denominator: (..., "delta")
DELTA = tuple(
    (name, decay, window, "delta")
    for name, decay in (*(("wdcf", decay) for decay in DECAYS), ("identity", "learned"), ("cosformer", "none"))
    for window in (*WINDOWS, *((*WINDOWS[-1], memory) for memory in MEMORIES))
)
EVERY += DELTA


def case_settings(case: tuple) -> dict:
    """The settings of a case of `EVERY`."""
    feature_map, decay, (window, sinks, *memory), *update = case
    settings = {"feature_map": feature_map, "decay": decay, "attention_window": window, "attention_sinks": sinks}
    if update:
        settings |= {"state_update": update[0], "normalize": True}
    return settings | (MEMORIES[memory[0]] if memory else {})


# models of every kind of layer
CASES = {
    "wdcf": {},
    "hedgehog": {"feature_map": "hedgehog", "decay": "retnet", "attention_window": 0, "attention_sinks": 0},
    "elu": {"feature_map": "elu", "decay": "learned"},
    "mixed": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
        "sliding_window": 4,
        "decay": "learned",
    },
    "memories": {"full_heads": [[1], [0, 1]], "attention_memory": 3, "memory_score": "learned"},
}


def tiny_config(**overrides) -> DiJiangConfig:
    """
    A two-layer decoder with grouped heads; the linear branch has a large share, so that it shows in every output. A map whose
    features have signs gets neither normalization nor window.
    """
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "feature_dim": 11,
        "attention_window": 5,
        "attention_sinks": 2,
        "branch_scale_init": 0.5,
        "initializer_range": 0.3,
    }
    if overrides.get("feature_map") in SIGNED_MAPS:
        settings |= {"normalize": False, "attention_window": 0, "attention_sinks": 0}
    return DiJiangConfig(**settings | overrides)


def build_map(name: str, *, heads: int = 3, seed: int = 0, **overrides):
    """A fresh feature map for heads of size 8, unless `overrides` say otherwise."""
    return build_feature_map(tiny_config(feature_map=name, **overrides), heads, seed)


def features(feature_map, x: torch.Tensor) -> torch.Tensor:
    """phi of x (B, T, H, d) at positions 0 .. T - 1."""
    return feature_map(x, torch.arange(x.shape[1]).expand(x.shape[:2]))


def rows(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tiny_model(seed: int = 0, **overrides) -> DiJiangForCausalLM:
    """A random model in eval mode whose added parameters have moved away from their start."""
    torch.manual_seed(seed)
    model = DiJiangForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in ("feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay", "memory_score"):
                module = getattr(layer.self_attn, part, None)
                for parameter in module.parameters() if module is not None else ():
                    parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_ids(B: int, T: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def set_mode(model, mode: str | None) -> None:
    """Make every linear layer compute by `mode`."""
    for layer in model.model.layers:
        layer.self_attn.mode = mode


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float = 2e-5) -> None:
    """Largest error, relative to the largest value expected."""
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6)
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys() and expected
    for name in expected:
        if not name.endswith("key_scale.bias"):  # where it cancels in the denominator its gradient is noise
            assert_close(found[name], expected[name], name, tolerance)


def op_inputs(shape, decay: str, seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of linear_attention, all requiring gradients: shape (B, T, H, G, m, d), decay none, constant or per_token."""
    B, T, H, G, m, d = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    q, k, v = draw(B, T, H, m).exp(), draw(B, T, G, m).exp(), draw(B, T, G, d)
    log_decay = {"none": None, "constant": -draw(G).exp() / 8, "per_token": -draw(B, T, G).exp() / 8}[decay]
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    if log_decay is not None:
        tensors["log_decay"] = log_decay
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def random_state(shape, normalize: bool, seed: int, sequences: int | None = None) -> torch.Tensor:
    """An initial state for `op_inputs` of this shape, one for each of `sequences` if they are packed."""
    B, _, _, G, m, d = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sequences or B, G, m, d + normalize, generator=generator).requires_grad_()


def values_and_gradients(inputs: dict[str, torch.Tensor], call, seed: int = 4) -> dict[str, torch.Tensor]:
    """(o, final state) of `call(**inputs)`, and the gradients of a random sum of both in every input."""
    outputs = dict(zip(("o", "final state"), call(**inputs), strict=True))
    generator = torch.Generator().manual_seed(seed)
    # numbers that every dtype holds exactly
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs.values()]
    found = torch.autograd.grad(tuple(outputs.values()), list(inputs.values()), cotangents)
    return outputs | {f"d{name}": gradient for name, gradient in zip(inputs, found, strict=True)}
