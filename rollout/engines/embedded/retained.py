"""States kept after their request, found again by exact token prefix.

A state is a function of its tokens and nothing else (bit for bit), so any state whose tokens are a
prefix of a request can start it: a session's own from the last turn, the constant system and tools
prefix that all sessions share, or a parent's under a Quick Instruction.  What is kept therefore
decides how fast an answer comes, never which answer.

Invariants:
1. The bytes held never exceed `bytes_max`; the entry used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

TOKEN_BYTES = 4


class Retained(msgspec.Struct, frozen=True):
    """A packed state and the tokens it took in, as consecutive u32."""

    tokens: bytes
    packed: bytearray

    @property
    def tokens_count(self) -> int:
        """Tokens the state has taken in."""
        return len(self.tokens) // TOKEN_BYTES


class RetainedStates:
    """At most `bytes_max` bytes of packed states, one for each owner (a session, or a shared prefix)."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self._entries: OrderedDict[str | bytes, Retained] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, owner: str | bytes) -> bool:
        return owner in self._entries

    def put(self, owner: str | bytes, entry: Retained) -> None:
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

    def longest_prefix(self, tokens: bytes) -> Retained | None:
        """The longest entry whose tokens are a proper prefix of `tokens` (u32 each); it counts as used."""
        best: str | bytes | None = None
        length = 0
        for owner, entry in self._entries.items():
            if length < len(entry.tokens) < len(tokens) and tokens.startswith(entry.tokens):
                best, length = owner, len(entry.tokens)
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best]


def _size(entry: Retained) -> int:
    return len(entry.packed) + len(entry.tokens)
