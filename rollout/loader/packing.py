"""Packing: which rollouts share a sequence, and which rank computes it.  Pure, and equal for equal arguments.

Best fit decreasing: the longest first, each into the fullest sequence that has room.  Its result is
within 11/9 of the least possible number of sequences, like first fit decreasing, and usually one off.

See: D. S. Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms" (1974).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bin = list[int]
"""Indexes of what lies in it."""


def pack(lengths: Sequence[int], budget: int) -> list[Bin]:
    """As few bins as best fit decreasing needs, none above `budget`.  ValueError if an item does not fit alone."""
    order = _longest_first(lengths)
    if order and lengths[order[0]] > budget:
        raise ValueError(f"item {order[0]} has {lengths[order[0]]} tokens, the budget is {budget}")
    bins: list[Bin] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending; without those that nothing fits into any more
    least = lengths[order[-1]] if order else 0
    for item in order:
        at = bisect_left(rooms, (lengths[item], -1))
        if at == len(rooms):
            room, index = budget, len(bins)
            bins.append([])
        else:
            room, index = rooms.pop(at)
        bins[index].append(item)
        if room - lengths[item] >= least:
            insort(rooms, (room - lengths[item], index))
    return bins


def spread(lengths: Sequence[int], budget: int, bins_count: int) -> list[Bin] | None:
    """All items over exactly `bins_count` bins, as evenly as longest-first does it; None if that passes the budget."""
    bins: list[Bin] = [[] for _ in range(bins_count)]
    loads = [(0, index) for index in range(bins_count)]
    for item in _longest_first(lengths):
        load, index = loads[0]
        if load + lengths[item] > budget:
            return None  # not even the emptiest has room
        bins[index].append(item)
        heapq.heapreplace(loads, (load + lengths[item], index))
    return bins


def pack_for_ranks(lengths: Sequence[int], budget: int, ranks_count: int) -> list[list[Bin]]:
    """For each rank its bins: as many for one rank as for another (some may be empty), tokens as even as may be.

    The number of bins is the least multiple of the ranks that holds what `pack` makes; the items are spread over all
    of them if the budget allows it, so that no rank waits for one with a sequence more.
    """
    packed = pack(lengths, budget)
    each_count = -(-len(packed) // ranks_count)
    bins = spread(lengths, budget, each_count * ranks_count) or packed
    loads = [sum(lengths[item] for item in each) for each in bins]
    dealt: list[list[Bin]] = [[] for _ in range(ranks_count)]
    ranks = [(0, rank) for rank in range(ranks_count)]
    for index in _longest_first(loads):
        load, rank = heapq.heappop(ranks)
        dealt[rank].append(sorted(bins[index]))
        if len(dealt[rank]) < each_count:
            heapq.heappush(ranks, (load + loads[index], rank))
    for mine in dealt:
        mine.extend([] for _ in range(each_count - len(mine)))
    return dealt


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda item: -lengths[item])
