"""The sessions that an engine over a server has seen, until they are released: who drew for each, and where.

A server with several data-parallel ranks has a prefix cache in each, and spreads requests by load.  So it is told which
rank is to draw: the session's own, or the one that knows the beginning of its context (`engines/homes.py`).
"""

from __future__ import annotations

from rollout.engine import KvBreak, SampleRequest
from rollout.engines.homes import Homes
from rollout.engines.vllm.wire import RANK_HEADER


class Sessions:
    """None of them, at first."""

    def __init__(self) -> None:
        self._drew_with: dict[str, str] = {}
        """Session -> the digest of the weights that drew for it last."""
        self._pinned: set[str] = set()
        self._ranks = Homes()

    @property
    def pinned_count(self) -> int:
        """Those that are to be drawn with the weights of now, and no others."""
        return len(self._pinned)

    def enter(self, request: SampleRequest, digest: str) -> KvBreak:
        """Weights of this digest draw for a session now; "rebuilt" if others did before: another salt, another KV."""
        session = request.session
        before = self._drew_with.get(session, digest)
        self._drew_with[session] = digest
        (self._pinned.add if request.on_update == "pin" else self._pinned.discard)(session)
        return "" if before == digest else "rebuilt"

    def headers(self, request: SampleRequest, ranks_count: int) -> dict[str, str]:
        """What sends a request to the rank where its session lives from now on; nothing where there is only one."""
        if ranks_count == 1:
            return {}
        ranks = [str(rank) for rank in range(ranks_count)]
        return {RANK_HEADER: self._ranks.choose(request.session, request.token_ids, ranks)}

    def release(self, session: str) -> None:
        """It has ended."""
        self._drew_with.pop(session, None)
        self._pinned.discard(session)
        self._ranks.release(session)

    def clear(self) -> None:
        """All have; which rank knows which beginnings is remembered."""
        self._drew_with.clear()
        self._pinned.clear()
        self._ranks.clear()
