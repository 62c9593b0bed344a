"""Perplexity against closed forms and a hand computation."""

import math
from types import SimpleNamespace

import pytest
import torch

from dijiang.convert import load_source
from dijiang.evaluate import perplexity


class Fixed(torch.nn.Module):
    """A model whose logits for the next token depend on the present one by a table (vocabulary, vocabulary)."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, use_cache):
        assert not use_cache and not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.table[input_ids])


def test_uniform_logits_give_the_vocabulary_size(tokens):
    assert perplexity(Fixed(torch.full((320, 320), 2.5)), tokens(9)) == pytest.approx(320, rel=1e-6)


def test_certainty_gives_one():
    table = torch.full((4, 4), -100.0)
    table[[0, 1, 2, 3], [1, 2, 3, 0]] = 0.0  # each token is followed by the next number
    assert perplexity(Fixed(table), torch.tensor([[0, 1, 2, 3, 0], [3, 0, 1, 2, 3]])) == pytest.approx(1)


def test_a_coin_by_hand():
    """From either token: 3/4 for a 1, 1/4 for a 0. The first token is not predicted."""
    table = torch.tensor([[0.0, math.log(3)]] * 2)
    blocks = torch.tensor([[0, 1, 1], [1, 0, 1]])  # predicted: 1 1 and 0 1
    assert perplexity(Fixed(table), blocks) == pytest.approx((0.75**3 * 0.25) ** (-1 / 4))


def test_a_model_by_hand(pair, tokens):
    model, blocks = load_source(pair.checkpoint)[0], tokens(15, rows=3)
    logits = [[model(block[None, : t + 1]).logits[0, t].double() for t in range(14)] for block in blocks]  # token by token
    log_p = [x[t].log_softmax(-1)[block[t + 1]] for x, block in zip(logits, blocks, strict=True) for t in range(14)]
    expected = math.exp(-sum(log_p).item() / len(log_p))
    assert perplexity(model, blocks) == pytest.approx(expected, rel=1e-4) and 1 < expected
    assert perplexity(model, blocks) == perplexity(model, blocks.flip(0)) != perplexity(model, blocks[:1])


def test_half_precision_logits_are_summed_in_float32():
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    blocks = torch.arange(2 * 100).view(2, 100)
    assert perplexity(Fixed(table), blocks) == pytest.approx(perplexity(Fixed(table.double()), blocks), rel=1e-5)
