"""The log: one writer that appends records and makes them durable.

Synchronous and single-threaded on purpose: the order of appends is the order of the log, and the
caller decides when to pay for a sync (`wal.group_commit` does it for many asyncio callers).  The
first failed write or sync poisons the log: what the file then holds is not known, and only a
reopen, which reads it back, can say.

Invariants:
1. Records up to `durable_lsn` survive any crash of the process, the kernel or the machine.
2. Lsns are dense from 1, across segments and reopens.

See: docs/formats/wal.md.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from wal import format as fmt
from wal.errors import (
    ClosedError,
    LockedError,
    PoisonedError,
    RecordInvalidError,
    RecordTooLargeError,
    StorageError,
    WalError,
    storage_error,
)
from wal.reader import Reader
from wal.repair import cut_tear, remove_leftovers, settle_tail
from wal.storage import Lock, OsStorage, Storage
from wal.writer import SegmentWriter

LOCK = "LOCK"
BUFFER_BYTES_MAX = 1 << 20
SEGMENT_BYTES_LIMIT = 1 << 36

T = TypeVar("T")


class Recovery(NamedTuple):
    """What `Log.open` found.  `torn_bytes` were dropped; `quarantine` is where their copy lies."""

    records_count: int
    next_lsn: int
    torn_bytes: int
    quarantine: Path | None


class Log:
    """An open log directory.  Use `Log.open`; not thread-safe; a context manager that closes."""

    def __init__(
        self,
        directory: Path,
        storage: Storage,
        lock: Lock,
        writer: SegmentWriter,
        header: fmt.SegmentHeader,
        recovery: Recovery,
        bounds: tuple[int, int],
    ) -> None:
        self.directory = directory
        self.recovery = recovery
        self.segment_bytes_max, self.record_bytes_max = bounds
        self._storage, self._lock, self._writer, self._header = storage, lock, writer, header
        self._seed = header.seed
        self._next_lsn = recovery.next_lsn
        self._durable_lsn = recovery.next_lsn - 1
        self._buffer: list[bytes] = []
        self._buffer_bytes = 0
        self._poison: WalError | None = None
        self._is_closed = False
        self.syncs_count = 0
        """Syncs of appended records since the log was opened."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        segment_bytes_max: int = 64 << 20,
        record_bytes_max: int = 64 << 20,
        storage: Storage | None = None,
    ) -> Log:
        """Open for appending, creating the directory if missing; recovered when this returns.

        A torn tail is quarantined and cut, and every record found is made durable.  A segment is
        closed before it would pass `segment_bytes_max` (a larger single record gets one of its
        own).  Raises LockedError, CorruptError, VersionError, StorageError.
        """
        if not 0 < record_bytes_max <= fmt.PAYLOAD_BYTES_LIMIT:
            raise ValueError(f"record_bytes_max is {record_bytes_max}, must be in 1..{fmt.PAYLOAD_BYTES_LIMIT}")
        if not 0 < segment_bytes_max <= SEGMENT_BYTES_LIMIT:
            raise ValueError(f"segment_bytes_max is {segment_bytes_max}, must be in 1..{SEGMENT_BYTES_LIMIT}")
        directory, disk = Path(directory), storage or OsStorage()
        try:
            disk.make_directory(directory)
        except OSError as error:
            raise storage_error(directory, "create", error) from error
        lock = _take_lock(disk, directory)
        try:
            header, writer, recovery = _recover(disk, directory)
        except BaseException:
            lock.close()
            raise
        return cls(directory, disk, lock, writer, header, recovery, (segment_bytes_max, record_bytes_max))

    @property
    def next_lsn(self) -> int:
        """The lsn that the next append gets."""
        return self._next_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest lsn that is durable; 0 if none."""
        return self._durable_lsn

    def check(self, kind: int, payload: bytes) -> None:
        """Raise what `append` would raise for this record: RecordInvalidError, RecordTooLargeError."""
        if not 0 < kind <= fmt.KIND_MAX:
            raise RecordInvalidError(f"a record's kind is 1..{fmt.KIND_MAX}, not {kind}")
        if len(payload) > self.record_bytes_max:
            raise RecordTooLargeError(len(payload), self.record_bytes_max)

    def append(self, kind: int, payload: bytes) -> int:
        """Add a record (`kind` 1..255) and return its lsn.  NOT durable until `sync`.

        Raises RecordInvalidError or RecordTooLargeError (the log is as before), PoisonedError,
        ClosedError, and StorageError when a full buffer or segment is written out, which poisons.
        """
        self.check(kind, payload)
        self._check_usable()
        size = fmt.frame_bytes(len(payload))
        filled = self._writer.size_bytes + self._buffer_bytes
        if filled > fmt.HEADER_BYTES and filled + size > self.segment_bytes_max:
            self._guard(self._roll)
        lsn = self._next_lsn
        self._buffer.append(fmt.encode_frame(self._seed, lsn, lsn - 1 - self._durable_lsn, kind, payload))
        self._buffer_bytes += size
        self._next_lsn = lsn + 1
        if self._buffer_bytes > BUFFER_BYTES_MAX:
            self._guard(self._flush)
        return lsn

    def flush(self) -> None:
        """Hand everything appended to the operating system: it survives a kill of this process.

        Raises StorageError (and poisons), PoisonedError, ClosedError.
        """
        self._check_usable()
        self._guard(self._flush)

    def sync(self) -> None:
        """Everything appended so far is durable when this returns.

        Raises StorageError (and poisons), PoisonedError, ClosedError.
        """
        self._check_usable()
        self._guard(self._sync)

    def close(self) -> None:
        """Sync, release the lock, let go of the files; closing twice is fine.

        A poisoned log is closed without a sync: its error was raised where it happened.
        """
        if self._is_closed:
            return
        try:
            if self._poison is None:
                self._guard(self._sync)
        finally:
            self._is_closed = True
            self._writer.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if self._buffer:
            data = b"".join(self._buffer)
            self._buffer.clear()
            self._buffer_bytes = 0
            self._writer.write(data)

    def _sync(self) -> None:
        if self._durable_lsn == self._next_lsn - 1:
            return
        self._flush()
        self._writer.sync()
        self.syncs_count += 1
        self._durable_lsn = self._next_lsn - 1

    def _roll(self) -> None:
        """Seal the segment, synced whole (segments.py, invariant 1), and start the next."""
        self._sync()
        self._writer.close()
        self._header = self._header._replace(first_lsn=self._next_lsn)
        self._writer = SegmentWriter.create(self._storage, self.directory, self._header)

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except BaseException as error:
            # Also Ctrl-C in mid-write: appending on would leave a hole in the lsns.
            interrupted = WalError(f"a write was interrupted by {type(error).__name__}")
            self._poison = error if isinstance(error, StorageError) else interrupted
            raise

    def _check_usable(self) -> None:
        if self._poison is not None:
            raise PoisonedError(self.directory, self._poison)
        if self._is_closed:
            raise ClosedError(self.directory)


def _take_lock(storage: Storage, directory: Path) -> Lock:
    path = directory / LOCK
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


def _recover(storage: Storage, directory: Path) -> tuple[fmt.SegmentHeader, SegmentWriter, Recovery]:
    """Read everything, cut a torn tail, make the rest durable, and open the newest segment."""
    remove_leftovers(storage, directory)
    reader = Reader(directory, storage=storage)
    for _ in reader:
        pass
    settle_tail(storage, directory, reader)
    tear = reader.tear
    quarantine = cut_tear(storage, directory, tear) if tear else None
    torn_bytes = tear.size_bytes if tear else 0
    recovery = Recovery(reader.records_count, reader.next_lsn, torn_bytes, quarantine)
    header = reader.header
    if header is None or header.name != reader.segments[-1].name:
        old = header or fmt.SegmentHeader(uuid.uuid4().bytes, 1, 0)
        epoch = reader.segments[-1].epoch if reader.segments else old.epoch
        header = old._replace(first_lsn=reader.next_lsn, epoch=epoch)
        return header, SegmentWriter.create(storage, directory, header), recovery
    return header, SegmentWriter.resume(storage, directory / header.name, reader.end_offset), recovery
