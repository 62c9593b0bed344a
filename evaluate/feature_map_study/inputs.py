"""
Inputs of the feature map study, Gaussian queries and keys and those of a real model, and the errors of an estimate on them.

n queries, T keys, d head size. Everything is float64.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import hyp1f1, logsumexp

from dijiang.common.hooks import hooks
from dijiang.common.text import read_tokens
from dijiang.convert import load_source


@dataclass
class Case:
    """
    Queries and keys of one head, and the kernel to estimate.

    Attributes:
        q: (n, d) queries.
        k: (T, d) keys.
        v: (T, d) values; None if only the kernel is of interest.
        positions: (n,), the last key that each query sees.
        log_weight: (T,), added to q.k of each key in attention, without approximation.
        log_sum: (n,), log of the sum of exp(q.k) over all keys. Kernels are divided by this sum, so that every query has the
            same weight, as in attention.
        kernel: (n, T), exp(q.k - log_sum).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray | None = None
    positions: np.ndarray | None = None
    log_weight: np.ndarray | None = None
    log_sum: np.ndarray = field(init=False)
    kernel: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        scores = self.q @ self.k.T
        self.log_sum = logsumexp(scores, axis=1)
        self.kernel = np.exp(scores - self.log_sum[:, None])

    def mix(self, kernel: np.ndarray, *, drop_norm: bool = False) -> np.ndarray:
        """
        Causal attention output (n, d) with `kernel` (n, T) in place of exp(q.k); `drop_norm` leaves out each key's factor
        exp(-|k|^2 / 2), as the paper does. A query's factor cancels anyway.
        """
        log_weight = np.zeros(len(self.k)) if self.log_weight is None else self.log_weight
        if drop_norm:
            log_weight = log_weight + np.square(self.k).sum(1) / 2
        visible = np.arange(len(self.k)) <= self.positions[:, None]
        weights = np.where(visible, kernel * np.exp(log_weight - log_weight.max()), 0.0)
        return weights @ self.v / weights.sum(1, keepdims=True)

    def plain_mean(self) -> float:
        """Error of the attention output if all visible keys have the same weight."""
        return relative(replace(self, log_weight=None).mix(np.ones_like(self.kernel)), self.mix(self.kernel))

    def key_weights_alone(self) -> float:
        """Error of the attention output if the weight of a visible key is its `log_weight` alone."""
        return relative(self.mix(np.ones_like(self.kernel)), self.mix(self.kernel))

    def errors(self, kernel: np.ndarray) -> dict[str, float]:
        """
        Errors of an estimate (n, T) of `self.kernel`: `rmse`, root mean square relative to that of the kernel; `median` of the
        relative errors; `attention` and `attention_dropped`, of the causal output with and without the keys' norm factor.
        """
        errors = {
            "rmse": relative(kernel, self.kernel),
            "median": float(np.median(np.abs(kernel / self.kernel - 1.0))),
        }
        if self.v is not None:
            target = self.mix(self.kernel)
            errors["attention"] = relative(self.mix(kernel), target)
            errors["attention_dropped"] = relative(self.mix(kernel, drop_norm=True), target)
        return errors


def relative(estimate: np.ndarray, target: np.ndarray) -> float:
    return float(np.linalg.norm(estimate - target) / np.linalg.norm(target))


def normal_radius_limit(case: Case) -> np.ndarray:
    """
    Limit (n, T), as m grows, of the estimate by features with a normal radius. With s = q + k and a uniform direction u,
    E exp(t u.s) = E exp((u.s)^2 / 2) for normal t, and (u.s)^2 / |s|^2 follows Beta(1/2, (d - 1)/2), whose moment generating
    function is 1F1(1/2; d/2; .).
    """
    square_q = np.square(case.q).sum(1)[:, None]
    square_k = np.square(case.k).sum(1)
    half_square = (square_q + square_k) / 2 + case.q @ case.k.T
    moment = hyp1f1(0.5, case.q.shape[1] / 2, half_square)
    return moment * np.exp(-(square_q + square_k) / 2 - case.log_sum[:, None])


@dataclass
class InputSet:
    """
    Cases of one kind.

    Attributes:
        name: in results.
        cases: to measure on.
        calibration: for each case, one to fit weights on.
    """

    name: str
    cases: list[Case]
    calibration: list[Case]

    @property
    def head_dim(self) -> int:
        return self.cases[0].q.shape[1]


def gaussian_inputs(norm: float, d: int, pairs: int) -> InputSet:
    """Queries and keys of this norm in uniform directions of R^d."""
    rng = np.random.default_rng((int(1000 * norm), d))

    def case() -> Case:
        x = rng.standard_normal((2, pairs, d))
        return Case(*(norm * x / np.linalg.norm(x, axis=-1, keepdims=True)))

    return InputSet(f"gaussian-{norm:g}-d{d}", [case()], [case()])


def real_inputs(source: str | Path, text: Path, *, tokens: int, query_every: int, heads: int) -> list[InputSet]:
    """
    Queries, keys and values of heads spread over the layers of `source`, after rotary positions and scaled by d^-1/4: as they
    are (`real`), and less the head's mean on the calibration block (`centred`), where q.k = (q - m_q).(k - m_k) + m_q.k + a
    part that cancels in attention.
    """
    model, tokenizer = load_source(source, dtype=torch.float32)
    ids = read_tokens(tokenizer, text)
    if len(ids) < 2 * tokens:
        raise ValueError(f"{text.name} gives {len(ids)} tokens and the study needs {2 * tokens}; give more text")
    layers = capture(model, torch.tensor(ids[: 2 * tokens]).view(2, -1))
    count = min(heads, len(layers))
    num_heads = layers[0][0].shape[2]
    positions = np.arange(query_every - 1, tokens, query_every)
    raw = InputSet("real", [], [])
    centred = InputSet("centred", [], [])
    for i in range(count):
        layer = (2 * i + 1) * len(layers) // (2 * count)
        head = i * (num_heads // 2 + 1) % num_heads
        q, k, v = layers[layer]
        group = head * k.shape[2] // num_heads
        # (2, tokens, d): the block for calibration and the one to measure on
        q, k, v = (x[:, :, index].double().numpy() for x, index in ((q, head), (k, group), (v, group)))
        scale = q.shape[-1] ** -0.25
        q, k = q * scale, k * scale
        mean_q, mean_k = q[0].mean(0), k[0].mean(0)
        for block, part in ((0, "calibration"), (1, "cases")):
            rows = q[block, positions]
            getattr(raw, part).append(Case(rows, k[block], v[block], positions))
            centred_case = Case(rows - mean_q, k[block] - mean_k, v[block], positions, log_weight=k[block] @ mean_q)
            getattr(centred, part).append(centred_case)
    return [raw, centred]


@torch.no_grad()
def capture(model, input_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q (B, T, H, d), k and v (B, T, G, d) of each layer of the softmax model on input_ids (B, T), after rotary positions."""
    projections = []

    def project(module, args, kwargs):
        projections.append(module.project(args[0], kwargs["position_embeddings"])[:3])

    with hooks(layer.self_attn.register_forward_pre_hook(project, with_kwargs=True) for layer in model.model.layers):
        model.model(input_ids=input_ids, use_cache=False)
    return projections
