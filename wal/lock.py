"""Who may write: one lock file an epoch, and the removal of a lower one as the fence.

A writer holds flock on `<epoch>.lock`.  Within an epoch that keeps a second writer out.  A higher epoch
does not ask: it takes its own lock, removes the lower ones, and only then reads the log.  The
fenced writer may be paused, cut off, or on another host of the same file system, so it cannot be told;
instead it looks, after each sync and before it acknowledges, whether its lock file still has a name.

Invariants:
1. What a writer acknowledged is in what its successor reads: the one writes, then looks at its
   lock; the other removes the lock, then reads.  Whatever the interleaving, one of them sees the other.
2. Epochs of a directory never go down.

See: docs/formats/wal.md, "One writer".
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from wal import format as fmt
from wal.errors import FencedError, LockedError, storage_error
from wal.floor import list_names
from wal.storage import Lock, Storage


def take_lock(storage: Storage, directory: Path, epoch: int | None) -> tuple[Lock, int]:
    """Take the directory for writing; the lock and its epoch (None: the highest seen here so far, 0 in a new log).

    Raises LockedError (a writer of the same epoch lives), FencedError (a higher epoch was here), StorageError.
    """
    newest = _newest_epoch(storage, directory)
    mine = newest if epoch is None else epoch
    if mine < newest:
        raise FencedError(directory, mine, newest)
    lock = _lock(storage, directory, mine)
    try:
        newest = _newest_epoch(storage, directory)
        if mine < newest:
            raise FencedError(directory, mine, newest)
        check_fence(lock, storage, directory, mine)
        _remove_lower(storage, directory, mine)
    except BaseException:
        release(lock, directory)
        raise
    return lock, mine


def check_fence(lock: Lock, storage: Storage, directory: Path, epoch: int) -> None:
    """FencedError if another writer took over, StorageError if that cannot be told."""
    try:
        is_current = lock.is_current()
    except OSError as error:
        raise storage_error(directory / fmt.lock_name(epoch), "look at", error) from error
    if not is_current:
        raise FencedError(directory, epoch, _newest_epoch(storage, directory))


def release(lock: Lock, directory: Path) -> None:
    """Let go of a lock.  StorageError."""
    try:
        lock.close()
    except OSError as error:
        raise storage_error(directory, "unlock", error) from error


def _newest_epoch(storage: Storage, directory: Path) -> int:
    newest = 0
    for name in list_names(storage, directory):
        segment, lock_epoch = fmt.parse_name(name), fmt.parse_lock_name(name)
        newest = max(newest, segment[1] if segment else 0, lock_epoch or 0)
    return newest


def _lock(storage: Storage, directory: Path, epoch: int) -> Lock:
    path = directory / fmt.lock_name(epoch)
    try:
        return storage.lock(path)
    except BlockingIOError as error:
        try:
            holder = storage.read(path).decode("ascii", "replace").strip()
        except OSError:
            holder = ""
        raise LockedError(directory, holder) from error
    except OSError as error:
        raise storage_error(path, "lock", error) from error


def _remove_lower(storage: Storage, directory: Path, epoch: int) -> None:
    for name in list_names(storage, directory):
        lower = fmt.parse_lock_name(name)
        if lower is not None and lower < epoch:
            try:
                with contextlib.suppress(FileNotFoundError):  # another taker was faster
                    storage.remove(directory / name)
            except OSError as error:
                raise storage_error(directory / name, "remove", error) from error
