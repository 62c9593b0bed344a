"""
Closed-form start of a linear layer from a few thousand tokens, before any gradient step.

With m_q, m_k the mean query and key of a head, q.k = (q - m_q).(k - m_k) + m_q.k + q.m_k - m_q.m_k. So the feature map only
has to approximate the exponential of the centered product, whose norms are much smaller; exp(m_q.k) is a weight per key,
which the state can hold; exp(q.m_k) is a factor per query, which the branch scale c(q) = w.q + b represents. c(q) is fitted,
with what the map still misses, by least squares to log(sum of exp(q.k) over far keys) - log(phi(q).sum of phi(k)). Far keys
are those beyond the window and the sinks, which only the linear branch sees.
"""

import torch
import torch.nn.functional as F

from dijiang.modeling.linear_attention import TINY
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention

QUERIES_AT_ONCE = 256
RIDGE = 1e-3
# the maps' radii T are tried at these multiples of their start; the best one depends on the norms of a layer's q and k
T_SCALES = (1.0, 2.0, 3.0, 4.0)


@torch.no_grad()
def calibrate_layer(
    attention: DiJiangLinearAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    target: torch.Tensor,
    offset: float,
    raw_k: torch.Tensor | None = None,
) -> float | None:
    """
    Set the layer's map, key scale and branch scale in place, with the multiple of the radii T that fits `target` best.

    Args:
        attention: a freshly converted layer.
        q: (B, T, H, d), queries of some text, after rotary positions.
        k: (B, T, G, d), its keys.
        v: (B, T, G, d), its values.
        target: (B, T, H, d), the output of softmax attention for them.
        offset: subtracted from the fitted b. The linear branch then starts below its share of the softmax's mass, which costs
            less than an untrained map at full weight.
        raw_k: (B, T, G, d), k before rotary positions; needed if there is an exact memory.

    Returns:
        R^2 of the fit of c(q), the mean over heads; None without a window, where nothing is fitted.

    Raises:
        ValueError: if too few queries have far keys, or no result is finite.
    """
    start = attention.window + attention.sinks  # the first query with a far key
    if q.shape[1] < 2 * start:
        raise ValueError(f"blocks of {q.shape[1]} tokens are too short for a window of {attention.window}; use longer blocks")
    q, k, v = q.float(), k.float(), v.float()
    scaled_q, scaled_k = q * attention.feature_scale, k * attention.feature_scale
    softmax_sum = softmax_log_sum(attention, q, k) if attention.window else None
    parameters = [part.T for part in (attention.feature_map_q, attention.feature_map_k) if "T" in part._parameters]
    starts = [parameter.clone() for parameter in parameters]
    best_error = float("inf")
    best_state = best_fit = None
    for scale in T_SCALES if parameters else (1.0,):
        for parameter, value in zip(parameters, starts, strict=True):
            parameter.copy_(value * scale)
        center(attention, scaled_q.mean((0, 1)), scaled_k.mean((0, 1)))
        fit = None
        if softmax_sum is not None:
            gap = softmax_sum - linear_log_sum(attention, q, k)
            fit = fit_branch_scale(attention, scaled_q[:, start:], gap[:, start:], offset)
        error = (attention.attend(q, k, v, raw_k=raw_k)[0] - target).square().mean().item()
        if error < best_error:
            best_error = error
            best_fit = fit
            best_state = {name: value.clone() for name, value in attention.state_dict().items() if "_proj" not in name}
    if best_state is None:
        layer = f"layer {attention.layer_idx}"
        raise ValueError(f"{layer} gives no finite numbers on the text; check the checkpoint, or try dtype=float32")
    attention.load_state_dict(best_state, strict=False)
    return best_fit


def center(attention: DiJiangLinearAttention, mean_q: torch.Tensor, mean_k: torch.Tensor) -> None:
    """Move the maps' origin to the mean scaled query (H, d) and key (G, d), and put the rest, m_q.k, into the key scale."""
    attention.feature_map_q.center(mean_q)
    attention.feature_map_k.center(mean_k)
    if attention.key_scale is not None and not attention.overwrites:
        # the query heads of a group share one state, hence one weight per key
        weight = mean_q.view(-1, attention.num_key_value_groups, mean_q.shape[-1]).mean(1)
        attention.key_scale.weight.copy_(weight)
        attention.key_scale.bias.copy_(-(weight * mean_k).sum(-1))


def fit_branch_scale(attention: DiJiangLinearAttention, q: torch.Tensor, gap: torch.Tensor, offset: float) -> float:
    """Fit c(q) to gap (B, T, H) by least squares on scaled queries q (B, T, H, d), head by head; return the mean R^2."""
    design, gap = F.pad(q, (0, 1), value=1.0).flatten(0, 1).double(), gap.flatten(0, 1).double()
    fits = []
    for head in range(design.shape[1]):
        x, y = design[:, head], gap[:, head]
        ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        solution = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        attention.branch_scale.weight[head] = solution[:-1].float()
        attention.branch_scale.bias[head] = solution[-1].float() - offset
        fits.append(1.0 - ((y - x @ solution).var() / y.var()).item())
    return sum(fits) / len(fits)


def softmax_log_sum(attention: DiJiangLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(q.k / sqrt(d)) over the far keys, (B, T, H)."""
    T = q.shape[1]
    k = k.repeat_interleave(attention.num_key_value_groups, dim=2)
    key_index = torch.arange(T, device=q.device)
    sums = []
    for part in q.split(QUERIES_AT_ONCE, dim=1):
        first = sum(x.shape[2] for x in sums)
        query_index = torch.arange(first, first + part.shape[1], device=q.device)
        far = (key_index <= query_index[:, None] - attention.window) & (key_index >= attention.sinks)
        scores = torch.einsum("bihd,bjhd->bhij", part, k) * attention.scaling
        sums.append(scores.masked_fill(~far, -torch.inf).logsumexp(-1))
    return torch.cat(sums, dim=2).transpose(1, 2)


def linear_log_sum(attention: DiJiangLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """log of the linear branch's sum of weights over the far keys, (B, T, H)."""
    B, T, G, _ = k.shape
    delayed = F.pad(k, (0, 0, 0, 0, attention.window, 0))[:, :T]
    index = torch.arange(T, device=k.device) - attention.window
    far = (index >= attention.sinks).expand(B, T)
    no_values = k.new_zeros(B, T, G, 0)
    own = torch.arange(T, device=k.device).expand(B, T)
    _, total, _ = attention.linear_branch(q, delayed, no_values, far, None, own, own - attention.window)
    return total.clamp_min(TINY).log()
