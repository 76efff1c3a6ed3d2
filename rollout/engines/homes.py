"""Which engine of a pool, or rank of a vLLM server, a session lives on: the one that has its prefix, if it has room.

A session stays where it is.  A new one goes to the engine that knows the longest beginning of its context (members of a
group begin alike, a Quick Instruction begins as its rollout does), else to the one with the fewest sessions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

PREFIX_TOKENS, PREFIXES_MAX = 256, 1 << 16
"""A beginning is known by every so many of its tokens; how many beginnings are remembered."""
SESSIONS_SLACK = 8
"""So many more sessions than the least loaded engine may one have that knows the beginning."""


class Homes:
    """Session -> engine, by name."""

    def __init__(self) -> None:
        self._homes: dict[str, str] = {}
        self._loads: Counter[str] = Counter()
        self._prefixes: OrderedDict[bytes, str] = OrderedDict()

    def of(self, session: str) -> str | None:
        """Where it lives."""
        return self._homes.get(session)

    def choose(self, session: str, token_ids: Sequence[int], living: Sequence[str]) -> str:
        """Where a request of the session is drawn; it lives there from now on.  One of `living`, which are some."""
        home, prefixes = self._homes.get(session), _prefixes(token_ids)
        if home is None or home not in living:
            home = self.least_loaded(living)
            known = next((self._prefixes[each] for each in reversed(prefixes) if each in self._prefixes), home)
            if known in living and self._loads[known] <= self._loads[home] + SESSIONS_SLACK:
                home = known
            self.settle(session, home)
        for each in prefixes:
            self._prefixes[each] = home
            self._prefixes.move_to_end(each)
        while len(self._prefixes) > PREFIXES_MAX:
            self._prefixes.popitem(last=False)
        return home

    def least_loaded(self, living: Sequence[str]) -> str:
        """The one with the fewest sessions, the first of several."""
        return min(living, key=self._loads.__getitem__)

    def settle(self, session: str, home: str) -> None:
        """It lives there from now on."""
        self.release(session)
        self._homes[session] = home
        self._loads[home] += 1

    def release(self, session: str) -> str | None:
        """It will not come again; where it lived."""
        home = self._homes.pop(session, None)
        if home is not None:
            self._loads[home] -= 1
        return home

    def clear(self) -> None:
        """Nobody lives anywhere; what is known of beginnings stays."""
        self._homes.clear()
        self._loads.clear()


def _prefixes(token_ids: Sequence[int]) -> list[bytes]:
    """A digest of the first tokens, of ever more of them, and of all."""
    digest, digests = hashlib.blake2b(digest_size=16), []
    packed = memoryview(array("I", token_ids)).cast("B")
    for start in range(0, len(packed), PREFIX_TOKENS * 4):
        digest.update(packed[start : start + PREFIX_TOKENS * 4])
        digests.append(digest.digest())
    return digests
