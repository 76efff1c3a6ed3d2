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

from wal.reader import Record
from wal.requests import HOLD, Hold
from wal.segments import SECTOR_BYTES
from wal.storage import File, FileStat, Lock

Fault = Literal["crash", "short", "ENOSPC", "EIO"]
Landing = Literal["written", "synced", "mixed"]


class CrashError(Exception):
    """The machine stopped at this call; every later call on the same storage raises it again."""


@dataclass
class _Inode:
    written: bytearray = field(default_factory=bytearray)
    synced: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set)
    modified_s: float = 0.0

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
        self.now_s = 0.0
        """The clock that files are stamped with when they are written."""
        self._is_down = False
        self._written_names: dict[Path, _Inode] = {}
        self._synced_names: dict[Path, _Inode] = {}
        self._directories: set[Path] = set()
        self._locked: set[Path] = set()

    def restart(self, landing: Landing, seed: int = 0) -> FaultyStorage:
        """The disk as the next process would find it after a crash now; this instance is not changed."""
        draw = random.Random(seed)  # noqa: S311  # a test's dice, not a secret
        after = FaultyStorage()
        after.now_s = self.now_s
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
            after._written_names[path] = after._synced_names[path] = _Inode(
                bytearray(content), bytearray(content), modified_s=inode.modified_s
            )
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

    def stat(self, path: Path) -> FileStat:
        """See Storage."""
        self._check_up()
        inode = self._inode(path)
        return FileStat(len(inode.written), inode.modified_s)

    def create(self, path: Path) -> File:
        """See Storage."""
        self.act("create")
        self._written_names[path] = _Inode(modified_s=self.now_s)
        return _MemoryFile(self, self._written_names[path])

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        """See Storage."""
        piece = self.read(path)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def open(self, path: Path, position: int | None = None) -> File:
        """See Storage."""
        self._check_up()
        inode = self._inode(path)
        return _MemoryFile(self, inode, len(inode.written) if position is None else position)

    def rename(self, source: Path, target: Path) -> None:
        """See Storage."""
        self.act("rename")
        self._written_names[target] = self._inode(source)
        del self._written_names[source]

    def remove(self, path: Path) -> None:
        """See Storage."""
        self.act("remove")
        self._inode(path)
        del self._written_names[path]
        self._locked.discard(path)

    def sync_directory(self, path: Path) -> None:
        """See Storage."""
        self.act("sync_directory")
        for name in [name for name in self._synced_names if name.parent == path]:
            del self._synced_names[name]
        self._synced_names |= {name: inode for name, inode in self._written_names.items() if name.parent == path}

    def lock(self, path: Path, *, wait: bool = False) -> Lock:
        """See Storage; never waits, as there may be one thread only."""
        self._check_up()
        if path in self._locked:
            raise BlockingIOError(errno.EAGAIN, "locked", str(path))
        self._locked.add(path)
        inode = self._written_names.setdefault(path, _Inode())
        return _MemoryLock(self, path, inode)

    def unlock(self, path: Path, inode: _Inode) -> None:
        """Free the lock that lies on this file, unless the file is another one by now."""
        if self.holds(path, inode):
            self._locked.discard(path)

    def holds(self, path: Path, inode: _Inode) -> bool:
        """Whether the path still leads to this file."""
        return self._written_names.get(path) is inode

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


class TextRequests:
    """Requests for a `wal.retention.Retention`, told by records of text.

    `open A`, `use A B ...`, `release A B ...` name requests; `hold` must stay for good; anything else
    belongs to nobody.  A request is live from its `open` to its `release`.
    """

    def __init__(self) -> None:
        self.live: set[str] = set()

    def requests_of(self, record: Record) -> list[str] | Hold:
        """See wal.requests.Requests."""
        verb, *names = record.payload.decode().split() or [""]
        if verb == "open":
            self.live.update(names)
        elif verb == "release":
            self.live.difference_update(names)
        elif verb == "hold":
            return HOLD
        return names if verb in ("open", "use", "release") else []

    def is_released(self, request: str) -> bool:
        """See wal.requests.Requests."""
        return request not in self.live


class _MemoryFile:
    def __init__(self, storage: FaultyStorage, inode: _Inode, position: int = 0) -> None:
        self._storage, self._inode, self._position = storage, inode, position
        self._is_closed = False

    def write(self, data: bytes) -> int:
        """Any fault in a write leaves half of its bytes in the written image."""
        fault = self._storage.count("write")
        piece = data[: (len(data) + 1) // 2] if fault else data
        start, end = self._position, self._position + len(piece)
        self._inode.written[start:end] = piece
        self._inode.touch(start, end)
        self._inode.modified_s = self._storage.now_s
        self._position = end
        self._storage.meet(fault, "write")
        return len(piece)

    def allocate(self, size_bytes: int) -> None:
        self._storage.act("allocate")
        start = len(self._inode.written)
        self._inode.written.extend(bytes(max(0, size_bytes - start)))
        self._inode.touch(start, max(start, size_bytes))

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
        """Once; again it does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._storage.act("close")


class _MemoryLock:
    def __init__(self, storage: FaultyStorage, path: Path, inode: _Inode) -> None:
        self._storage, self._path, self._inode = storage, path, inode

    def is_current(self) -> bool:
        return self._storage.holds(self._path, self._inode)

    def close(self) -> None:
        self._storage.unlock(self._path, self._inode)


def _landed(inode: _Inode, landing: Landing, draw: random.Random) -> bytes:
    if landing == "written":
        return bytes(inode.written)
    landed = _Inode(inode.written, bytearray(inode.synced))
    if landing == "mixed":
        low, high = sorted((len(inode.synced), len(inode.written)))
        landed.land({sector for sector in sorted(inode.dirty) if draw.random() < 0.5}, draw.randint(low, high))
    return bytes(landed.synced)
