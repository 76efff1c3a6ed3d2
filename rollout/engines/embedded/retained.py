"""States kept after their request, found again by exact token prefix.

A state is a function of its tokens and of the weights that computed it (bit for bit), so any state
of these weights whose tokens are a prefix of a request can start it: a session's own from the last
turn, the constant system and tools prefix that all sessions share, or a parent's under a Quick
Instruction.  What is kept therefore decides how fast an answer comes, never which answer.  A state
that more than one version of the weights computed belongs to its own session alone.

Invariants:
1. The bytes held never exceed `bytes_max`; the entry used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from rollout.engines.kept_state import KeptState


class RetainedStates:
    """At most `bytes_max` bytes of packed states, one for each owner (a session, or a shared prefix)."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self._entries: OrderedDict[str | bytes, KeptState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, owner: str | bytes) -> bool:
        return owner in self._entries

    def put(self, owner: str | bytes, entry: KeptState) -> None:
        """Keep the entry in place of the owner's last one; entries used longest ago make room."""
        self.drop(owner)
        size = _size(entry)
        if size > self.bytes_max:
            return
        while self.bytes_held + size > self.bytes_max:
            _, evicted = self._entries.popitem(last=False)
            self.bytes_held -= _size(evicted)
        self._entries[owner] = entry
        self.bytes_held += size

    def drop(self, owner: str | bytes) -> None:
        """Forget the owner's entry, if there is one."""
        entry = self._entries.pop(owner, None)
        if entry is not None:
            self.bytes_held -= _size(entry)

    def own(self, owner: str | bytes) -> KeptState | None:
        """The owner's entry, if there is one; it counts as used."""
        if owner in self._entries:
            self._entries.move_to_end(owner)
        return self._entries.get(owner)

    def longest_prefix(self, tokens: bytes, weights_digest: str) -> KeptState | None:
        """The longest entry of these weights alone whose tokens are a proper prefix of `tokens`; it counts as used."""
        best: str | bytes | None = None
        length, weights = 0, (weights_digest,)
        for owner, entry in self._entries.items():
            is_better = length < len(entry.tokens) < len(tokens) and entry.weights == weights
            if is_better and tokens.startswith(entry.tokens):
                best, length = owner, len(entry.tokens)
        return None if best is None else self.own(best)


def _size(entry: KeptState) -> int:
    return len(entry.packed) + len(entry.tokens)
