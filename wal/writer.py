"""Writing one segment: atomic creation, frames to the file, sync.

A segment gets its name only when its header is durable (temporary name, sync, rename, sync of the
directory), so a file with a segment's name and no whole header is never the trace of a crash here.
Every OSError becomes a typed error that names the file; after one, the caller must not go on.

See: docs/formats/wal.md, "Writing".
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

from wal import format as fmt
from wal.errors import storage_error
from wal.storage import File, Storage

TEMPORARY_SUFFIX = ".tmp"
RESERVE_BYTES = 256 << 10


def write_all(write: Callable[[bytes], int], data: bytes) -> None:
    """Write until everything was taken; a call that takes nothing is an EIO."""
    while data:
        taken = write(data)
        if taken <= 0:
            raise OSError(errno.EIO, "the write took no bytes")
        data = data[taken:]


def create_file(storage: Storage, directory: Path, name: str, content: bytes) -> None:
    """A file that appears with all its content or not at all; durable when this returns.  StorageError."""
    path = directory / name
    temporary = directory / (name + TEMPORARY_SUFFIX)
    try:
        file = storage.create(temporary)
        try:
            write_all(file.write, content)
            file.sync()
        finally:
            file.close()
        storage.rename(temporary, path)
        storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(path, "create", error) from error


class SegmentWriter:
    """The newest segment, open at its end.

    `size_bytes` counts what was written.  The file is longer: zeros are written ahead, so that most
    syncs have no new size and no new block to make durable, only data.  On a journaling file system
    that takes a third off a sync (docs: "Costs"), for twice the bytes written.  Large writes go without:
    there the bytes cost more than the metadata.
    """

    def __init__(self, path: Path, file: File, size_bytes: int) -> None:
        self.path, self.size_bytes, self._file = path, size_bytes, file
        self._reserved_bytes = 0

    @classmethod
    def create(cls, storage: Storage, directory: Path, header: fmt.SegmentHeader) -> SegmentWriter:
        """A new durable segment that holds only its header.  StorageError."""
        create_file(storage, directory, header.name, fmt.encode_header(header))
        return cls.resume(storage, directory / header.name, fmt.HEADER_BYTES)

    @classmethod
    def resume(cls, storage: Storage, path: Path, size_bytes: int) -> SegmentWriter:
        """An existing segment whose good content ends at `size_bytes`; only zeros may follow.  StorageError."""
        try:
            return cls(path, storage.open(path, size_bytes), size_bytes)
        except OSError as error:
            raise storage_error(path, "open", error) from error

    def write(self, frames: bytes) -> None:
        """Hand bytes to the operating system; not durable.  StorageError."""
        end = self.size_bytes + len(frames)
        try:
            if end > self._reserved_bytes and len(frames) < RESERVE_BYTES // 2:
                self._reserve(end + RESERVE_BYTES)
            write_all(self._file.write, frames)
        except OSError as error:
            raise storage_error(self.path, "write", error) from error
        self.size_bytes = end

    def _reserve(self, size_bytes: int) -> None:
        """Write zeros up to this size; a disk too full for them may still have room for what counts."""
        try:
            self._file.allocate(size_bytes)
            self._reserved_bytes = size_bytes
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._file.truncate(self.size_bytes)
            self._reserved_bytes = sys.maxsize

    def sync(self) -> None:
        """Everything written is durable when this returns.  StorageError."""
        try:
            self._file.sync()
        except OSError as error:
            raise storage_error(self.path, "sync", error) from error

    def seal(self) -> None:
        """Give back the space that was reserved and not used, then sync.  StorageError."""
        try:
            self._file.truncate(self.size_bytes)
        except OSError as error:
            raise storage_error(self.path, "seal", error) from error
        self.sync()

    def close(self) -> None:
        """Let go of the file without a sync.  StorageError."""
        try:
            self._file.close()
        except OSError as error:
            raise storage_error(self.path, "close", error) from error
