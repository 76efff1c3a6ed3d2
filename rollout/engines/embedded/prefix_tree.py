"""A radix tree over token ids: what is kept at a prefix, and how far two contexts go together.

A lookup walks the prompt once, however many contexts there are.  A node without a value stands only where
two of them part; one that is no longer needed is taken out with the value that needed it.

Keys are u32 ids, little-endian, as a `KeptState` has its tokens; counts are of tokens.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from rollout.engines.kept_state import TOKEN_BYTES

T = TypeVar("T")


def shared_count(first: bytes, second: bytes) -> int:
    """Tokens that both begin with."""
    size = min(len(first), len(second))
    odd = int.from_bytes(first[:size], "little") ^ int.from_bytes(second[:size], "little")
    return (((odd & -odd).bit_length() - 1) // 8 if odd else size) // TOKEN_BYTES


class Node(Generic[T]):
    """A place in the tree: the tokens from its parent's place to here, and what is kept here."""

    __slots__ = ("children", "edge", "parent", "value")

    def __init__(self, parent: Node[T] | None, edge: bytes) -> None:
        self.parent = parent
        self.edge = edge
        self.children: dict[bytes, Node[T]] = {}
        self.value: T | None = None

    @property
    def is_passed(self) -> bool:
        """Whether one line goes on from here, and on from its next place."""
        return len(self.children) == 1 and any(child.children for child in self.children.values())


class PrefixTree(Generic[T]):
    """Values by token prefix."""

    def __init__(self) -> None:
        self.root: Node[T] = Node(None, b"")

    def find(self, tokens: bytes) -> tuple[Node[T] | None, int]:
        """The deepest node with a value at a prefix of the tokens, and how many of them anything here begins with."""
        node, taken, best = self.root, 0, self.root if self.root.value is not None else None
        while (child := node.children.get(tokens[taken : taken + TOKEN_BYTES])) is not None:
            if not tokens.startswith(child.edge, taken):
                return best, taken // TOKEN_BYTES + shared_count(tokens[taken : taken + len(child.edge)], child.edge)
            node, taken = child, taken + len(child.edge)
            best = node if node.value is not None else best
        return best, taken // TOKEN_BYTES

    def node(self, tokens: bytes) -> Node[T]:
        """The node of these tokens, made if there is none: then it must be given a value."""
        node, taken = self.root, 0
        while taken < len(tokens):
            child = node.children.get(tokens[taken : taken + TOKEN_BYTES])
            if child is None:
                return _attach(node, tokens[taken:])
            common = shared_count(tokens[taken : taken + len(child.edge)], child.edge) * TOKEN_BYTES
            node, taken = child if common == len(child.edge) else _split(child, common), taken + common
        return node

    def remove(self, node: Node[T]) -> None:
        """Take a node's value away, and what stood only for it."""
        node.value = None
        while node.value is None and not node.children and node.parent is not None:
            parent = node.parent
            del parent.children[node.edge[:TOKEN_BYTES]]
            node = parent
        if node.value is None and len(node.children) == 1 and node.parent is not None:
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, node.parent
            node.parent.children[child.edge[:TOKEN_BYTES]] = child


def _attach(parent: Node[T], edge: bytes) -> Node[T]:
    node = parent.children[edge[:TOKEN_BYTES]] = Node(parent, edge)
    return node


def _split(child: Node[T], count: int) -> Node[T]:
    """A node `count` bytes into the edge of a child."""
    assert child.parent is not None  # noqa: S101 - the root has no edge to split
    upper = _attach(child.parent, child.edge[:count])
    child.edge, child.parent = child.edge[count:], upper
    upper.children[child.edge[:TOKEN_BYTES]] = child
    return upper
