"""Perplexity scores of windows, against transformers' own loop, and by position."""

import math

import pytest
import torch
from dijiang_testing.table_model import TableModel
from transformers import AutoModelForCausalLM

from dijiang.common.perplexity import windows
from dijiang.convert import load_source
from dijiang.evaluate.quality.perplexity import perplexity_scores


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


def test_positions_add_up_to_the_whole(pair, tokens):
    text = tokens(300, rows=1)[0]
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(1))
    found = perplexity_scores(TableModel(table), text, length=150, stride=70)
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
