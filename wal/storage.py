"""The port to a disk: the few calls a log makes, and the real ones.

Everything that can fail or be lost in a crash goes through here, one method a system call, so that
a double (`wal.testing.FaultyStorage`) can fail or crash at any of them.  Methods raise `OSError`;
the log turns it into a typed error with the path.

See: docs/formats/wal.md, "What the log asks of a disk".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import NamedTuple, Protocol


class File(Protocol):
    """An open file with a position, where the next write goes."""

    def write(self, data: bytes) -> int:
        """Write and move on; returns how many bytes were taken, which may be fewer than given."""
        ...

    def allocate(self, size_bytes: int) -> None:
        """Grow the file to this size with zeros that are really written; the position stays."""
        ...

    def sync(self) -> None:
        """Data and size are durable when this returns (fdatasync)."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut the file; the position stays."""
        ...

    def close(self) -> None:
        """Let go of the file; nothing is made durable."""
        ...


class Lock(Protocol):
    """A held lock file."""

    def is_current(self) -> bool:
        """True until the file was removed: who removes it takes the lock's right away."""
        ...

    def close(self) -> None:
        """Release it."""
        ...


class FileStat(NamedTuple):
    """`modified_s`: seconds since the epoch."""

    size_bytes: int
    modified_s: float


class Storage(Protocol):
    """A file system as a log sees it."""

    def make_directory(self, path: Path) -> None:
        """Create with parents; a directory that exists is fine."""
        ...

    def names(self, directory: Path) -> list[str]:
        """Sorted names of the entries."""
        ...

    def read(self, path: Path) -> bytes:
        """The whole file."""
        ...

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset` on; returns the bytes read, fewer only at the file's end."""
        ...

    def stat(self, path: Path) -> FileStat:
        """Size of a file and when it was last written."""
        ...

    def create(self, path: Path) -> File:
        """A new or emptied file."""
        ...

    def open(self, path: Path, position: int | None = None) -> File:
        """An existing file at a position, by default its end."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; replaces the target; durable after sync_directory."""
        ...

    def remove(self, path: Path) -> None:
        """Unlink; durable after sync_directory."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Names created, renamed or removed in it are durable when this returns."""
        ...

    def lock(self, path: Path, *, wait: bool = False) -> Lock:
        """Take the exclusive lock on this file (created if missing).  BlockingIOError if held, unless told to wait."""
        ...


class OsFile:
    """A file descriptor."""

    def __init__(self, path: Path, flags: int, position: int | None = None) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        os.lseek(self._fd, position or 0, os.SEEK_END if position is None else os.SEEK_SET)

    def write(self, data: bytes) -> int:
        """See File."""
        return os.write(self._fd, data)

    def allocate(self, size_bytes: int) -> None:
        """See File.  Not posix_fallocate: the first write to a block of its would change metadata again."""
        while (end := os.fstat(self._fd).st_size) < size_bytes:
            os.pwrite(self._fd, bytes(size_bytes - end), end)

    def sync(self) -> None:
        """See File."""
        os.fdatasync(self._fd)

    def truncate(self, size_bytes: int) -> None:
        """See File."""
        os.ftruncate(self._fd, size_bytes)

    def close(self) -> None:
        """See File; closing twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class OsStorage:
    """The operating system's files; stateless, so one instance serves every log."""

    def make_directory(self, path: Path) -> None:
        """See Storage; a created directory is durable in its parent."""
        missing = [parent for parent in (path, *path.parents) if not parent.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in reversed(missing):
            self.sync_directory(made.parent)

    def names(self, directory: Path) -> list[str]:
        """See Storage."""
        return sorted(os.listdir(directory))

    def read(self, path: Path) -> bytes:
        """See Storage."""
        return path.read_bytes()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        """See Storage.  Asks the kernel to fetch as much again behind it; a FIFO is an error and no wait."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            filled = 0
            while filled < len(buffer) and (taken := os.preadv(fd, [buffer[filled:]], offset + filled)):
                filled += taken
            os.posix_fadvise(fd, offset + filled, len(buffer), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
        return filled

    def stat(self, path: Path) -> FileStat:
        """See Storage."""
        found = os.stat(path)
        return FileStat(found.st_size, found.st_mtime)

    def create(self, path: Path) -> File:
        """See Storage."""
        return OsFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def open(self, path: Path, position: int | None = None) -> File:
        """See Storage."""
        return OsFile(path, os.O_WRONLY, position)

    def rename(self, source: Path, target: Path) -> None:
        """See Storage."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """See Storage."""
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        """See Storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: Path, *, wait: bool = False) -> Lock:
        """See Storage.  flock: freed by the kernel however the holder ends; the file holds its pid."""
        return _OsLock(path, 0 if wait else fcntl.LOCK_NB)


class _OsLock:
    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | flags)
        except BaseException:
            os.close(self._fd)
            raise
        with contextlib.suppress(OSError):  # a note for people: a full disk must not stop what frees it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def is_current(self) -> bool:
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        os.close(self._fd)
