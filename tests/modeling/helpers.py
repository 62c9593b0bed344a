"""What the model tests share: tiny configs with every feature on, and comparison by relative error."""

import torch

from dijiang.modeling import FEATURE_MAPS, DiJiangConfig, DiJiangForCausalLM, build_feature_map
from dijiang.modeling.configuration_dijiang import SIGNED_MAPS

MAPS = tuple(FEATURE_MAPS)
DECAYS = ("none", "retnet", "learned")
WINDOWS = ((0, 0), (1, 0), (5, 2))
# every layer that a config allows: features with signs have no denominator that a window could share
EVERY = tuple(
    (name, decay, window) for name in MAPS for decay in DECAYS for window in (WINDOWS[:1] if name in SIGNED_MAPS else WINDOWS)
)


def tiny_config(**overrides) -> DiJiangConfig:
    """
    A two-layer decoder with grouped heads; the linear branch is loud, so that it shows in every output. A map whose features
    have signs gets neither normaliser nor window.
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
    """A random model in eval mode whose kernel parameters have moved away from their start."""
    torch.manual_seed(seed)
    model = DiJiangForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in ("feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay"):
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
