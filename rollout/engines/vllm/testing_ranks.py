"""The data-parallel ranks of the wire's double: each has a prefix cache of its own, as a real one's."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 32


class Ranks:
    """So many; `placed` has the rank of each request that named one, in their order."""

    def __init__(self, count: int) -> None:
        self._cached: list[set[bytes]] = [set() for _ in range(count)]
        self._running = [0] * count
        self._turn = 0
        self.placed: list[int] = []

    def place(self, named: str | None) -> int:
        """The rank that is to draw: as named, else the next one of the least loaded.  ValueError, in vLLM's words."""
        count = len(self._cached)
        if named is None:
            self._turn += 1
            rank = min(range(count), key=lambda each: (self._running[each], (each - self._turn) % count))
        elif not 0 <= (rank := int(named)) < count:
            raise ValueError(f"data_parallel_rank {rank} is out of range [0, {count}).")
        else:
            self.placed.append(rank)
        self._running[rank] += 1
        return rank

    def leave(self, rank: int) -> None:
        """A request has ended there."""
        self._running[rank] -= 1

    def keep(self, rank: int, salt: str, ids: Sequence[int]) -> None:
        """The rank knows these tokens from now on."""
        self._cached[rank].update(_blocks(salt, ids))

    def cached_count(self, rank: int, salt: str, ids: Sequence[int]) -> int:
        """How many of them it knows; the last one it computes in any case."""
        return BLOCK_TOKENS * sum(block in self._cached[rank] for block in _blocks(salt, ids[:-1]))

    def forget(self) -> None:
        """None of them knows anything."""
        for cached in self._cached:
            cached.clear()


def _blocks(salt: str, ids: Sequence[int]) -> list[bytes]:
    ends = range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS)
    return [hashlib.sha256(salt.encode() + array("I", ids[:end]).tobytes()).digest() for end in ends]
