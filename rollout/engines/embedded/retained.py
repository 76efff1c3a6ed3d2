"""States kept after their request, in a tree by exact token prefix for each weights.

A state is a function of its tokens and of the weights that computed it (bit for bit), so any state
of these weights whose tokens are a prefix of a request can start it: a session's own from the last
turn, the constant system and tools prefix that all sessions share, or a parent's under a Quick
Instruction.  What is kept therefore decides how fast an answer comes, never which answer.  A state
that more than one version of the weights computed belongs to its own session alone.

A session that ends leaves its state to others, for as long as there is room.  Room is made by what is
spare, and then by what was used longest ago.  Spare is what no session would go on from and nobody else
has gone on from yet: places where contexts could part, former turns, sessions that ended.

Invariants:
1. The bytes held never exceed `bytes_max`.
See: docs/adr/0026-states-in-a-tree.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from rollout.engines.embedded.prefix_tree import Node, PrefixTree
from rollout.engines.kept_state import TOKEN_BYTES, KeptState


class _Held:
    """A state, the sessions whose newest it is, and its place in a tree; None if it serves one session alone."""

    __slots__ = ("entry", "node", "owners")

    def __init__(self, entry: KeptState, node: Node[_Held] | None) -> None:
        self.entry = entry
        self.node = node
        self.owners: set[str] = set()


class RetainedStates:
    """At most `bytes_max` bytes of packed states."""

    def __init__(self, bytes_max: int, evicted: Callable[[KeptState], object] = lambda _entry: None) -> None:
        """`evicted` is told each state that makes room, but for the spare ones and those of one session alone."""
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self._evicted = evicted
        self._trees: dict[str, PrefixTree[_Held]] = {}
        self._own: dict[str, _Held] = {}
        self._spare: OrderedDict[_Held, None] = OrderedDict()
        self._used: OrderedDict[_Held, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spare) + len(self._used)

    def __iter__(self) -> Iterator[KeptState]:
        """What would go first comes first; of a line of spare ones only the last two, where and how it ended."""
        yield from (held.entry for held in self._spare if held.node and not held.node.is_passed)
        yield from (held.entry for held in self._used)

    def put(self, entry: KeptState, session: str = "") -> None:
        """Keep a state, as the newest of a session if one is named; others make room."""
        if self.claim(entry.tokens, entry.weights, session):
            return
        held = self._add(entry)
        if held is not None and session:
            self._give(held, session)

    def claim(self, tokens: bytes, weights: tuple[str, ...], session: str = "") -> bool:
        """Whether a state of these very tokens is kept; it counts as used, and as the session's newest."""
        held = self._exact(weights, tokens)
        if held is not None:
            self._use(held)
            self._give(held, session)
        return held is not None

    def own(self, session: str) -> KeptState | None:
        """The newest state of a session, if it is kept; it counts as used."""
        held = self._own.get(session)
        if held is None:
            return None
        self._use(held)
        return held.entry

    def release(self, session: str) -> None:
        """The session has ended: what only it could use is dropped."""
        if (held := self._disown(session)) is not None:
            self._demote(held)

    def longest_prefix(self, tokens: bytes, weights_digest: str) -> tuple[KeptState | None, int]:
        """The longest state of these weights whose tokens are a proper prefix, and how many tokens of it are known.

        Known is what any state begins with: a context that goes its own way from there shares it.  The state counts
        as used.
        """
        tree = self._trees.get(weights_digest)
        if tree is None:
            return None, 0
        node, known_count = tree.find(tokens[:-TOKEN_BYTES])
        if node is None or node.value is None:
            return None, known_count
        self._use(node.value)
        return node.value.entry, known_count

    def _exact(self, weights: tuple[str, ...], tokens: bytes) -> _Held | None:
        tree = self._trees.get(weights[0]) if len(weights) == 1 else None
        if tree is None:
            return None
        node, _ = tree.find(tokens)
        held = node.value if node else None
        return held if held and len(held.entry.tokens) == len(tokens) else None

    def _add(self, entry: KeptState) -> _Held | None:
        size = _size(entry)
        if size > self.bytes_max:
            return None
        while self.bytes_held + size > self.bytes_max:
            self._evict()
        node = None
        if len(entry.weights) == 1:
            node = self._trees.setdefault(entry.weights[0], PrefixTree()).node(entry.tokens)
        held = _Held(entry, node)
        if node is not None:
            node.value = held
        self.bytes_held += size
        self._spare[held] = None
        return held

    def _give(self, held: _Held, session: str) -> None:
        """Make it the session's newest, if one is named, in place of the one before."""
        if session and self._own.get(session) is not held:
            before = self._disown(session)
            self._own[session] = held
            held.owners.add(session)
            self._use(held)
            if before is not None:
                self._demote(before)

    def _disown(self, session: str) -> _Held | None:
        held = self._own.pop(session, None)
        if held is not None:
            held.owners.discard(session)
        return held

    def _demote(self, held: _Held) -> None:
        """Spare it, unless it is a session's newest, or a place where contexts part."""
        if held.owners:
            return
        if held.node is None:
            self._remove(held)
        elif len(held.node.children) <= 1 and held in self._used:
            del self._used[held]
            self._spare[held] = None

    def _use(self, held: _Held) -> None:
        self._spare.pop(held, None)
        self._used[held] = None
        self._used.move_to_end(held)

    def _evict(self) -> None:
        is_spare, held = bool(self._spare), next(iter(self._spare or self._used))
        self._remove(held)
        if not is_spare and held.node is not None:
            self._evicted(held.entry)

    def _remove(self, held: _Held) -> None:
        self._spare.pop(held, None)
        self._used.pop(held, None)
        for session in held.owners:
            del self._own[session]
        self.bytes_held -= _size(held.entry)
        if held.node is not None:
            (digest,) = held.entry.weights
            tree = self._trees[digest]
            tree.remove(held.node)
            if not tree.root.children and tree.root.value is None:
                del self._trees[digest]


def _size(entry: KeptState) -> int:
    return len(entry.packed) + len(entry.tokens)
