"""The port to a disk: the few calls a log makes, and the real ones.

Everything that can fail or be lost in a crash goes through here, one method a system call, so that
a double (`wal.testing.FaultyStorage`) can fail or crash at any of them.  Methods raise `OSError`;
the log turns it into a typed error with the path.

See: docs/formats/wal.md, "What the log asks of a disk".
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Protocol


class File(Protocol):
    """An open file that grows at its end."""

    def write(self, data: bytes) -> int:
        """Append; returns how many bytes were taken, which may be fewer than given."""
        ...

    def rewrite(self, offset: int, data: bytes) -> int:
        """Write in place; may be short."""
        ...

    def sync(self) -> None:
        """Data and size are durable when this returns (fdatasync)."""
        ...

    def truncate(self, size_bytes: int) -> None:
        """Cut the file."""
        ...

    def close(self) -> None:
        """Let go of the file; nothing is made durable."""
        ...


class Lock(Protocol):
    """A held directory lock."""

    def close(self) -> None:
        """Release it."""
        ...


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

    def create(self, path: Path) -> File:
        """A new or emptied file."""
        ...

    def open(self, path: Path) -> File:
        """An existing file, at its end."""
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

    def lock(self, path: Path) -> Lock:
        """Take the exclusive lock on this file (created if missing).  BlockingIOError if held."""
        ...


class OsFile:
    """A file descriptor."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        os.lseek(self._fd, 0, os.SEEK_END)

    def write(self, data: bytes) -> int:
        """See File."""
        return os.write(self._fd, data)

    def rewrite(self, offset: int, data: bytes) -> int:
        """See File."""
        return os.pwrite(self._fd, data, offset)

    def sync(self) -> None:
        """See File."""
        os.fdatasync(self._fd)

    def truncate(self, size_bytes: int) -> None:
        """See File."""
        os.ftruncate(self._fd, size_bytes)
        os.lseek(self._fd, size_bytes, os.SEEK_SET)

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

    def create(self, path: Path) -> File:
        """See Storage."""
        return OsFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def open(self, path: Path) -> File:
        """See Storage.  Not O_APPEND: Linux's pwrite would then ignore its offset."""
        return OsFile(path, os.O_WRONLY)

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

    def lock(self, path: Path) -> Lock:
        """See Storage.  flock: freed by the kernel however the holder ends; the file holds its pid."""
        return _OsLock(path)


class _OsLock:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)
