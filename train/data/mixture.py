"""Order of the training text: closed forms choose the source of each block, seeded shuffles the block of that source."""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the exact proportion of `weights`, each read as the decimal it is written as."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    return [weight // gcd(*whole) for weight in whole]


def random_below(count: int, seed: int, index: int) -> int:
    """A number from 0 to count - 1 that depends only on the seed and the sample index."""
    return int(np.random.SeedSequence((seed % 2**64, index)).generate_state(1, np.uint64)[0]) % count


class Mixture:
    """
    Shares blocks among sources so that among the first n blocks, for every n, each source has its share to within one.

    The order repeats after as many blocks as the whole weights sum to. Within that period each draw from a source falls
    between a release and a deadline, and the earliest deadline goes first: R. Tijdeman, The chairman assignment problem
    (1980), https://doi.org/10.1016/0012-365X(80)90269-1. Always drawing from the source with the largest deficit would let
    some fall behind by more than one.

    Args:
        weights: weights of the sources, on any scale.
        blocks: largest number of blocks that will be asked for.

    Attributes:
        source_of: (period,) source of each block.
        draw_of: (period,) number of earlier blocks in the period that have the same source.
    """

    def __init__(self, weights: Sequence[float], blocks: int):
        shares = whole_weights(weights)
        self.period = min(sum(shares), blocks)
        self.source_of = np.array(assign(shares, self.period), dtype=np.uint16)
        self.per_period = np.bincount(self.source_of, minlength=len(shares))
        self.draw_of = np.empty(self.period, dtype=np.int64)
        for source, draws in enumerate(self.per_period):
            self.draw_of[self.source_of == source] = np.arange(draws)

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, number of earlier blocks with that source) of the block with this index."""
        periods, within = divmod(index, self.period)
        source = int(self.source_of[within])
        return source, periods * int(self.per_period[source]) + int(self.draw_of[within])

    def counts(self, blocks: int) -> list[int]:
        """Number of blocks of each source among the first `blocks`."""
        periods, rest = divmod(blocks, self.period)
        return (periods * self.per_period + np.bincount(self.source_of[:rest], minlength=len(self.per_period))).tolist()


def assign(shares: Sequence[int], blocks: int) -> list[int]:
    """The source of each of the first `blocks` blocks, for whole-numbered shares."""
    if len(shares) == 1:
        return [0] * blocks
    total = sum(shares)
    slack = 2 * len(shares) - 2

    def release(source: int) -> int:
        """The first block, counted from 1, at which 1/slack of the source's next draw is due: a quotient, rounded up."""
        return -(-(draws[source] * slack + 1) * total // (slack * shares[source]))

    def deadline(source: int) -> float:
        """The block at which 1 - 1/slack of that draw is due; it may come no later."""
        return (draws[source] * slack + slack - 1) * total / (slack * shares[source])

    draws = [0] * len(shares)
    order = []
    waiting = [(release(source), source) for source in range(len(shares))]
    heapq.heapify(waiting)
    ready: list[tuple[float, int]] = []  # a heap too, of (deadline, source)
    for number in range(1, blocks + 1):
        while waiting and waiting[0][0] <= number:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (deadline(source), source))
        source = heapq.heappop(ready)[1]
        order.append(source)
        draws[source] += 1
        heapq.heappush(waiting, (release(source), source))
    return order


class Shuffle:
    """
    The blocks of one source in a random order, and in another one each time they are used up.

    Args:
        blocks: number of blocks of the source.
        seed: seed of the stage.
        source: index of the source, so that each source has an order of its own.
    """

    def __init__(self, blocks: int, seed: int, source: int):
        self.blocks = blocks
        self.key = (seed % 2**64, source)
        self.epoch = -1
        self.order = np.empty(0)

    def __getitem__(self, draw: int) -> int:
        """The block of this draw, counted from 0 over all epochs."""
        epoch, within = divmod(draw, self.blocks)
        if epoch != self.epoch:
            # RandomState, because numpy promises never to change its numbers, which a resumed run relies on
            bits = np.random.MT19937(np.random.SeedSequence((*self.key, epoch)))
            self.order = np.random.RandomState(bits).permutation(self.blocks)
            self.epoch = epoch
        return int(self.order[within])
