"""
How much each token is needed beyond the window, which the memory's score learns to predict.

T tokens, H query heads, G key/value heads, R = H // G, d head size.
"""

import torch
from torch import Tensor

from dijiang.modeling.decoder_modules import Projections

# queries of which the first is so far behind a token that the window has lost it; fewer say little about it
FEWEST_QUERIES = 8


def sampled_queries(tokens: int, answers: list[tuple[int, int]], *, window: int, every: int) -> Tensor:
    """Positions (n,) of every `every`-th query beyond the window, and of all that predict a token of an answer."""
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[window::every] = True
    for start, end in answers:
        chosen[start - 1 : end - 1] = True
    return chosen.nonzero().squeeze(-1)


@torch.no_grad()
def removal_labels(
    projected: Projections, o_proj: Tensor, queries: Tensor, *, window: int, sinks: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """
    The square root of how much the layer's output would change without a token, over the queries that have it neither in their
    window nor among the sinks: y_j^2 = mean of (p_ij)^2 ||W_O (v_j - o_i)||^2 over queries i and the R query heads of a group,
    where p are softmax weights and o outputs before W_O. Removing one token of small weight moves the output by
    p_ij (o_i - v_j) / (1 - p_ij).

    Args:
        projected: of one sequence (B = 1), of a layer that attends to everything.
        o_proj: (hidden, H * d), the weight of the output projection.
        queries: (n,), from `sampled_queries`.
        window: W.
        sinks: S.
        scaling: factor on q.k.

    Returns:
        (G, T) float32, and how many of the queries each token was averaged over, (T,).
    """
    q, k, v = (x[0].float() for x in projected[:3])
    (T, H, d), G = q.shape, k.shape[1]
    queries = queries.to(q.device)
    position = torch.arange(T, device=q.device)
    hidden = position > queries[:, None]
    far = ((queries[:, None] - position >= window) & (position >= sinks)).float()
    count = far.sum(0)
    labels = q.new_zeros(G, T)
    for h in range(H):
        g = h * G // H
        weights = (q[queries, h] * scaling @ k[:, g].T).masked_fill_(hidden, -torch.inf).softmax(-1)
        projection = o_proj[:, h * d : (h + 1) * d].float()
        gram = projection.T @ projection  # lengths after the projection, without projecting
        values = v[:, g]
        outputs = weights @ values
        projected_values = values @ gram
        distance = (projected_values * values).sum(-1) - 2 * outputs @ projected_values.T
        distance = (distance + (outputs @ gram * outputs).sum(-1, keepdim=True)).clamp_(min=0)
        labels[g] += (weights.square() * distance * far).sum(0)
    return (labels / (H // G) / count.clamp(min=1)).sqrt(), count
