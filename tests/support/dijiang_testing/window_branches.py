"""Random inputs of window attention, and what it is by definition."""

import torch

from dijiang.modeling.window_attention import LinearBranch, Sinks, Window

SCALE = 0.7


def random_window(B, T, H, G, d, W, S, seed) -> tuple[torch.Tensor, Window]:
    """Queries, and a window with padding whose sinks arrive one by one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    q, k, v = draw(B, T, H, d), draw(B, W + T, G, d), draw(B, W + T, G, d)
    valid = torch.rand(B, W + T, generator=generator) < 0.8
    sink_k, sink_v = draw(B, S, G, d), draw(B, S, G, d)
    arrival = torch.randint(-1, T + 1, (B, S), generator=generator)
    return q, Window(k, v, valid, Sinks(sink_k, sink_v, arrival))


def all_seen(window: Window) -> Window:
    """`window` without padding, all its sinks seen by all queries, as tensors say it."""
    arrival = torch.full_like(window.sinks.arrival, -1)
    return window._replace(valid=torch.ones_like(window.valid), sinks=window.sinks._replace(arrival=arrival))


def without_masks(window: Window) -> Window:
    """The same as `all_seen`, as None says it."""
    return window._replace(valid=None, sinks=window.sinks._replace(arrival=None))


def random_branch(B, T, H, d, seed) -> LinearBranch:
    """A linear branch whose share of the whole is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return LinearBranch(2 * draw(B, T, H, d), draw(B, T, H).exp(), draw(B, T, H))


def loop_oracle(q, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention to window and sinks in float64, row by row: the output and the logarithm of the sum of weights."""
    k, v, valid, sinks = window
    B, T, H, d = q.shape
    G, W = k.shape[2], k.shape[1] - T
    o, log_sum = torch.zeros(B, T, H, d, dtype=torch.float64), torch.zeros(B, T, H, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * G // H
                rows = [j for j in range(t + 1, t + W + 1) if valid[b, j]]
                seen = [s for s in range(sinks.k.shape[1]) if sinks.arrival[b, s] <= t]
                keys = torch.cat((k[b, rows, g], sinks.k[b, seen, g])).double()
                values = torch.cat((v[b, rows, g], sinks.v[b, seen, g])).double()
                scores = keys @ q[b, t, h].double() * SCALE
                log_sum[b, t, h] = scores.logsumexp(0) if len(scores) else -torch.inf
                o[b, t, h] = scores.softmax(0) @ values
    return o, log_sum


def masked_softmax(q, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """`loop_oracle` as one masked softmax, quadratic and differentiable."""
    k, v, valid, sinks = window
    (_, T, H, _), W = q.shape, k.shape[1] - q.shape[1]
    age = torch.arange(T)[:, None] + W - torch.arange(W + T)
    in_window = valid[:, None] & (age >= 0) & (age < W)
    seen = torch.cat((in_window, sinks.arrival[:, None] <= torch.arange(T)[:, None]), dim=-1)[:, None]
    keys, values = (torch.cat(pair, 1).repeat_interleave(H // k.shape[2], 2) for pair in ((k, sinks.k), (v, sinks.v)))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * SCALE
    scores = scores.masked_fill(~seen, -1e30)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values), scores.logsumexp(-1).transpose(1, 2)


def share_oracle(o, log_sum, branch: LinearBranch) -> torch.Tensor:
    """The definition of the merge, in float64 and without any care for overflow."""
    window_sum, unit = log_sum.double().exp(), branch.log_scale.double().exp()
    # a row that sees nothing in the window has window_sum 0 and an output there that counts for nothing
    window_part = torch.where(window_sum[..., None] > 0, window_sum[..., None] * o.double(), 0.0)
    numerator = window_part + unit[..., None] * branch.numerator.double()
    return numerator / (window_sum + unit * branch.total.double())[..., None]


def tensors_of(q, window: Window, branch: LinearBranch) -> dict[str, torch.Tensor]:
    """All inputs that get a gradient and are not empty, by name."""
    tensors = {"q": q, "k": window.k, "v": window.v, "sink_k": window.sinks.k, "sink_v": window.sinks.v} | branch._asdict()
    return {name: x for name, x in tensors.items() if x.numel()}
