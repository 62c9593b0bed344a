"""
Attention maps: the weights with which each layer of teacher and student mixes its tokens, their distance and their reach.

B batch, T tokens, H query heads, G key/value heads (query head h reads key/value head h * G // H), d head size.
"""

import base64
import zlib
from collections.abc import Callable

import numpy as np
import torch

from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.decoder_modules import ProjectedAttention
from dijiang.modeling.exponential_maps import PRF
from dijiang.modeling.linear_attention import TINY
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..feature_map_study.inputs import capture

SHARE = 0.9  # of a row's weight that the effective context carries
ROUNDING = 1e-6  # that sums of weights may be off
DIGITS = 5  # of the numbers in the result
PICTURED = ("teacher", "student", "performer")  # sides whose maps are kept as pictures


@torch.no_grad()
def attention_map(layer: ProjectedAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """
    Weights (B, H, T, T) with which the layer mixes values, row i over keys j, for float32 q (B, T, H, d) and k (B, T, G, d)
    after rotary positions. Those of a softmax layer follow its formula. Those of a linear layer are the outputs of its own
    `attend`, which is linear in the values, for the columns of the identity.
    """
    if isinstance(layer, DiJiangLinearAttention):
        return implicit_map(layer, q, k)
    return masked_softmax(scores(q, k, layer.scaling), visible(q.shape[1], layer.sliding_window).to(q.device))


def implicit_map(layer: DiJiangLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`attention_map` of a linear layer, d columns at a time, since its values are d wide."""
    B, T, H, d = q.shape
    G = k.shape[2]
    columns = -(-T // d) * d
    identity = torch.eye(T, columns, device=q.device)
    weights = q.new_empty(B, H, T, columns)
    for start in range(0, columns, d):
        v = identity[:, None, start : start + d].expand(B, T, G, d).contiguous()
        weights[..., start : start + d] = layer.attend(q, k, v)[0].transpose(1, 2)
    return weights[..., :T]


@torch.no_grad()
def performer_map(q: torch.Tensor, k: torch.Tensor, *, features: int, seed: int) -> torch.Tensor:
    """
    Attention (B, H, T, T) through untrained positive random features (Performer, arXiv 2009.14794) of exp(q.k / sqrt(d)).

    Args:
        q: (B, T, H, d), after rotary positions.
        k: (B, T, G, d), after rotary positions.
        features: frequencies that each head draws.
        seed: seed of the frequencies.
    """
    H, d = q.shape[2:]
    config = DiJiangConfig(head_dim=d, feature_dim=features, feature_pairs=False, feature_activation="exp")
    feature_map = PRF(config, H, seed).to(q.device)
    feature_map.W.copy_(torch.randn(feature_map.W.shape, generator=torch.Generator().manual_seed(seed)))
    # without the layer's limit on exponents and in float64, so that a bad map is the features' own fault
    keys = k.repeat_interleave(H // k.shape[2], dim=2)
    z_q, z_k = (feature_map.exponents(x, d**-0.25).double().transpose(1, 2) for x in (q, keys))
    top = z_k.amax(-1)
    kernel = (z_q - z_q.amax(-1, keepdim=True)).exp() @ (z_k - top[..., None]).exp().transpose(2, 3)
    log_kernel = kernel.clamp_min(torch.finfo(kernel.dtype).tiny).log() + top[:, :, None]
    return masked_softmax(log_kernel, visible(q.shape[1]).to(q.device)).float()


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * q.k, (B, H, T, T)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", q * scale, k)


def masked_softmax(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def visible(T: int, window: int | None = None, sinks: int = 0) -> torch.Tensor:
    """Keys that a query sees, (T, T) bool: the last `window` tokens, its own included (None: all), and the first `sinks`."""
    age = torch.arange(T)[:, None] - torch.arange(T)
    in_window = age < T if window is None else age < window
    return (age >= 0) & (in_window | (torch.arange(T) < sinks))


def relative_weights(weights: torch.Tensor) -> torch.Tensor:
    """
    Each row of a map divided by the sum of its absolute values. That changes only the maps of layers without normalization
    (preset `paper`), of which only the proportions count here.
    """
    return weights / weights.abs().sum(-1, keepdim=True).clamp_min(TINY)


def map_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Total variation distance of two maps' rows, half the sum of |a - b|, from 0 to 1; mean over rows and batch: (H,)."""
    return (first - second).abs().sum(-1).mean((0, 2)) / 2


def effective_context(weights: torch.Tensor) -> torch.Tensor:
    """
    Number of the most recent keys that carry 90 % of a row's weight; median over rows and batch: (H,). The first quarter of
    the rows, which have no long past, is left out.
    """
    T = weights.shape[-1]
    carried = weights.abs().flip(-1).cumsum(-1)  # entry n is the weight of the last n + 1 keys
    context = (carried[..., :-1] < SHARE - ROUNDING).sum(-1) + 1 - torch.arange(T - 1, -1, -1, device=weights.device)
    return context[:, :, T // 4 :].transpose(0, 1).flatten(1).double().quantile(0.5, dim=1)


def mean_over_rows(weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Sum of |weight| times `factor` (T, T); mean over batch and all rows but the first quarter: (H,)."""
    return (weights.abs() * factor).sum(-1)[:, :, factor.shape[0] // 4 :].mean((0, 2))


def measure_maps(
    teacher: DiJiangForCausalLM,
    student: DiJiangForCausalLM,
    input_ids: torch.Tensor,
    *,
    keep_layers: int = 4,
    keep_tokens: int = 128,
    advance: Callable[[int], None] = lambda done: None,
) -> dict:
    """
    Compare teacher and student layer by layer, each on the queries and keys of its own forward pass.

    Args:
        teacher: softmax model in our decoder.
        student: model with the same layers and heads.
        input_ids: (B, T); memory grows with B H T^2.
        keep_layers: number of layers, spread over the depth, whose maps are kept as pictures.
        keep_tokens: tokens of the first row that pictures show.
        advance: called with the number of layers done since the last call.

    Returns:
        `tokens` T and `rows` B; `window` and `sinks` of the student's config; `features` of the Performer, as many as the
        student's.
        `layers`: for each, by head:
            `distance` (`map_distance`) from the teacher's map: that of the `student`'s map and, on the teacher's own queries
            and keys, of the `performer`'s and, if the student has a window, of `window_sinks`, the training-free softmax on
            window and sinks;
            for `teacher` and `student`, `effective_context` in tokens; `effective_context_past_sinks`, the same of the weight
            that is not on the student's sinks, since the first tokens often take most of it whatever they say
            (arXiv 2309.17453); `mean_distance`, how many tokens back the weight is on average; and `beyond_window`, the share
            of the weight on keys outside the student's window and sinks, which a linear layer gives to its linear branch.
        `maps`: by layer and side, the pictures that `unpack_map` reads.

    Raises:
        ValueError: if the models' layers or heads differ in number.
    """
    refuse_other_shapes(teacher, student)
    config = student.config
    rows, tokens = input_ids.shape
    features = max((layer.feature_map_k.size for layer in linear_layers(student).values()), default=config.feature_dim)
    captured = [[(q.float(), k.float()) for q, k, _ in capture(model, input_ids)] for model in (teacher, student)]
    near = visible(tokens, config.attention_window, config.attention_sinks).to(input_ids.device)
    measures = reach_measures(near, config.attention_sinks)
    pictured = spread_layers(len(captured[0]), keep_layers)
    layers, pictures = [], {}
    for i, ((q, k), (own_q, own_k)) in enumerate(zip(*captured, strict=True)):
        layer = teacher.model.layers[i].self_attn
        maps = {
            "teacher": attention_map(layer, q, k),
            "student": attention_map(student.model.layers[i].self_attn, own_q, own_k),
            "performer": performer_map(q, k, features=features, seed=config.feature_seed + i),
        }
        if config.attention_window:
            maps["window_sinks"] = masked_softmax(scores(q, k, layer.scaling), near)
        maps = {side: relative_weights(weights) for side, weights in maps.items()}
        distance = {side: map_distance(weights, maps["teacher"]) for side, weights in maps.items() if side != "teacher"}
        reach = {name: {side: measure(maps[side]) for side in ("teacher", "student")} for name, measure in measures.items()}
        numbers = {"distance": distance, **reach}
        layers.append(
            {"layer": i, "layer_type": config.layer_types[i]}
            | {name: {side: rounded(values) for side, values in sides.items()} for name, sides in numbers.items()}
        )
        if i in pictured:
            pictures[str(i)] = {side: pack_map(maps[side][0, :, :keep_tokens, :keep_tokens]) for side in PICTURED}
        advance(1)
    facts = {"tokens": tokens, "rows": rows, "window": config.attention_window, "sinks": config.attention_sinks}
    return {**facts, "features": features, "layers": layers, "maps": pictures}


def refuse_other_shapes(teacher: DiJiangForCausalLM, student: DiJiangForCausalLM) -> None:
    """Raise ValueError unless teacher and student have the same number of layers and heads."""
    shapes = [(m.config.num_hidden_layers, m.config.num_attention_heads) for m in (teacher, student)]
    if shapes[0] != shapes[1]:
        both = " and ".join("{} layers of {} heads".format(*shape) for shape in shapes)
        raise ValueError(f"teacher and student have {both}; compare a student with the teacher that it was converted from")


def reach_measures(near: torch.Tensor, sinks: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Numbers (H,) that tell how far back a map reaches, by name; `near` (T, T) are the keys in window and sinks."""
    position = torch.arange(len(near), device=near.device).float()
    age = position[:, None] - position
    past_sinks = (position >= sinks).float()
    beyond = (~near).float()
    return {
        "effective_context": effective_context,
        "effective_context_past_sinks": lambda weights: effective_context(relative_weights(weights * past_sinks)),
        "mean_distance": lambda weights: mean_over_rows(weights, age),
        "beyond_window": lambda weights: mean_over_rows(weights, beyond),
    }


def spread_layers(depth: int, count: int) -> set[int]:
    """Up to `count` layers, spread over the depth."""
    count = min(count, depth)
    return {(2 * i + 1) * depth // (2 * count) for i in range(count)}


def rounded(values: torch.Tensor) -> list[float]:
    return [round(x, DIGITS) for x in values.tolist()]


def pack_map(weights: torch.Tensor) -> dict:
    """A map (H, n, n) as JSON: square roots of |weights|, which tell small ones apart, as bytes, compressed, in base64."""
    levels = (weights.abs().sqrt() * 255).round().clamp(max=255).to(torch.uint8).cpu().numpy()
    return {"shape": list(levels.shape), "data": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode("ascii")}


def unpack_map(record: dict) -> np.ndarray:
    """Absolute weights (H, n, n) of a map that `pack_map` packed, each within 1/255."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(record["data"])), dtype=np.uint8).reshape(record["shape"])
    return np.square(levels / 255)
