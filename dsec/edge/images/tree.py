"""A file tree as values: what a layer is made from, and what its mounted image is compared with.

Paths are bytes and are taken apart by name alone (dsec/archive.py); no path of an archive ever reaches the host's file
system, so there is nothing for `..`, links or devices to attack.

Invariants:
    1. A node below the root has exactly one name a link; names have no slash and are none of "", ".", "..".
    2. No more than ENTRIES_COUNT_MAX names, no deeper than DEPTH_MAX; their texts take no more than TEXT_BYTES_MAX.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

import msgspec

from dsec.archive import parts
from dsec.errors import InvalidArgumentError

ENTRIES_COUNT_MAX = 4_000_000
TEXT_BYTES_MAX = 1 << 30
"""Names, targets of links and attributes: a tree is in memory, and a packed archive repeats them for nearly nothing."""
_TEXT_BYTES = 64
OPAQUE = b"trusted.overlay.opaque"
CAPABILITY = b"security.capability"
_CAPABILITY_SIZES = {2: 20, 3: 24}


class Data(msgspec.Struct, frozen=True):
    """A file's bytes in an image: where they lie, and the digest of `content.digest` over them.

    `inline` is an offset in the writer's spool, or -1; else they start at block `block`, or, with
    `chunk_bits`, each chunk starts at its own block of `chunks` (-1: a hole).
    """

    size: int
    digest: bytes
    inline: int = -1
    block: int = 0
    chunk_bits: int = 0
    chunks: tuple[int, ...] = ()


class Node(msgspec.Struct, eq=False):
    """One inode; `mode` has the type in it, as `st_mode` does."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = {}
    rdev: int = 0
    target: bytes = b""
    data: Data | None = None
    children: dict[bytes, Node] = {}

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)


def whiteout() -> Node:
    """What hides a name of the layers below: overlayfs takes a character device 0:0 for it."""
    return Node(stat.S_IFCHR)


def directory(mode: int = 0o755) -> Node:
    """An empty directory of root's."""
    return Node(stat.S_IFDIR | mode)


def hide_missing(root: Node, paths: Iterable[str]) -> None:
    """Whiteouts for those of `paths` (parents first) that a tree lacks, and that will lie beneath it."""
    for path in paths:
        *above, name = parts(os.fsencode(path))
        node: Node | None = root
        for part in above:
            node = node.children.get(part) if node is not None else None
        if node is not None and node.is_directory:
            node.children.setdefault(name, whiteout())


def plain_capability(value: bytes) -> bytes:
    """The value of CAPABILITY without the user namespace that its version 3 names.

    InvalidArgumentError for one that the kernel would not show again.
    """
    if _CAPABILITY_SIZES.get(value[3] if len(value) > 3 else 0) != len(value):
        raise InvalidArgumentError(f"file capabilities of a kind that is not known: {value[:24]!r}")
    return value[:3] + b"\2" + value[4:20]


def below(path: bytes, node: Node) -> Node:
    """A tree in which `node` is at `path`."""
    for name in reversed(parts(path)):
        parent = directory()
        parent.children[name] = node
        node = parent
    return node


class Tree:
    """A tree under construction, filled by path in any order; a name given twice is the later node's."""

    def __init__(self) -> None:
        self.root = directory()
        self.entries_count = 0
        self._text_bytes = 0
        self._hidden: list[bytes] = []
        self._opaque: list[bytes] = []

    def find(self, path: bytes) -> Node | None:
        """The node at `path`, through directories only."""
        node: Node | None = self.root
        for name in parts(path):
            node = node.children.get(name) if node is not None else None
        return node

    def parent(self, names: tuple[bytes, ...]) -> Node:
        """The directory that holds the last of `names`; missing ones appear.  InvalidArgumentError below a file."""
        node = self.root
        for name in names[:-1]:
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = directory()
                self.count()
                self._hold(name)
            elif not child.is_directory:
                raise InvalidArgumentError(f"{b'/'.join(names)[:200]!r} lies below {name!r}, which is no directory")
            node = child
        return node

    def add(self, path: bytes, node: Node) -> None:
        """Put `node` at `path`; a directory over a directory keeps what is below."""
        names = parts(path)
        self._hold(*names[-1:], node.target, *node.xattrs, *node.xattrs.values())
        if not names:
            if not node.is_directory:
                raise InvalidArgumentError("the root of a layer must be a directory")
            node.children, self.root = self.root.children, node
            return
        parent = self.parent(names)
        old = parent.children.get(names[-1])
        if old is None:
            self.count()
        elif old.is_directory and node.is_directory:
            node.children = old.children
        parent.children[names[-1]] = node

    def link(self, path: bytes, target: bytes) -> None:
        """Another name for the file at `target`, which must be in the tree already."""
        names, found = parts(path), self.find(target)
        if not names or found is None or found.is_directory:
            raise InvalidArgumentError(f"{path[:200]!r} is a hard link to {target[:200]!r}, which is no file before it")
        self.add(path, found)

    def hide(self, path: bytes) -> None:
        """Hide `path` of the layers below; what this layer itself has there, before or after, stays."""
        if not parts(path):
            raise InvalidArgumentError("a layer cannot hide the root")
        self._hold(path)
        self._hidden.append(path)

    def make_opaque(self, path: bytes) -> None:
        """Hide what the layers below have in the directory `path`."""
        self.parent((*parts(path), b""))
        self._hold(path)
        self._opaque.append(path)

    def finish(self) -> Node:
        """The root, with what is hidden."""
        for path in self._hidden:
            node = self.find(path)
            if node is None:
                self.add(path, whiteout())
            elif node.is_directory:
                self._opaque.append(path)
        for path in self._opaque:
            node = self.find(path)
            if node is not None and node.is_directory:
                node.xattrs = {**node.xattrs, OPAQUE: b"y"}
        return self.root

    def _hold(self, *texts: bytes) -> None:
        self._text_bytes += sum(_TEXT_BYTES + len(text) for text in texts)
        if self._text_bytes > TEXT_BYTES_MAX:
            raise InvalidArgumentError(f"names, links and attributes of more than {TEXT_BYTES_MAX} bytes in one layer")

    def count(self) -> None:
        """One name more.  InvalidArgumentError beyond ENTRIES_COUNT_MAX."""
        self.entries_count += 1
        if self.entries_count > ENTRIES_COUNT_MAX:
            raise InvalidArgumentError(f"more than {ENTRIES_COUNT_MAX} entries in one layer")
