"""Shares of sources to within one block, and an order that never changes."""

import random

import numpy as np
import pytest

from dijiang.train.data.mixture import Mixture, Shuffle, whole_weights
from dijiang.train.recipe.schema import SourceConfig


def test_the_order_is_the_same_with_every_release():
    """Because stored runs are resumed under other versions of numpy."""
    shuffle = Shuffle(10, 3, 1)
    assert [shuffle[draw] for draw in range(10)] == [3, 0, 4, 8, 2, 7, 9, 6, 1, 5]
    assert [shuffle[draw] for draw in range(10, 20)] == [7, 2, 3, 1, 5, 9, 6, 8, 4, 0]


@pytest.mark.parametrize(
    "weights",
    [
        (1,),
        (0.7, 0.3),
        (1, 1, 1),
        (5, 1e-3),
        (900, *[2] * 49),
        (1 / 3, 2 / 3, 0.123456789),
        (1, 1, 1, 1, 100, 100, 100),
        tuple(range(1, 30)),
        tuple(10 ** random.Random(4).uniform(0, 4) for _ in range(25)),
    ],
)
def test_each_source_has_its_share_to_within_one_block(weights):
    mixture = Mixture(weights, 3000)
    pairs = [mixture(index) for index in range(3000)]
    draws = [0] * len(weights)
    for number, (source, draw) in enumerate(pairs, 1):
        assert draw == draws[source]
        draws[source] += 1
        shares = np.array(weights) / sum(weights) * number
        assert np.abs(shares - draws).max() < 1
        if number % 500 == 0:
            assert mixture.counts(number) == draws


def test_weights_are_read_as_the_decimals_they_are():
    assert whole_weights([0.7, 0.3]) == [7, 3] and whole_weights([1e-7, 2e9]) == [1, 2 * 10**16]
    assert whole_weights([4.0, 6, 2]) == [2, 3, 1]
    assert Mixture([0.7, 0.2, 0.1], 10**7).period == 10
    with pytest.raises(ValueError, match="weight=inf must be finite"):
        SourceConfig(path="a", weight=float("inf"))


def test_ten_million_blocks_are_no_burden():
    mixture = Mixture([0.65, 0.25, 0.1], 10**7)
    assert mixture(10**7 - 1)[1] < 7 * 10**6 and mixture.counts(10**7) == [6_500_000, 2_500_000, 1_000_000]
    assert mixture.source_of.nbytes + mixture.draw_of.nbytes < 1000
    exact = Mixture([10**7 - 3, 3], 10**5)
    assert exact.period == 10**5 and sum(exact.counts(10**5)) == 10**5
