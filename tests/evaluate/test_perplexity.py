"""Perplexity against closed forms and a hand computation."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dijiang.convert import load_source
from dijiang.evaluate import perplexity
from dijiang.evaluate.quality.perplexity import perplexity_scores, token_losses, windows


class Fixed(torch.nn.Module):
    """A model whose logits for the next token depend on the present one by a table (vocabulary, vocabulary)."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def base_model(self, input_ids, use_cache):
        assert not use_cache and not torch.is_grad_enabled()
        return SimpleNamespace(last_hidden_state=input_ids)

    def get_output_embeddings(self):
        return lambda ids: self.table[ids]


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


def loop(model, tokens, length: int, stride: int) -> tuple[float, int]:
    """Perplexity of a long text as transformers' documentation computes it, by labels, and how many tokens it scored."""
    total = count = previous_end = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        labels = tokens[begin:end].clone()
        labels[: max(previous_end - begin, 0)] = -100
        if scored := int((labels[1:] != -100).sum()):
            total += model(tokens[None, begin:end], labels=labels[None]).loss.item() * scored
            count += scored
        previous_end = end
        if end == len(tokens):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(
    ("family", "length", "stride"), [("llama", 16, 16), ("gpt_neox", 13, 5), ("llama", 9, 1), ("llama", 64, 64)]
)
def test_scores_are_those_of_a_loop_on_transformers_own_model(make_source, tokens, family, length, stride):
    folder, _ = make_source(family)
    text = tokens(61, rows=1)[0]
    with torch.no_grad():
        expected, count = loop(AutoModelForCausalLM.from_pretrained(folder), text, length, stride)
    told = []
    found = perplexity_scores(load_source(folder)[0], text, length=length, stride=stride, advance=told.append)
    assert sum(found["weights"]) == count
    assert math.exp(sum(found["totals"]) / count) == pytest.approx(expected, rel=1e-4)
    assert told == [len(window) for window, _ in windows(text, length, stride)]


@pytest.mark.parametrize(("length", "stride"), [(10, 10), (10, 3), (7, 1), (100, 40), (2, 1), (30, 29)])
def test_windows_score_every_token_once(length, stride):
    text = torch.arange(57)
    cut = windows(text, length, stride)
    scored = torch.cat([window[start:] for window, start in cut]).tolist()
    assert all(2 <= len(window) <= length for window, _ in cut)
    if stride < length:
        assert scored == list(range(1, 57))
        assert all(start >= length - stride for _, start in cut[1:-1])
    else:
        assert scored == [t for t in range(57) if t % length]


def test_text_of_one_token_and_wrong_strides_are_refused(refused, tmp_path):
    refused(tmp_path, lambda: windows(torch.arange(1), 8, 8), "^the text has 1 token, .*give more text$")
    for stride in (0, 9):
        refused(
            tmp_path, lambda s=stride: windows(torch.arange(99), 8, s), f"^stride={stride} must be from 1 to the length, 8,"
        )


def test_positions_add_up_to_the_whole(pair, tokens):
    text = tokens(300, rows=1)[0]
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(1))
    found = perplexity_scores(Fixed(table), text, length=150, stride=70)
    by = found["detail"]["by_position"]
    assert by["edges"] == [64, 128, 150]
    assert sum(by["totals"]) == pytest.approx(sum(found["totals"])) and sum(by["weights"]) == sum(found["weights"]) == 299
    losses = [0.0] * 3
    counts = [0] * 3
    for begin, start, end in ((0, 1, 150), (70, 80, 150), (140, 80, 150), (210, 80, 90)):
        each = (
            -table[text[begin + start - 1 : begin + end - 1]]
            .log_softmax(-1)
            .gather(1, text[begin + start : begin + end, None])
        )
        for position, loss in zip(range(start, end), each[:, 0].tolist(), strict=True):
            bucket = (position >= 64) + (position >= 128)
            losses[bucket] += loss
            counts[bucket] += 1
    assert by["weights"] == counts and by["totals"] == pytest.approx(losses, rel=1e-5)


def test_losses_do_not_depend_on_how_many_rows_meet_the_head(pair, tokens, monkeypatch):
    model, text = load_source(pair.checkpoint)[0], tokens(50, rows=1)[0]
    whole = token_losses(model, text, start=3)
    monkeypatch.setattr(
        sys.modules["dijiang.evaluate.quality.perplexity"], "LOGIT_ROWS", 7
    )  # the package has a function of that name
    assert whole.shape == (47,) and torch.allclose(token_losses(model, text, start=3), whole, atol=1e-5)
