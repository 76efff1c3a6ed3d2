"""What a worker does about partitions, decided from what the index says.  Pure: no clock, no database.

Every worker decides for itself, by the same rules, from its own snapshot; that two of them want the same partition
costs nothing, for only one can win it (`rollout.workers.index`).

Rules:
1. What the index gives a worker it opens, and what the index does not give it, it lets go of.
2. A partition that nobody alive owns is claimed by whoever has less than its share; shares add up to all of them,
   and differ by one at most.
3. Who has more than its share gives one back at a time, the one with the least to do, when all others have an owner.
4. A worker without a partition makes one if there are fewer partitions than workers; else rule 3 will give it one.

See: docs/adr/0019-many-workers.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from rollout.workers.index import Partition, Snapshot

RENEWALS_PER_TTL = 3


class Plan(msgspec.Struct, frozen=True):
    """What to do next; at most one claim, release or creation at a time, so that others may act in between."""

    open: tuple[Partition, ...] = ()
    lose: tuple[str, ...] = ()
    claim: Partition | None = None
    release: str | None = None
    creates: bool = False


def plan(owner: str, snapshot: Snapshot, held: Mapping[str, tuple[int, int]]) -> Plan:
    """What `owner` does, who holds partitions: name -> (epoch, rollouts that run)."""
    living = snapshot.living()
    mine = {each.name: each for each in snapshot.partitions if each.owner == owner}
    known = {name: mine[name].epoch == epoch for name, (epoch, _) in held.items() if name in mine}
    lose = tuple(name for name in held if not known.get(name, False))
    to_open = tuple(each for name, each in mine.items() if name not in held)
    if owner not in living:  # what is ours is so until somebody claims it, and nothing new becomes ours
        return Plan(to_open, lose)
    floor, rest = divmod(len(snapshot.partitions), len(living))
    counts = Counter(each.owner for each in snapshot.partitions)
    are_some_short = any(counts[each] < floor for each in living)
    share = floor + (rest > 0 and not are_some_short)  # who is short goes first
    free = [each for each in snapshot.partitions if each.owner not in living]
    claim = free[0] if free and len(mine) < share else None
    has_excess = len(mine) > share and not free
    excess = [name for name in held if name not in lose] if has_excess else []
    release = min(excess, key=lambda name: (held[name][1], name), default=None)
    creates = not mine and len(snapshot.partitions) < len(living)
    return Plan(to_open, lose, claim, release, creates and claim is None)


class Lease:
    """What this process knows of its own lease, by a clock of its own that does not stop while it is frozen.

    It is taken for shorter than it is: it counts from before the database was asked.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._asked_at = float("-inf")

    @property
    def renew_every_s(self) -> float:
        """How often to renew."""
        return self.ttl_s / RENEWALS_PER_TTL

    def renewed(self, asked_at: float) -> None:
        """The database granted what it was asked for then."""
        self._asked_at = max(self._asked_at, asked_at)

    def is_due(self, now: float) -> bool:
        """Whether it is time to renew."""
        return now >= self._asked_at + self.renew_every_s

    def left_s(self, now: float) -> float:
        """How much longer it is certain that nobody else may take our partitions."""
        return self._asked_at + self.ttl_s - now
