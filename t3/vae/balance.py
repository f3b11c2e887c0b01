"""Work shared over ranks so that the longest of them is short. Pure Python."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

# From so many tiles per rank on, what is left over hardly matters, and a bound is as good as the sharing itself.
_MANY = 32


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each piece of work: the dearest first, each to the rank that has least so far.

    Longest-processing-time rule (Graham 1969): at most 4/3 of the best possible.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    found = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        found[piece] = rank
        heapq.heappush(loads, (load + costs[piece], rank))
    return found


def loads(costs: Sequence[float], ranks: int) -> list[float]:
    """What each rank has to do under `assign`."""
    found = [0.0] * ranks
    for cost, rank in zip(costs, assign(costs, ranks), strict=True):
        found[rank] += cost
    return found


def longest(counts: Sequence[tuple[float, int]], ranks: int) -> float:
    """What the busiest rank has to do under `assign`; with many pieces an upper bound of it.

    counts: pairs of a cost and how many pieces have it.
    """
    if sum(count for _, count in counts) > _MANY * ranks:
        return sum(cost * count for cost, count in counts) / ranks + max(cost for cost, _ in counts)
    return max(loads([cost for cost, count in counts for _ in range(count)], ranks))


def frame_shares(frames: int, ranks: int) -> list[range]:
    """Which of the latent frames each rank takes through the middle stage: neighbours, the longer shares first."""
    starts = [-(-rank * frames // ranks) for rank in range(ranks + 1)]
    return [range(*pair) for pair in pairwise(starts)]


def warm_up(share: range, lookback: int, depth: int) -> range:
    """The frames before a share that its first frame depends on, through causal convolutions that look `lookback`
    frames back in all.

    It begins at a multiple of `depth`: `Past` then holds every frame in the very place where one process has it, and
    sums are made in the same order, to the same bits.
    """
    return range(max(0, share.start - lookback) // depth * depth, share.start) if share else range(0)
