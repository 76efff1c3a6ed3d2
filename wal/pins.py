"""Pins: a reader, a backup or a person says "keep the log from this lsn on".

A pin is an empty file whose name is the fact, `<lsn>-<name>.pin`, so any process may set one, without
the writer's lock, and it outlives the process that set it.  Retention drops nothing at or behind it.

A pin set while a retention pass decides would come too late for the pass and be believed by its owner.
So both take `retention.lock` for that moment: the pass from its look at the pins until the new floor
is durable, `pin` from its look at the floor until the pin is.  Whoever comes second sees the first.

Invariants:
1. After `pin` returned, every record from the pinned lsn on that was in the log stays until `unpin`.

See: docs/formats/wal_retention.md, "Pins".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from wal.errors import DroppedError, storage_error
from wal.floor import floor_of, list_names, put_empty_file, sync_names
from wal.storage import OsStorage, Storage

RETENTION_LOCK = "retention.lock"
LSN_MAX = (1 << 64) - 1
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_NAME = re.compile(rf"([0-9a-f]{{16}})-({_OWNER.pattern})\.pin")


class Pin(NamedTuple):
    """Records of lsn >= `lsn` are kept for `name`."""

    lsn: int
    name: str

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.lsn:016x}-{self.name}.pin"


def pins_of(names: Iterable[str]) -> list[Pin]:
    """The pins among the files of a log directory, lowest lsn first."""
    return sorted(Pin(int(match[1], 16), match[2]) for name in names if (match := _NAME.fullmatch(name)))


def pin(directory: Path, name: str, lsn: int | None = None, *, storage: Storage | None = None) -> int:
    """Keep the log from `lsn` on (None: all that it holds) until `unpin`; durable when this returns the lsn.

    `name` is 1 to 64 of A-Z a-z 0-9 _ . - and starts with none of the last two; pinning a name again
    moves its pin.  Call it from any process or thread; it waits while a retention pass decides, some
    syncs long.  Raises DroppedError if the log begins behind `lsn` already (nothing was pinned),
    StorageError (an earlier pin of the name holds), ValueError for a name or lsn out of bounds.
    """
    if not _OWNER.fullmatch(name):
        raise ValueError(f"a pin's name must match {_OWNER.pattern}, is {name!r}")
    if lsn is not None and not 1 <= lsn <= LSN_MAX:
        raise ValueError(f"a pinned lsn is 1..2**64-1, not {lsn}")
    directory, disk = Path(directory), storage or OsStorage()
    path = directory / RETENTION_LOCK
    try:
        lock = disk.lock(path, wait=True)
    except OSError as error:
        raise storage_error(path, "lock", error) from error
    try:
        names = list_names(disk, directory)
        floor = floor_of(names)
        mine = Pin(floor if lsn is None else lsn, name)
        if mine.lsn < floor:
            raise DroppedError(directory, mine.lsn, floor)
        if mine.file_name in names:
            sync_names(disk, directory)
        else:
            put_empty_file(disk, directory / mine.file_name)
    finally:
        lock.close()
    _remove(disk, directory, [old for old in pins_of(names) if old.name == name and old != mine])
    return mine.lsn


def unpin(directory: Path, name: str, *, storage: Storage | None = None) -> bool:
    """Let go of what `name` pinned; False if it had pinned nothing.  StorageError: it may still hold."""
    directory, disk = Path(directory), storage or OsStorage()
    mine = [pin for pin in pins_of(list_names(disk, directory)) if pin.name == name]
    _remove(disk, directory, mine)
    return bool(mine)


@contextmanager
def pinned(directory: Path, name: str, lsn: int | None = None, *, storage: Storage | None = None) -> Iterator[int]:
    """`pin` on entry, `unpin` on exit; gives the pinned lsn.  A killed process leaves its pin: see `unpin`."""
    held_lsn = pin(directory, name, lsn, storage=storage)
    try:
        yield held_lsn
    finally:
        unpin(directory, name, storage=storage)


def _remove(storage: Storage, directory: Path, pins: list[Pin]) -> None:
    try:
        for old in pins:
            storage.remove(directory / old.file_name)
        if pins:
            storage.sync_directory(directory)
    except OSError as error:
        raise storage_error(directory, "unpin in", error) from error
