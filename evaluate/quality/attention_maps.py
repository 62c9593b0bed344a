"""
Attention maps: with which weights each layer of teacher and student mixes its tokens, how far apart the two are, and how far
back they reach.

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

SHARE, ROUNDING = 0.9, 1e-6  # of a row's weight that the effective context carries, and what sums may lack of it
DIGITS = 5  # of the numbers in the result


@torch.no_grad()
def attention_map(layer: ProjectedAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """
    The weights (B, H, T, T) with which the layer mixes values, row i over keys j, for float32 q (B, T, H, d) and
    k (B, T, G, d) after rotary positions. A softmax layer's are its formula; a linear layer's are what its own `attend`, whose
    output is linear in the values, makes of the columns of the identity.
    """
    if isinstance(layer, DiJiangLinearAttention):
        return implicit_map(layer, q, k)
    return masked_softmax(scores(q, k, layer.scaling), visible(q.shape[1], layer.sliding_window).to(q.device))


def implicit_map(layer: DiJiangLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`attention_map` of a linear layer, d columns at a time, since that is how wide its values are."""
    (B, T, H, d), G = q.shape, k.shape[2]
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
    Attention (B, H, T, T) with untrained positive random features (Performer, arXiv 2009.14794) for exp(q.k / sqrt(d)), of
    q (B, T, H, d) and k (B, T, G, d) after rotary positions. Each head draws `features` frequencies of its own.
    """
    H, d = q.shape[2:]
    config = DiJiangConfig(head_dim=d, feature_dim=features, feature_pairs=False, feature_activation="exp")
    feature_map = PRF(config, H, seed).to(q.device)
    feature_map.W.copy_(torch.randn(feature_map.W.shape, generator=torch.Generator().manual_seed(seed)))
    # the layer's limit on exponents is left out, and sums stay in range: a bad map must be the features' own fault
    z_q, z_k = (
        feature_map.exponents(x, d**-0.25).double().transpose(1, 2) for x in (q, k.repeat_interleave(H // k.shape[2], 2))
    )
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
    """Which keys a query sees, (T, T) bool: the last `window` tokens, its own included (None: all), and the first `sinks`."""
    age = torch.arange(T)[:, None] - torch.arange(T)
    near = age < T if window is None else age < window
    return (age >= 0) & (near | (torch.arange(T) < sinks))


def relative_weights(weights: torch.Tensor) -> torch.Tensor:
    """
    Each row of a map divided by the sum of its absolute values, which changes nothing where weights are positive and sum to
    one. Layers without normalisation (preset `paper`) have others, of which only the proportions count here.
    """
    return weights / weights.abs().sum(-1, keepdim=True).clamp_min(TINY)


def map_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Total variation distance of two maps' rows, half the sum of |a - b|, from 0 to 1, the mean over rows and batch: (H,)."""
    return (first - second).abs().sum(-1).mean((0, 2)) / 2


def effective_context(weights: torch.Tensor) -> torch.Tensor:
    """
    How many of the most recent keys carry 90 % of a row's weight, the median over rows and batch: (H,). The first quarter of
    the rows, which have no long past, is left out.
    """
    T = weights.shape[-1]
    carried = weights.abs().flip(-1).cumsum(-1)  # by the keys from the last one back to each
    context = (carried[..., :-1] < SHARE - ROUNDING).sum(-1) + 1 - torch.arange(T - 1, -1, -1, device=weights.device)
    return context[:, :, T // 4 :].transpose(0, 1).flatten(1).double().quantile(0.5, dim=1)


def mean_over_rows(weights: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Sum of |weight| times `factor` (T, T), the mean over batch and rows but the first quarter: (H,)."""
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
    Compare teacher and student, each on the queries and keys of its own forward pass, layer by layer.

    Args:
        teacher, student: models of our decoder with the same layers and heads.
        input_ids: (B, T); memory grows with B H T^2.
        keep_layers: so many layers, spread over the depth, are kept as pictures,
        keep_tokens: of the first row's first tokens.
        advance: told how many layers were done.

    Returns:
        `tokens` T and `rows` B; `window` and `sinks` of the student's config; `features` of the Performer, as many as the
        student's.
        `layers`: for each, by head:
            `distance` from the teacher's map (`map_distance`) of the `student`'s and, on the teacher's own queries and keys,
            of a `performer`'s and, if the student has a window, of `window_only`, untrained softmax on window and sinks;
            of `teacher` and `student`, `effective_context` in tokens, and the same of the weight that is not on the student's
            sinks, `effective_context_past_sinks`, since the first tokens often take most of it whatever they say
            (arXiv 2309.17453); `mean_distance`, how many tokens back the weight is on average; and `beyond_window`, the share
            of the weight on keys outside the student's window and sinks: what a linear layer gives to its linear branch.
        `maps`: by layer and side, the pictures that `unpack_map` reads.

    Raises:
        ValueError: if the models' layers or heads differ in number.
    """
    shapes = [(m.config.num_hidden_layers, m.config.num_attention_heads) for m in (teacher, student)]
    if shapes[0] != shapes[1]:
        found = " and ".join("{} layers of {} heads".format(*shape) for shape in shapes)
        raise ValueError(f"teacher and student have {found}; compare a student with the teacher that it was converted from")
    config, (B, T) = student.config, input_ids.shape
    features = max((layer.feature_map_k.size for layer in linear_layers(student).values()), default=config.feature_dim)
    captured = [[(q.float(), k.float()) for q, k, _ in capture(model, input_ids)] for model in (teacher, student)]
    depth = len(captured[0])
    count = min(keep_layers, depth)
    kept = {(2 * i + 1) * depth // (2 * count) for i in range(count)}
    near = visible(T, config.attention_window, config.attention_sinks).to(input_ids.device)
    beyond, age = (~near).float(), torch.arange(T, device=near.device).float()
    age = age[:, None] - age
    past_sinks = (torch.arange(T, device=near.device) >= config.attention_sinks).float()
    layers, pictures = [], {}
    for i in range(depth):
        layer, own_layer = teacher.model.layers[i].self_attn, student.model.layers[i].self_attn
        q, k = captured[0][i]
        maps = {
            "teacher": attention_map(layer, q, k),
            "student": attention_map(own_layer, *captured[1][i]),
            "performer": performer_map(q, k, features=features, seed=config.feature_seed + i),
        }
        if config.attention_window:
            maps["window_only"] = masked_softmax(scores(q, k, layer.scaling), near)
        maps = {side: relative_weights(weights) for side, weights in maps.items()}
        measured = {"layer": i, "layer_type": config.layer_types[i]}
        measured["distance"] = {
            side: plain(map_distance(weights, maps["teacher"])) for side, weights in maps.items() if side != "teacher"
        }
        sides = {side: maps[side] for side in ("teacher", "student")}
        measured["effective_context"] = {side: plain(effective_context(weights)) for side, weights in sides.items()}
        measured["effective_context_past_sinks"] = {
            side: plain(effective_context(relative_weights(weights * past_sinks))) for side, weights in sides.items()
        }
        measured["mean_distance"] = {side: plain(mean_over_rows(weights, age)) for side, weights in sides.items()}
        measured["beyond_window"] = {side: plain(mean_over_rows(weights, beyond)) for side, weights in sides.items()}
        layers.append(measured)
        if i in kept:
            shown = ("teacher", "student", "performer")
            pictures[str(i)] = {side: pack_map(maps[side][0, :, :keep_tokens, :keep_tokens]) for side in shown}
        advance(1)
    facts = {"tokens": T, "rows": B, "window": config.attention_window, "sinks": config.attention_sinks, "features": features}
    return {**facts, "layers": layers, "maps": pictures}


def plain(values: torch.Tensor) -> list[float]:
    return [round(x, DIGITS) for x in values.tolist()]


def pack_map(weights: torch.Tensor) -> dict:
    """A map (H, n, n) as JSON: square roots of |weights|, which keep small ones apart, as bytes, compressed and in base64."""
    levels = (weights.abs().sqrt() * 255).round().clamp(max=255).to(torch.uint8).cpu().numpy()
    return {"shape": list(levels.shape), "data": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode("ascii")}


def unpack_map(record: dict) -> np.ndarray:
    """The weights (H, n, n) that `pack_map` was given, their signs left out, each within 1/255."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(record["data"])), dtype=np.uint8).reshape(record["shape"])
    return np.square(levels / 255)
