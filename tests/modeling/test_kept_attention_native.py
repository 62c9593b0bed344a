"""Attention of one query to all rows in C against its definition."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, rows

from dijiang.modeling import native_build
from dijiang.modeling.kept_attention_native import CHUNK, native_attend_to_all

pytestmark = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)


def inputs(B, G, R, T, d, dtype, seed=0):
    """q as a projection gives it, and rows with spare ones behind them."""
    q = rows(B, 1, G * R, d, seed=seed).to(dtype).transpose(1, 2)
    k, v = (rows(B, G, T + 9, d, seed=seed + i).to(dtype)[:, :, :T] for i in (1, 2))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 7, CHUNK, CHUNK + 1, 9000])
@pytest.mark.parametrize(("B", "G", "R", "d"), [(1, 1, 3, 64), (2, 3, 1, 16), (2, 2, 4, 48)])
@torch.no_grad()
def test_equals_the_definition(B, G, R, d, T, dtype):
    q, k, v = inputs(B, G, R, T, d, dtype)
    k[:, :, -1] *= 20
    o = native_attend_to_all(q, k, v, 0.3)
    weights = (q.double() @ k.double().repeat_interleave(R, 1).transpose(2, 3) * 0.3).softmax(-1)
    expected = (weights @ v.double().repeat_interleave(R, 1)).transpose(1, 2)
    assert o.dtype == dtype
    assert_close(o, expected, "o", tolerance=2e-6 if dtype == torch.float32 else 8e-3)


def test_what_c_cannot_do_is_left_to_torch(monkeypatch):
    q, k, v = inputs(1, 1, 2, 40, 16, torch.float32)
    assert native_attend_to_all(q, k, v, 0.3) is None  # gradients are wanted
    with torch.no_grad():
        assert native_attend_to_all(q.half(), k.half(), v.half(), 0.3) is None
        assert native_attend_to_all(q[..., :8], k[..., :8], v[..., :8], 0.3) is None
        assert native_attend_to_all(torch.cat((q, q), dim=2), k, v, 0.3) is None
        monkeypatch.setenv("DIJIANG_NATIVE", "0")
        assert native_attend_to_all(q, k, v, 0.3) is None
