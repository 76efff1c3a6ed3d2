"""A disk that fails on purpose: what was written and what was synced are two images.

`FaultyStorage` keeps a file system in memory.  Each call that changes something has a number, and a
plan says what happens at which: a crash, an errno, or a write that takes only half.  After a crash
`restart` gives the disk a new process finds: everything written (the process was killed), only what
was synced (power was lost and nothing else had reached the disk), or, drawn from a seed, any mix of
sectors and names between the two (power was lost in mid-flight).

A failed sync behaves as on Linux: the dirty sectors are counted as clean, so a second sync reports
success and writes nothing.

See: docs/formats/wal.md, "What the log asks of a disk".
"""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wal.storage import File, Lock

Fault = Literal["crash", "short", "ENOSPC", "EIO"]
Landing = Literal["written", "synced", "mixed"]
SECTOR_BYTES = 512


class CrashError(Exception):
    """The machine stopped at this call; every later call on the same storage raises it again."""


@dataclass
class _Inode:
    written: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set)

    def touch(self, start: int, end: int) -> None:
        self.dirty.update(range(start // SECTOR_BYTES, (end + SECTOR_BYTES - 1) // SECTOR_BYTES))

    def land(self, sectors: set[int], size_bytes: int) -> None:
        """Bring some sectors and a size from the written to the synced image."""
        del self.synced[size_bytes:]
        self.synced.extend(bytes(size_bytes - len(self.synced)))
        for sector in sectors:
            start = sector * SECTOR_BYTES
            piece = self.written[start : min(start + SECTOR_BYTES, size_bytes)]
            self.synced[start : start + len(piece)] = piece


class FaultyStorage:
    """A Storage in memory with planned faults.

    `faults` maps the number of a changing call (from 1) to what happens there; `calls` lists the
    names of those made so far.  Locks are real between users of one instance.
    """

    def __init__(self, faults: Mapping[int, Fault] | None = None) -> None:
        self.faults = dict(faults or {})
        self.calls: list[str] = []
        self._is_down = False
        self._written_names: dict[Path, _Inode] = {}
        self._synced_names: dict[Path, _Inode] = {}
        self._directories: set[Path] = set()
        self._locked: set[Path] = set()

    def restart(self, landing: Landing, seed: int = 0) -> FaultyStorage:
        """The disk as the next process would find it after a crash now; this instance is not changed."""
        draw = random.Random(seed)  # noqa: S311  # a test's dice, not a secret
        after = FaultyStorage()
        after._directories = set(self._directories)
        names = dict(self._written_names if landing == "written" else self._synced_names)
        if landing == "mixed":
            for path in sorted(self._written_names.keys() | self._synced_names.keys()):
                source = self._written_names if draw.random() < 0.5 else self._synced_names
                names.pop(path, None)
                if path in source:
                    names[path] = source[path]
        for path, inode in names.items():
            content = _landed(inode, landing, draw)
            after._written_names[path] = after._synced_names[path] = _Inode(bytearray(content), bytearray(content))
        return after

    def make_directory(self, path: Path) -> None:
        """See Storage; durable at once."""
        self.act("make_directory")
        self._directories.update((path, *path.parents))

    def names(self, directory: Path) -> list[str]:
        """See Storage."""
        self._check_up()
        if directory not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
        return sorted(path.name for path in self._written_names if path.parent == directory)

    def read(self, path: Path) -> bytes:
        """See Storage."""
        self._check_up()
        return bytes(self._inode(path).written)

    def create(self, path: Path) -> File:
        """See Storage."""
        self.act("create")
        self._written_names[path] = _Inode()
        return _MemoryFile(self, self._written_names[path])

    def open(self, path: Path) -> File:
        """See Storage."""
        self._check_up()
        return _MemoryFile(self, self._inode(path))

    def rename(self, source: Path, target: Path) -> None:
        """See Storage."""
        self.act("rename")
        self._written_names[target] = self._written_names.pop(source)

    def remove(self, path: Path) -> None:
        """See Storage."""
        self.act("remove")
        del self._written_names[path]

    def sync_directory(self, path: Path) -> None:
        """See Storage."""
        self.act("sync_directory")
        for name in [name for name in self._synced_names if name.parent == path]:
            del self._synced_names[name]
        self._synced_names |= {name: inode for name, inode in self._written_names.items() if name.parent == path}

    def lock(self, path: Path) -> Lock:
        """See Storage."""
        self._check_up()
        if path in self._locked:
            raise BlockingIOError(errno.EAGAIN, "locked", str(path))
        self._locked.add(path)
        return _MemoryLock(self._locked, path)

    def act(self, call: str) -> None:
        """Count a changing call that happens whole or not at all, and meet its fault."""
        self.meet(self.count(call), call)

    def count(self, call: str) -> Fault | None:
        """Count a changing call and return what is planned for it."""
        self._check_up()
        self.calls.append(call)
        return self.faults.get(len(self.calls))

    def meet(self, fault: Fault | None, call: str) -> None:
        """Crash or raise the planned OSError; a short write is the file's business."""
        where = f"at call {len(self.calls)} ({call})"
        if fault == "crash":
            self._is_down = True
            raise CrashError(f"crash {where}")
        if fault in ("ENOSPC", "EIO"):
            raise OSError(getattr(errno, fault), f"{fault} {where}")

    def _check_up(self) -> None:
        if self._is_down:
            raise CrashError("this machine is down")

    def _inode(self, path: Path) -> _Inode:
        try:
            return self._written_names[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None


class _MemoryFile:
    def __init__(self, storage: FaultyStorage, inode: _Inode) -> None:
        self._storage, self._inode = storage, inode

    def write(self, data: bytes) -> int:
        return self._put("write", len(self._inode.written), data)

    def rewrite(self, offset: int, data: bytes) -> int:
        return self._put("rewrite", offset, data)

    def sync(self) -> None:
        inode = self._inode
        try:
            self._storage.act("sync")
        except OSError:
            inode.dirty.clear()
            raise
        inode.land(inode.dirty, len(inode.written))
        inode.dirty.clear()

    def truncate(self, size_bytes: int) -> None:
        self._storage.act("truncate")
        del self._inode.written[size_bytes:]
        self._inode.touch(size_bytes, size_bytes + 1)

    def close(self) -> None:
        """Nothing to let go of."""

    def _put(self, call: str, offset: int, data: bytes) -> int:
        """Any fault in a write leaves half of its bytes in the written image."""
        fault = self._storage.count(call)
        piece = data[: (len(data) + 1) // 2] if fault else data
        self._inode.written[offset : offset + len(piece)] = piece
        self._inode.touch(offset, offset + len(piece))
        self._storage.meet(fault, call)
        return len(piece)


class _MemoryLock:
    def __init__(self, locked: set[Path], path: Path) -> None:
        self._locked, self._path = locked, path

    def close(self) -> None:
        self._locked.discard(self._path)


def _landed(inode: _Inode, landing: Landing, draw: random.Random) -> bytes:
    if landing == "written":
        return bytes(inode.written)
    landed = _Inode(inode.written, bytearray(inode.synced))
    if landing == "mixed":
        low, high = sorted((len(inode.synced), len(inode.written)))
        landed.land({sector for sector in sorted(inode.dirty) if draw.random() < 0.5}, draw.randint(low, high))
    return bytes(landed.synced)
