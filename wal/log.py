"""The log: one writer that appends records and makes them durable.

The order of appends is the order of the log, and the caller decides when to pay for a sync.  An
append has two halves that may run in different threads: `stage` gives a record its lsn and its bytes
without touching the disk, `commit` writes a staged batch and syncs it (`wal.group_commit` uses
them; everybody else calls `append` and `sync`).  The first failed write or sync poisons the log:
what the file then holds is not known, and only a reopen, which reads it back, can say.

Invariants:
1. Records up to `durable_lsn` survive any crash of the process, the kernel or the machine, and a
   takeover by another writer.
2. Lsns are dense from 1, across segments, reopens and writers.

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
    FencedError,
    PoisonedError,
    RecordInvalidError,
    RecordTooLargeError,
    StorageError,
    WalError,
    storage_error,
)
from wal.lock import check_fence, release, take_lock
from wal.reader import Reader
from wal.repair import cut_tear, remove_leftovers, settle_tail
from wal.storage import Lock, OsStorage, Storage
from wal.writer import SegmentWriter

BUFFER_BYTES_MAX = 1 << 20
SEGMENT_BYTES_LIMIT = 1 << 36

T = TypeVar("T")


class Recovery(NamedTuple):
    """What `Log.open` found.  `torn_bytes` were dropped; `quarantine` is where their copy lies."""

    records_count: int
    next_lsn: int
    torn_bytes: int
    quarantine: Path | None


class Batch(NamedTuple):
    """Staged frames, in order; the first has `first_lsn`."""

    first_lsn: int
    frames: list[bytes]
    size_bytes: int


class Log:
    """An open log directory.  Use `Log.open`; a context manager that closes.

    Not thread-safe, but one thread may `stage` and `take` while another is in `commit`.
    """

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
        self._written_lsn = self._durable_lsn = recovery.next_lsn - 1
        self._staged: list[bytes] = []
        self.staged_bytes = 0
        """Bytes of frames that were staged and not yet taken; read it only."""
        self._poison: WalError | None = None
        self._is_closed = False
        self.syncs_count = 0
        """Syncs of appended records since the log was opened."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        epoch: int | None = None,
        segment_bytes_max: int = 64 << 20,
        record_bytes_max: int = 64 << 20,
        storage: Storage | None = None,
    ) -> Log:
        """Open for appending, creating the directory if missing; recovered when this returns.

        A torn tail is quarantined and cut, and every record found is made durable.  A segment is
        closed before it would pass `segment_bytes_max` (a larger single record gets one of its own).
        `epoch` (0..2**32-1) is the caller's lease: a higher one than any before takes the log from a
        writer that may still live, and that writer can acknowledge nothing more (docs: "One writer").
        None goes on with the newest epoch.  Raises LockedError, FencedError, CorruptError,
        VersionError, StorageError.
        """
        if not 0 < record_bytes_max <= fmt.PAYLOAD_BYTES_LIMIT:
            raise ValueError(f"record_bytes_max is {record_bytes_max}, must be in 1..{fmt.PAYLOAD_BYTES_LIMIT}")
        if not 0 < segment_bytes_max <= SEGMENT_BYTES_LIMIT:
            raise ValueError(f"segment_bytes_max is {segment_bytes_max}, must be in 1..{SEGMENT_BYTES_LIMIT}")
        if epoch is not None and not 0 <= epoch <= fmt.EPOCH_MAX:
            raise ValueError(f"epoch is {epoch}, must be in 0..{fmt.EPOCH_MAX}")
        directory, disk = Path(directory), storage or OsStorage()
        try:
            disk.make_directory(directory)
        except OSError as error:
            raise storage_error(directory, "create", error) from error
        lock, epoch = take_lock(disk, directory, epoch)
        try:
            header, writer, recovery = _recover(disk, directory, epoch)
        except BaseException:
            release(lock, directory)
            raise
        return cls(directory, disk, lock, writer, header, recovery, (segment_bytes_max, record_bytes_max))

    @property
    def epoch(self) -> int:
        """The epoch of this writer."""
        return self._header.epoch

    @property
    def next_lsn(self) -> int:
        """The lsn that the next append gets."""
        return self._next_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest lsn that is durable; 0 if none."""
        return self._durable_lsn

    def append(self, kind: int, payload: bytes) -> int:
        """Add a record (`kind` 1..255) and return its lsn.  NOT durable until `sync`.

        Raises RecordInvalidError or RecordTooLargeError (the log is as before), PoisonedError,
        ClosedError, and StorageError or FencedError when a full buffer is written out, which poisons.
        """
        lsn = self.stage(kind, payload)
        if self.staged_bytes > BUFFER_BYTES_MAX:
            self.flush()
        return lsn

    def flush(self) -> None:
        """Hand everything appended to the operating system: it survives a kill of this process.

        Raises StorageError or FencedError (and poisons), PoisonedError, ClosedError.
        """
        self.commit(self.take(), sync=False)

    def sync(self) -> None:
        """Everything appended so far is durable when this returns.

        Raises StorageError or FencedError (and poisons), PoisonedError, ClosedError.
        """
        self.commit(self.take(), sync=True)

    def stage(self, kind: int, payload: bytes) -> int:
        """Give a record its lsn and its place in the next batch, in memory only; returns the lsn.

        Raises RecordInvalidError or RecordTooLargeError (the log is as before), PoisonedError, ClosedError.
        """
        if not 0 < kind <= fmt.KIND_MAX:
            raise RecordInvalidError(f"a record's kind is 1..{fmt.KIND_MAX}, not {kind}")
        if len(payload) > self.record_bytes_max:
            raise RecordTooLargeError(len(payload), self.record_bytes_max)
        if self._poison is not None or self._is_closed:
            self._check_usable()
        lsn = self._next_lsn
        frame = fmt.encode_frame(self._seed, lsn, lsn - 1 - self._durable_lsn, kind, payload)
        self._staged.append(frame)
        self.staged_bytes += len(frame)
        self._next_lsn = lsn + 1
        return lsn

    def take(self) -> Batch:
        """Everything staged since the last `take`; it must be committed before any later batch."""
        batch = Batch(self._next_lsn - len(self._staged), self._staged, self.staged_bytes)
        self._staged, self.staged_bytes = [], 0
        return batch

    def commit(self, batch: Batch, *, sync: bool) -> None:
        """Write a batch; with `sync` it and everything before it is durable when this returns.

        Raises StorageError or FencedError (and poisons), PoisonedError, ClosedError.
        """
        self._check_usable()
        self._guard(lambda: self._commit(batch, sync))

    def close(self) -> None:
        """Sync, release the lock, let go of the files; closing twice is fine.

        A poisoned log is closed without a sync: its error was raised where it happened.
        """
        if self._is_closed:
            return
        try:
            if self._poison is None:
                self._guard(self._finish)
        finally:
            self._is_closed = True
            try:
                self._writer.close()
            finally:
                release(self._lock, self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commit(self, batch: Batch, sync: bool) -> None:
        self._write(batch)
        if sync and self._durable_lsn != self._written_lsn:
            self._writer.sync()
            self.syncs_count += 1
        elif not batch.frames:
            return
        self._check_fence()
        if sync:
            self._durable_lsn = self._written_lsn

    def _write(self, batch: Batch) -> None:
        """Write the frames, into as many segments as they need."""
        rest, lsn = batch.frames, batch.first_lsn
        while rest:
            room = self.segment_bytes_max - self._writer.size_bytes
            count, size = len(rest), batch.size_bytes
            if size > room:
                count, size = 0, 0
                while count < len(rest) and size + len(rest[count]) <= room:
                    size += len(rest[count])
                    count += 1
                if not count and self._writer.size_bytes > fmt.HEADER_BYTES:
                    self._roll(lsn)
                    continue
                count = max(count, 1)  # a record above the bound has a segment of its own
            self._writer.write(b"".join(rest[:count]))
            rest, lsn = rest[count:], lsn + count
            self._written_lsn = lsn - 1

    def _roll(self, first_lsn: int) -> None:
        """Seal the segment, synced whole (segments.py, invariant 1), and start the next."""
        self._writer.seal()
        self._writer.close()
        self.syncs_count += self._durable_lsn != self._written_lsn
        self._check_fence()
        self._durable_lsn = self._written_lsn
        self._header = self._header._replace(first_lsn=first_lsn)
        self._writer = SegmentWriter.create(self._storage, self.directory, self._header)

    def _finish(self) -> None:
        self._commit(self.take(), sync=True)
        self._writer.seal()

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except StorageError as error:
            self._poison = error
            self._check_fence()  # the new writer cleans up, and then files are missing here
            raise
        except BaseException as error:
            # Also Ctrl-C in mid-write: appending on would leave a hole in the lsns.
            interrupted = WalError(f"a write was interrupted by {type(error).__name__}")
            self._poison = self._poison or interrupted
            raise

    def _check_fence(self) -> None:
        try:
            check_fence(self._lock, self._storage, self.directory, self._header.epoch)
        except FencedError as error:
            self._poison = error
            raise

    def _check_usable(self) -> None:
        if self._poison is not None:
            raise PoisonedError(self.directory, self._poison)
        if self._is_closed:
            raise ClosedError(self.directory)


def _recover(storage: Storage, directory: Path, epoch: int) -> tuple[fmt.SegmentHeader, SegmentWriter, Recovery]:
    """Read everything, cut a torn tail, make the rest durable, and open the newest segment of this epoch."""
    remove_leftovers(storage, directory)
    reader = Reader(directory, storage=storage)
    for _ in reader:
        pass
    settle_tail(storage, directory, reader)
    tear = reader.tear
    quarantine = cut_tear(storage, directory, tear) if tear else None
    torn_bytes = tear.size_bytes if tear else 0
    recovery = Recovery(reader.records_count, reader.next_lsn, torn_bytes, quarantine)
    newest = reader.header
    if newest is not None and newest.name == reader.segments[-1].name and newest.epoch == epoch:
        return newest, SegmentWriter.resume(storage, directory / newest.name, reader.end_offset), recovery
    log_id = newest.log_id if newest else uuid.uuid4().bytes
    header = fmt.SegmentHeader(log_id, reader.next_lsn, epoch)
    return header, SegmentWriter.create(storage, directory, header), recovery
