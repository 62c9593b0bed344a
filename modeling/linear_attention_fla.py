"""
Linear attention by the Triton kernels of flash-linear-attention (https://github.com/fla-org/flash-linear-attention; read and
tested at 0.6.0), which is optional: it is imported at the first call that could use it.

Shapes as in linear_attention.py: B batch, T tokens, H query heads, G key/value heads, m features; e is the size of the values
with the columns that the caller added, such as the ones of the denominator. N sequences: B, or those packed in one row.
"""

import functools
import os
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64  # fla's own
# longest input that is computed token by token where no gradient is wanted, as in fla's own layers
RECURRENT_TOKENS = 64
# sizes are padded to a multiple of this: the kernels' blocks are at least 16 wide, so that none is added, rows load as
# vectors, and fla's backward pass refuses odd sizes in bfloat16
ALIGNMENT = 16


@functools.cache
def load_ops() -> tuple[Any, Any, str]:
    """fla's chunk_simple_gla and fused_recurrent_simple_gla, and a reason, with which they are None."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except Exception as error:  # a broken driver raises other things than ImportError
        return None, None, f"flash-linear-attention cannot be imported: {error}"
    return chunk_simple_gla, fused_recurrent_simple_gla, ""


def fla_is_usable(device: torch.device | str) -> tuple[bool, str]:
    """Whether `fla_linear_attention` runs on `device`, and why not: CUDA (or Triton's interpreter) and fla are needed."""
    device = torch.device(device)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False, f"flash-linear-attention needs a CUDA device, not {device.type}"
    reason = load_ops()[-1]
    return not reason, reason


@functools.cache
def gated_backward_is_refused(device: torch.device) -> bool:
    """Hopper with Triton 3.4 to 3.7.0, for which fla raises in the backward pass of chunks with per-token decays."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    version = re.findall(r"\d+", sys.modules["triton"].__version__)  # fla has imported it
    return (3, 4, 0) <= tuple(map(int, version[:3])) < (3, 7, 1)


def takes_single_steps(q: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """
    Whether `fla_linear_attention` of queries q (B, T, H, m) would train token by token, since fla has no backward pass in
    chunks here.
    """
    if log_decay is None or not (torch.is_grad_enabled() and (q.requires_grad or log_decay.requires_grad)):
        return False
    constant = log_decay.dim() == 1 and not log_decay.requires_grad
    whole_chunks = cu_seqlens is None and q.shape[1] % CHUNK_TOKENS == 0
    return not (constant and whole_chunks) and gated_backward_is_refused(q.device)


def fla_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, differentiable in every argument. Call it where `fla_is_usable`.

    Products are computed in the inputs' common dtype, float32 as TF32, Triton's default, and float16 as float32, since its
    range ends below the sums of long inputs. Sums and final state are float32.

    Args:
        q: (B, T, H, m) features of the queries; head h reads key/value head h * G // H.
        k: (B, T, G, m) features of the keys.
        v: (B, T, G, e) values.
        log_decay: g <= 0, (G,) constant or (B, T, G) per token, or None.
        state: (N, G, m, e) float32, before the first token of each sequence.
        cu_seqlens: (N + 1,) int64, the first token of each sequence, and T; B is then 1.

    Returns:
        o (B, T, H, e) in the dtype of the products, and the state after the last token of each sequence (N, G, m, e) float32.
    """
    chunk, recurrent, _ = load_ops()
    B, T, H, m = q.shape
    G, e = k.shape[2], v.shape[-1]
    R = H // G
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    dtype = torch.float32 if dtype == torch.float16 else dtype
    inputs = [x for x in (q, k, v, log_decay, state) if x is not None]
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    short = T == 1 or (T <= RECURRENT_TOKENS and not has_gradient)
    decay = {}
    gated = False
    if log_decay is not None:
        log_decay = log_decay.float()
        # g_gamma gets no gradient, and fla raises it to powers that overflow behind the last token of a chunk that is not full
        whole_chunks = cu_seqlens is None and T % CHUNK_TOKENS == 0
        gated = log_decay.dim() == 3 or (has_gradient and log_decay.requires_grad) or not (short or whole_chunks)
        if gated:
            decay["g"] = repeat_heads(log_decay.expand(B, T, G), R, 2)
        else:
            decay["g_gamma"] = repeat_heads(log_decay, R, 0)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state = state.float()

    if short or (has_gradient and gated and gated_backward_is_refused(q.device)):
        op = recurrent
    else:
        op = chunk
        pad_m, pad_e = -m % ALIGNMENT, -e % ALIGNMENT
        q = pad_end(q, pad_m)
        k = pad_end(k, pad_m)
        v = pad_end(v, pad_e)
        state = pad_end(state, pad_e, pad_m)
    # fla knows no grouped heads: of R equal states that are computed, the first is returned
    k = repeat_heads(k, R, 2)
    v = repeat_heads(v, R, 2)
    state = repeat_heads(state, R, 1)
    o, final = op(q, k, v, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, **decay)
    return o[..., :e], final[:, ::R, :m, :e].contiguous()


def repeat_heads(x: Tensor, times: int, dim: int) -> Tensor:
    """x with each entry along `dim` repeated."""
    return x if times == 1 else x.repeat_interleave(times, dim)


def pad_end(x: Tensor, last: int, second_last: int = 0) -> Tensor:
    """x with this number of zeros at the end of its last and last but one dimension."""
    return F.pad(x, (0, last, 0, second_last)) if last or second_last else x
