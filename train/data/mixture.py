"""Which block of which source stands at each place of the training order: closed forms and seeded shuffles."""

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


def random_below(count: int, seed: int, place: int) -> int:
    """A number from 0 to count - 1 that belongs to a place."""
    return int(np.random.SeedSequence((seed % 2**64, place)).generate_state(1, np.uint64)[0]) % count


class Mixture:
    """
    Shares places among sources so that among the first n places, for every n, each source has its share to within one.

    The order repeats after as many places as the whole weights sum to. Within that, each turn of a source falls between a
    release and a deadline, and the earliest deadline goes first: R. Tijdeman, The chairman assignment problem (1980),
    https://doi.org/10.1016/0012-365X(80)90269-1. Taking the largest deficit first would let some fall behind by more than one.

    Args:
        weights: of the sources, in any scale.
        places: how many will be asked for, at most.

    Attributes:
        source_of: (period,) source of each place.
        turn_of: (period,) how many earlier places of the period have the same source.
    """

    def __init__(self, weights: Sequence[float], places: int):
        shares = whole_weights(weights)
        self.period = min(sum(shares), places)
        self.source_of = np.array(assign(shares, self.period), dtype=np.uint16)
        self.per_period = np.bincount(self.source_of, minlength=len(shares))
        self.turn_of = np.empty(self.period, dtype=np.int64)
        for source, turns in enumerate(self.per_period):
            self.turn_of[self.source_of == source] = np.arange(turns)

    def __call__(self, place: int) -> tuple[int, int]:
        """(source, how many earlier places have that source) of a place."""
        periods, within = divmod(place, self.period)
        source = int(self.source_of[within])
        return source, periods * int(self.per_period[source]) + int(self.turn_of[within])

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` each source has."""
        periods, rest = divmod(places, self.period)
        return (periods * self.per_period + np.bincount(self.source_of[:rest], minlength=len(self.per_period))).tolist()


def assign(shares: Sequence[int], places: int) -> list[int]:
    """The source of each of the first `places`, for whole-numbered shares."""
    if len(shares) == 1:
        return [0] * places
    total, slack = sum(shares), 2 * len(shares) - 2

    def release(source: int) -> int:
        """The first place at which 1/slack of the source's next turn is due: a quotient, rounded up."""
        return -(-(turns[source] * slack + 1) * total // (slack * shares[source]))

    def deadline(source: int) -> float:
        """The place at which 1 - 1/slack of that turn is due; it may come no later."""
        return (turns[source] * slack + slack - 1) * total / (slack * shares[source])

    turns, order = [0] * len(shares), []
    waiting = [(release(source), source) for source in range(len(shares))]
    heapq.heapify(waiting)
    ready: list[tuple[float, int]] = []  # a heap too, of (deadline, source)
    for place in range(1, places + 1):
        while waiting and waiting[0][0] <= place:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (deadline(source), source))
        source = heapq.heappop(ready)[1]
        order.append(source)
        turns[source] += 1
        heapq.heappush(waiting, (release(source), source))
    return order


class Shuffle:
    """
    The blocks of one source in a random order, and again in another one each time they are used up.

    Args:
        blocks: how many there are.
        seed: of the order.
        source: number of the source, which has its own order.
    """

    def __init__(self, blocks: int, seed: int, source: int):
        self.blocks, self.key = blocks, (seed % 2**64, source)
        self.epoch, self.order = -1, np.empty(0)

    def __getitem__(self, turn: int) -> int:
        """The block that is taken at this turn, counted from 0 over all epochs."""
        epoch, within = divmod(turn, self.blocks)
        if epoch != self.epoch:
            # RandomState, because numpy promises never to change its numbers, which a resumed run relies on
            bits = np.random.MT19937(np.random.SeedSequence((*self.key, epoch)))
            self.epoch, self.order = epoch, np.random.RandomState(bits).permutation(self.blocks)
        return int(self.order[within])
