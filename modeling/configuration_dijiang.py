"""Configuration of a DiJiang model: one decoder shape for every source family, and the settings of its linear layers."""

import math
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PretrainedConfig

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
AUTO_MAP = {
    "AutoConfig": "configuration_dijiang.DiJiangConfig",
    "AutoModel": "modeling_dijiang.DiJiangModel",
    "AutoModelForCausalLM": "modeling_dijiang.DiJiangForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dijiang.DiJiangForSequenceClassification",
}
CHOICES = {
    "norm_type": ("rms_norm", "layer_norm"),
    "mlp_type": ("gated", "plain"),
    "feature_activation": ("softmax", "exp"),
    "radial": ("normal", "chi"),
    "dct_direction": ("forward", "inverse"),
    "decay": ("none", "retnet", "learned"),
    "output_norm": ("none", "group_norm"),
    "state_update": ("sum", "delta"),
}
# classes by name. This file may not import torch, so `register_feature_map` fills it when the files of the maps are imported
FEATURE_MAPS: dict[str, Any] = {}
# as FEATURE_MAPS, filled by `register_memory_score`
MEMORY_SCORES: dict[str, Any] = {}
# the type of a field that is None until `__post_init__` fills it. Whoever reads the field never meets None
Value = TypeVar("Value")
if TYPE_CHECKING:
    Filled = Annotated[Value, "filled by __post_init__"]
else:
    Filled = Value | None
LATER: Any = None


def check_feature_map(config: "DiJiangConfig") -> None:
    """
    Raise ValueError on an unknown feature map, or on one with negative features under a denominator. Where only this file is
    imported no map is known, and nothing is checked; `build_feature_map` checks again.
    """
    if FEATURE_MAPS and config.feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={config.feature_map!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}")
    sums = config.normalize and getattr(config, "state_update", "sum") == "sum"
    if FEATURE_MAPS and sums and not FEATURE_MAPS[config.feature_map].positive:
        raise ValueError(
            f"feature_map={config.feature_map} has negative features, whose sum is no denominator; "
            "set normalize=false attention_window=0 attention_sinks=0, or state_update=delta"
        )


@strict
class DiJiangConfig(PretrainedConfig):
    """
    Shape of the decoder (`norm_type`, `mlp_type`, `parallel_residual`, biases, `rope_parameters`) and of its layers.

    `layer_types` has one entry per layer: `linear_attention`, `full_attention` or `sliding_attention`; by default all are
    linear. A linear layer attends exactly (softmax) to the last `attention_window` tokens, itself included, to the first
    `attention_sinks` tokens and to the `attention_memory` tokens between them that score highest, and through its feature map
    to all the rest. Its key/value heads in `full_heads` keep every token instead: softmax over everything.

    Args (of a linear layer):
        feature_map: name of a registered map, see feature_map_base.py. `cosformer` counts positions up to
            max_position_embeddings; `identity` is plain q.k and needs normalize=False or state_update=delta.
        feature_dim: m, features per head before pairing. `None` means the head size, the only value for maps without weights
            (`elu`, `cosformer`, `identity`).
        feature_activation: `exp` (the paper's, equation 12) or `softmax` over the features of one row.
        feature_pairs: use [z, -z] instead of z, which doubles the feature size.
        key_scale: weigh each key in the state by exp(u.k + b), learned per key/value head: features normalized by a softmax
            cannot tell an important key from an unimportant one. With `state_update: delta` sigmoid(u.k + b) is how much of
            what the state holds for the key is replaced; without it all of it is.
        feature_seed: seed of the maps' initial weights; layer i draws from `feature_seed + i`.
        learn_features: train the maps' weights; the paper's released code leaves them as they were drawn.
        scale_features: scale queries and keys by head_dim**-0.25 each before the map, so that it faces softmax's own logits.
        radial: law of the initial radii: `normal` (the paper's) or `chi` (unbiased for d > 1).
        dct_direction: `forward` (the paper's text) or `inverse` (its released code).
        state_update: `sum` adds each value to what the state holds; `delta` takes out first what it holds for the key (see
            delta_rule.py). Features then have length 1, and the state has no sum of weights: its answer counts exp(c(q)).
        decay: `none`, `retnet` (fixed per head) or `learned` (per head, from the same start).
        decay_spans: tokens that the state of the first and of the last key/value head looks back, 1 / (1 - gamma). Heads
            between are spread evenly on a logarithmic scale; a single head takes the first. Default: RetNet's [32, 512].
        attention_window: W, the last tokens that are attended to exactly, the query's own included.
        attention_sinks: S, the first tokens that are attended to exactly.
        full_heads: one list per layer, the key/value heads that keep every token, by their number from 0. Their cache grows
            with the sequence. Default: none.
        attention_memory: M, slots of the exact memory: one number for all key/value heads, one per layer, or one list per
            layer with a number per head (those of kept heads count for nothing).
        memory_score: name of the score by which tokens keep their slots, see memory_scores.py: `learned` (to be fitted),
            `window_attention` or `self_recall`; and for comparison `random`, `key_norm` and `key_diff`.
        memory_score_dim: width of the learned score's network.
        normalize: divide by the sum of the weights; needed whenever there is a window or sinks.
        branch_scale_init: start of the bias b in the linear branch's log-scale c(q) = w.q + b. By default the branch starts
            with no weight, so that an unaligned model is exactly window + sinks.
        output_norm: `group_norm` on the heads' output, as in RetNet and the paper's code, or `none`.
        output_gate: SiLU gate on the heads' output, as in RetNet and the paper's code.

    Raises:
        ValueError: on an unknown choice or settings that contradict one another.
    """

    model_type = "dijiang"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: Filled[int] = LATER
    head_dim: Filled[int] = LATER
    hidden_act: str = "silu"
    mlp_type: str = "gated"
    mlp_bias: bool = False
    norm_type: str = "rms_norm"
    norm_eps: float | int = 1e-6
    parallel_residual: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: Filled[dict[str, Any]] = LATER
    sliding_window: int | None = None
    layer_types: Filled[list[str]] = LATER
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    feature_map: str = "wdcf"
    feature_dim: Filled[int] = LATER
    feature_activation: str = "softmax"
    feature_pairs: bool = True
    key_scale: bool = True
    feature_seed: int = 0
    learn_features: bool = True
    scale_features: bool = True
    radial: str = "normal"
    dct_direction: str = "forward"
    state_update: str = "sum"
    decay: str = "none"
    decay_spans: Filled[list[float | int]] = LATER
    attention_window: int = 64
    attention_sinks: int = 4
    full_heads: Filled[list[list[int]]] = LATER
    attention_memory: int | list[int] | list[list[int]] = 0
    memory_score: str = "window_attention"
    memory_score_dim: int = 32
    normalize: bool = True
    branch_scale_init: float | int = -1e4
    output_norm: str = "none"
    output_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.feature_dim is None:
            self.feature_dim = self.head_dim
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        if self.full_heads is None:
            self.full_heads = [[] for _ in range(self.num_hidden_layers)]
        if self.decay_spans is None:
            self.decay_spans = [32, 512]
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def __eq__(self, other: object) -> bool:
        # the inherited method ignores attributes outside the fields, or finds a config that was saved and loaded different
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    def validate_choices(self) -> None:
        """Raise ValueError on a value outside its list, or on sizes that do not fit."""
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} is unknown; choose one of {', '.join(allowed)}")
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types holds {', '.join(unknown)}; choose from {', '.join(LAYER_TYPES)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.feature_dim < 1:
            raise ValueError(f"feature_dim={self.feature_dim} must be at least 1")
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"sliding_attention needs sliding_window of at least 1, not {self.sliding_window}")
        if len(self.decay_spans) != 2 or not all(1 < span < math.inf for span in self.decay_spans):
            raise ValueError(f"decay_spans={self.decay_spans} must be two finite numbers above 1, first and last head's")
        if not math.isfinite(self.branch_scale_init):
            raise ValueError(f"branch_scale_init={self.branch_scale_init} must be finite")

    def validate_branches(self) -> None:
        """Raise ValueError if window, sinks and normalization contradict one another."""
        if self.attention_window < 0 or self.attention_sinks < 0:
            raise ValueError(
                f"attention_window={self.attention_window} and attention_sinks={self.attention_sinks} must not be negative"
            )
        if self.attention_sinks and not self.attention_window:
            raise ValueError(f"attention_sinks={self.attention_sinks} needs attention_window of at least 1")
        if self.attention_window and not self.normalize:
            raise ValueError("normalize=false needs attention_window=0: the softmax window shares the denominator")

    def validate_memories(self) -> None:
        """Raise ValueError if kept heads or slots do not fit the layers, or the score is unknown."""
        G = self.num_key_value_heads
        for name in ("full_heads", "attention_memory"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} entries for {self.num_hidden_layers} layers")
        for layer, heads in enumerate(self.full_heads):
            if sorted(set(heads)) != heads or not all(0 <= head < G for head in heads):
                raise ValueError(f"full_heads[{layer}]={heads} must be rising numbers of key/value heads, 0 to {G - 1}")
            if heads and self.layer_types[layer] != "linear_attention":
                raise ValueError(f"full_heads[{layer}]={heads}, but the layer is {self.layer_types[layer]}; leave it empty")
        if any(self.full_heads) and (self.output_norm != "none" or self.output_gate):
            raise ValueError("full_heads needs output_norm=none and output_gate=false: kept heads answer as the source's do")
        slots = [self.memory_slots(layer) for layer in range(self.num_hidden_layers)]
        if any(len(numbers) != G for numbers in slots) or min(map(min, slots), default=0) < 0:
            raise ValueError(
                f"attention_memory={self.attention_memory} must be a number that is not negative, one per layer, or one list "
                f"per layer of {G} such numbers, for the key/value heads"
            )
        if any(map(any, slots)) and not self.attention_window:
            raise ValueError(f"attention_memory={self.attention_memory} needs attention_window of at least 1")
        score_divides = self.memory_score == "self_recall" and any(map(any, slots))
        if score_divides and FEATURE_MAPS and not FEATURE_MAPS[self.feature_map].positive:
            raise ValueError(
                f"memory_score=self_recall divides by sums of features, and feature_map={self.feature_map} has features with "
                "signs; choose another score or map"
            )
        if self.memory_score_dim < 1:
            raise ValueError(f"memory_score_dim={self.memory_score_dim} must be at least 1")
        if MEMORY_SCORES and self.memory_score not in MEMORY_SCORES:
            raise ValueError(f"memory_score={self.memory_score!r} is unknown; choose one of {', '.join(MEMORY_SCORES)}")

    def memory_slots(self, layer: int) -> list[int]:
        """Slots of the exact memory by key/value head of a layer; those of kept heads are not used."""
        slots: Any = self.attention_memory
        slots = slots[layer] if isinstance(slots, list) else slots
        return list(slots) if isinstance(slots, list) else [slots] * self.num_key_value_heads

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes that the cache grows by with each token of a sequence, keys and values of `element_size` bytes a number."""
        G = self.num_key_value_heads
        kept = sum(
            G if kind == "full_attention" else len(heads)
            for kind, heads in zip(self.attention_types, self.full_heads, strict=True)
        )
        return 2 * kept * self.head_dim * element_size

    def linear_heads(self, layer: int) -> list[int]:
        """The key/value heads of a linear layer that do not keep every token."""
        return [head for head in range(self.num_key_value_heads) if head not in self.full_heads[layer]]

    def validate_feature_map(self) -> None:
        """`check_feature_map`, which is a function since older checkpoints bring configs of their own."""
        check_feature_map(self)

    @property
    def has_linear_layers(self) -> bool:
        """Whether any layer is a linear one."""
        return "linear_attention" in self.attention_types

    @property
    def attention_types(self) -> list[str]:
        """`layer_types`, with `full_attention` for linear layers that keep every token in all of their heads."""
        kept = [len(heads) == self.num_key_value_heads for heads in self.full_heads]
        return ["full_attention" if all_heads else kind for kind, all_heads in zip(self.layer_types, kept, strict=True)]


__all__ = ["DiJiangConfig"]
