"""The sessions that an engine over a server has seen, until they are released: who drew for each, and who is pinned."""

from __future__ import annotations

from rollout.engine import KvBreak, SampleRequest


class Sessions:
    """None of them, at first."""

    def __init__(self) -> None:
        self._drew_with: dict[str, str] = {}
        """Session -> the digest of the weights that drew for it last."""
        self._pinned: set[str] = set()

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

    def release(self, session: str) -> None:
        """It has ended."""
        self._drew_with.pop(session, None)
        self._pinned.discard(session)

    def clear(self) -> None:
        """All have."""
        self._drew_with.clear()
        self._pinned.clear()
