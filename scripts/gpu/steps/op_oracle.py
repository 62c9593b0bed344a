"""What the op must give: float32 features, sums in float64. B batch, T tokens, H heads, d head size, M features."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

BLOCK = 256  # tokens per block


def features_of(layer, q, k, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(q) and phi(k), (B, T, H, M), as the sums take them."""
    return layer.feature_map_q(q, None, layer.feature_scale).to(dtype), layer.key_features(k).to(dtype)


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Float32 products in TF32, or in full."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


@torch.compiler.disable
def oracle(layer, q, k, v) -> torch.Tensor:
    """The op on float32 features, its sums in float64, block by block: (B, T, H, d)."""
    phi_q, phi_k = (x.double().transpose(1, 2) for x in features_of(layer, q.float(), k.float(), torch.float32))
    values = F.pad(v.double(), (0, 1), value=1.0).transpose(1, 2)  # a column of ones sums the weights
    state, outputs = 0.0, []
    for start in range(0, q.shape[1], BLOCK):
        a, b, x = (y[:, :, start : start + BLOCK] for y in (phi_q, phi_k, values))
        o = (a @ b.transpose(-1, -2)).tril() @ x
        outputs.append(o if start == 0 else o + a @ state)
        state = state + b.transpose(-1, -2) @ x
    o = torch.cat(outputs, dim=2)
    return (o[..., :-1] / o[..., -1:]).transpose(1, 2)


def expected(layer, inputs: list[torch.Tensor], cotangent: torch.Tensor | None) -> list[torch.Tensor]:
    """The oracle's output of the first sequence, or its gradients by q, k and v."""
    with precision(False):
        if cotangent is None:
            return [oracle(layer, *(x[:1] for x in inputs))]
        first = [x[:1].detach().clone().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(oracle(layer, *first), first, cotangent[:1].double()))


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """|found - reference| / |reference|, by the root of the sum of squares."""
    reference = reference.detach().double()
    return float((found.detach().double() - reference).norm() / reference.norm())
