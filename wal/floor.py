"""The floor of a log: the lsn at which it begins, raised when retention drops what lies before.

An empty file whose name is the fact, `<lsn>.floor`: a name appears or it does not, so there is
nothing to tear, and the highest wins.  It is durable before the first segment below it is unlinked;
from then on those segments are not part of the log, whether their files are still there or not.
That makes a drop of many files one atomic step, and lets a reader tell dropped segments from lost ones.

Invariants:
1. A floor above 1 is the first lsn of a segment whose name was durable before the floor's.
2. A segment file is unlinked only if it starts below a durable floor.

See: docs/formats/wal_retention.md, "The floor".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from wal import format as fmt
from wal.errors import DroppedError, WalError, storage_error
from wal.storage import Storage

FIRST_LSN = 1
"""Where a log begins that never dropped anything."""
_NAME = re.compile(r"([0-9a-f]{16})\.floor")


def floor_name(lsn: int) -> str:
    """The file name that says that the log begins at `lsn`."""
    return f"{lsn:016x}.floor"


def floor_of(names: Iterable[str]) -> int:
    """The lsn at which a log with these files begins: its highest floor, else 1."""
    return max((lsn for _, lsn in _floors(names)), default=FIRST_LSN)


def put_empty_file(storage: Storage, path: Path) -> None:
    """Create a file that says all by its name; durable when this returns, or not there.  StorageError.

    If making it durable fails the name is taken back: it may be on the disk or not, and a later
    sync that reports success would not prove that it is.
    """
    try:
        file = storage.create(path)
        try:
            file.sync()
        finally:
            file.close()
        storage.sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            storage.remove(path)
        raise storage_error(path, "create", error) from error


def raise_floor(storage: Storage, directory: Path, lsn: int) -> None:
    """Let the log begin at `lsn`, the first lsn of one of its segments; durable when this returns.

    The directory is synced first, so that the segment at the floor cannot be less durable than the
    floor: its writer may have renamed it and not yet synced.  StorageError: the floor is as before.
    """
    sync_names(storage, directory)
    put_empty_file(storage, directory / floor_name(lsn))


def list_names(storage: Storage, directory: Path) -> list[str]:
    """The names in a log directory.  StorageError."""
    try:
        return storage.names(directory)
    except OSError as error:
        raise storage_error(directory, "list", error) from error


def sync_names(storage: Storage, directory: Path) -> None:
    """Make durable what a listing of the directory shows.  StorageError."""
    try:
        storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(directory, "sync", error) from error


def remove_below_floor(storage: Storage, directory: Path) -> list[str]:
    """Unlink what lies below the floor: segments oldest first, then older floors.

    The floor is synced first: it may be the work of a process that was killed before it could.
    Returns the names of the segments, all gone durably.  StorageError: some may be left, they
    are not part of the log, and another call removes them.
    """
    try:
        names = storage.names(directory)
        floor = floor_of(names)
        segments = [name for name in names if (parsed := fmt.parse_name(name)) and parsed[0] < floor]
        older = [name for name, lsn in _floors(names) if lsn < floor]
        if segments or older:
            storage.sync_directory(directory)
            for name in segments + older:
                storage.remove(directory / name)
            storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(directory, "drop segments of", error) from error
    return segments


def read_error(storage: Storage, path: Path, first_lsn: int, error: OSError) -> WalError:
    """What it means that the segment at `path` cannot be read: DroppedError if the floor has passed it meanwhile."""
    if isinstance(error, FileNotFoundError):
        with contextlib.suppress(OSError):
            floor = floor_of(storage.names(path.parent))
            if first_lsn < floor:
                return DroppedError(path.parent, first_lsn, floor)
    return storage_error(path, "read", error)


def _floors(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(match[0], int(match[1], 16)) for name in names if (match := _NAME.fullmatch(name))]
