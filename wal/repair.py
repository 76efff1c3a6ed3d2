"""Making a log fit for appending again after a crash: the only code that drops bytes.

The dropped bytes are first copied aside (`quarantine/`), durably, because a person may want to know
what was in flight.  Every step may be interrupted and done again: until the cut is durable the tail
is still torn, and the next open finds the same thing.

See: docs/formats/wal.md, "Repair".
"""

from __future__ import annotations

from pathlib import Path

from wal.errors import storage_error
from wal.reader import READ_BYTES, Reader
from wal.segments import QUARANTINE, Tear
from wal.storage import Storage
from wal.writer import TEMPORARY_SUFFIX, create_file, write_all

QUARANTINE_FILES_MAX = 64


def remove_leftovers(storage: Storage, directory: Path) -> None:
    """Remove what an interrupted creation left: never named, hence never part of the log.  StorageError."""
    try:
        for name in storage.names(directory):
            if name.endswith(TEMPORARY_SUFFIX):
                storage.remove(directory / name)
    except OSError as error:
        raise storage_error(directory, "clean", error) from error


def cut_tear(storage: Storage, directory: Path, tear: Tear) -> Path | None:
    """Quarantine a copy of the torn bytes, then cut them off; both durable.  StorageError.

    A segment that is torn from its first byte stays, for the new one to be renamed over it: so there
    is no moment without a newest segment.  Returns where the copy lies; None if there was not a byte to keep.
    """
    path = directory / tear.segment
    copy = None
    try:
        torn = bytearray(tear.size_bytes)
        storage.read_into(path, tear.offset, memoryview(torn))
        if torn:
            copy = _quarantine(storage, directory, tear, bytes(torn))
        if tear.offset:
            file = storage.open(path)
            try:
                file.truncate(tear.offset)
                file.sync()
            finally:
                file.close()
        storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(path, "repair", error) from error
    return copy


def settle_tail(storage: Storage, directory: Path, reader: Reader) -> None:
    """Make durable what was read and not known to be.  StorageError.

    The records may be in the page cache only: the writer died before its sync, or its sync failed,
    and then the kernel counts those pages as clean and another sync would do nothing.  Writing the
    same bytes again in place makes them dirty, so that this sync means what it says.
    """
    if reader.header is None:
        return
    path = directory / reader.header.name
    try:
        start = reader.offset_behind(path, reader.durable_lsn)
        file = storage.open(path, start)
        try:
            for offset in range(start, reader.end_offset, READ_BYTES):
                piece = bytearray(min(READ_BYTES, reader.end_offset - offset))
                storage.read_into(path, offset, memoryview(piece))
                write_all(file.write, bytes(piece))
            file.sync()
        finally:
            file.close()
        storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(path, "settle", error) from error


def _quarantine(storage: Storage, directory: Path, tear: Tear, torn: bytes) -> Path:
    """Keep the bytes under a fresh name; the oldest copies go when there are too many."""
    folder = directory / QUARANTINE
    storage.make_directory(folder)
    remove_leftovers(storage, folder)
    kept = storage.names(folder)
    for name in kept[: max(0, len(kept) - QUARANTINE_FILES_MAX + 1)]:
        storage.remove(folder / name)
    newest = max((int(name.split("-")[0]) for name in kept if name.split("-")[0].isdecimal()), default=0)
    name = f"{newest + 1:08d}-{tear.segment}.{tear.offset}.torn"
    create_file(storage, folder, name, torn)
    return folder / name
