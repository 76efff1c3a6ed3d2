"""Group commit: many asyncio callers, one write and one sync for all that wait.

Records that arrive while a sync is under way form the next group; so the more callers, the larger
the groups, and the cost of a sync is shared without any tuning.  Each caller learns when *its*
record is durable, and nothing earlier.  Handing a sync to a thread and back costs the loop about as
much as a sync of a fast disk, so while syncs are that fast they run on the event loop, and in a
worker thread as soon as one was slow.

Invariants:
1. `append` returns only after a sync (under `os`: a write) that began after the record was in the file.
2. Records get their lsns in the order in which they were admitted; what one task appends stays in order.
3. One group is under way at a time, so batches reach the log in order.

See: docs/formats/wal.md, "Group commit".
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from wal.errors import ClosedError, FencedError, PoisonedError, StorageError, WalError
from wal.log import Batch, Log

T = TypeVar("T")
PENDING_BYTES_MAX = 64 << 20
INLINE_S_MAX = 0.001


@dataclass(frozen=True)
class SyncPolicy:
    """When a group is made durable.

    `always`: as soon as the sync before it is done.  `interval`: at most one sync every
    `interval_ms`; callers wait for it.  `os`: written, not synced: survives a kill of the process,
    not the loss of the machine.
    """

    mode: Literal["always", "interval", "os"] = "always"
    interval_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.mode == "interval" and not self.interval_ms > 0:
            raise ValueError(f"interval_ms is {self.interval_ms}, must be above 0")

    @classmethod
    def always(cls) -> SyncPolicy:
        """Sync each group."""
        return cls()

    @classmethod
    def interval(cls, interval_ms: float) -> SyncPolicy:
        """Sync at most every `interval_ms` milliseconds."""
        return cls("interval", interval_ms)

    @classmethod
    def os(cls) -> SyncPolicy:
        """Leave it to the operating system when bytes reach the disk."""
        return cls("os")

    @classmethod
    def parse(cls, text: str) -> SyncPolicy:
        """`always`, `os` or `interval(MS)`.  ValueError."""
        if text == "always":
            return cls.always()
        if text == "os":
            return cls.os()
        match = re.fullmatch(r"interval\((\d+(?:\.\d+)?)\)", text)
        if match is None:
            raise ValueError(f"sync policy {text!r} is none of: always, os, interval(MS)")
        return cls.interval(float(match[1]))


@dataclass
class GroupStats:
    """What was committed so far.  `sync_s`: seconds spent writing and syncing groups."""

    syncs_count: int = 0
    groups_count: int = 0
    records_count: int = 0
    bytes_count: int = 0
    sync_s: float = 0.0


class GroupCommit:
    """The asyncio front of a `Log`, which it owns from now on; use it from one event loop."""

    def __init__(
        self,
        log: Log,
        policy: SyncPolicy | None = None,
        *,
        pending_bytes_max: int = PENDING_BYTES_MAX,
        inline_s_max: float = INLINE_S_MAX,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Commits that lately took less than `inline_s_max` seconds by `clock` run on the event loop itself."""
        self._clock = clock
        self.log = log
        self.policy = policy or SyncPolicy.always()
        self.stats = GroupStats()
        self._pending_bytes_max = pending_bytes_max
        self._inline_s_max = inline_s_max
        self._waiters: list[asyncio.Future[None]] = []
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._timer: asyncio.TimerHandle | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wal-sync")
        self._newest_group_s = -math.inf
        self._pace_s = math.inf
        self._failure: WalError | None = None
        self._closing: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def append(self, kind: int, payload: bytes) -> int:
        """Append a record and return its lsn once THIS record is durable (`os`: written).

        Waits for room while `pending_bytes_max` bytes wait for their group (the bound is passed by
        at most one record; as much again may be in the group under way).  If the caller is cancelled,
        its record may still be in the log.  Raises RecordInvalidError or RecordTooLargeError (nothing
        was appended), StorageError (this group failed: whether the record is in the log is not known),
        FencedError (another writer took over: it may keep the record or not), PoisonedError (an earlier
        group failed: this record was not appended), ClosedError.
        """
        if not self.has_room():
            await self.room()
        lsn, durable = self.admit(kind, payload)
        await durable
        return lsn

    async def room(self) -> None:
        """Wait while the bytes that wait for their group are at their bound.  PoisonedError, ClosedError."""
        self.check_open()
        while not self.has_room():
            self._has_room.clear()
            await self._has_room.wait()
            self.check_open()

    def has_room(self) -> bool:
        """Whether `room` would return at once."""
        return self.log.staged_bytes < self._pending_bytes_max

    def admit(self, kind: int, payload: bytes) -> tuple[int, asyncio.Future[None]]:
        """Give a record its place in the log's order now; returns its lsn and a future, done once it is durable.

        For a caller whose next record builds on this one and need not wait for the sync; it awaits `room`
        first.  Raises what `append` raises before the record is in the log, the future the rest.
        """
        if self._failure is not None or self._closing is not None:
            self.check_open()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        lsn = self.log.stage(kind, payload)
        done = loop.create_future()
        self._waiters.append(done)
        if self._is_idle.is_set():
            self._is_idle.clear()
            self._schedule(loop)
        return lsn, done

    async def close(self) -> None:
        """Commit what is waiting, then close the log (with a sync, under every policy).

        Later appends get ClosedError.  Failures were raised to the callers of `append`; only a
        failure of the last sync itself is raised here (StorageError, FencedError).  A second call
        waits for the first; a cancelled caller leaves, and the closing goes on.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _close(self) -> None:
        self._has_room.set()
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._begin(loop)
        await self._is_idle.wait()
        try:
            await loop.run_in_executor(self._worker, self.log.close)
        finally:
            self._worker.shutdown()

    def check_open(self) -> None:
        """PoisonedError or ClosedError if nothing can be appended any more."""
        if self._failure is not None:
            raise PoisonedError(self.log.directory, self._failure)
        if self._closing is not None:
            raise ClosedError(self.log.directory)

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not None:
            raise WalError(f"log {self.log.directory} is written from another event loop: a GroupCommit belongs to one")
        self._loop = loop

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin a group after one turn of the loop, so that callers that the last group woke get into it."""
        is_spaced = self.policy.mode == "interval" and self._closing is None
        start_s = self._newest_group_s + self.policy.interval_ms / 1000
        if is_spaced and start_s > loop.time():
            self._timer = loop.call_at(start_s, self._begin, loop)
        else:
            loop.call_soon(self._begin, loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take everything that waits, and write it here or in the worker thread, whichever costs less."""
        self._timer = None
        self._newest_group_s = loop.time()
        batch, waiters, self._waiters = self.log.take(), self._waiters, []
        self._has_room.set()
        if self._pace_s >= self._inline_s_max:
            running = loop.run_in_executor(self._worker, self._commit, batch)
            running.add_done_callback(lambda done: self._end(loop, waiters, done.exception()))
            return
        try:
            self._commit(batch)
        except WalError as error:
            self._end(loop, waiters, error)
        except BaseException as error:
            self._end(loop, waiters, error)
            raise
        else:
            self._end(loop, waiters, None)

    def _commit(self, batch: Batch) -> None:
        """One write, one sync; in the loop's or the worker's thread."""
        start_s = self._clock()
        syncs_before = self.log.syncs_count
        self.log.commit(batch, sync=self.policy.mode != "os")
        spent_s = self._clock() - start_s
        # Up at once, down slowly: one slow sync sends the next ones to the worker thread.
        known_s = spent_s if math.isinf(self._pace_s) else self._pace_s
        self._pace_s = max(spent_s, known_s + (spent_s - known_s) / 8)
        stats = self.stats
        stats.sync_s += spent_s
        stats.syncs_count += self.log.syncs_count - syncs_before
        stats.groups_count += 1
        stats.records_count += len(batch.frames)
        stats.bytes_count += batch.size_bytes

    def _end(
        self, loop: asyncio.AbstractEventLoop, waiters: list[asyncio.Future[None]], error: BaseException | None
    ) -> None:
        """Wake the callers of a group, and begin the next if somebody waits."""
        if error is not None:
            interrupted = WalError("the commit of a group was interrupted")
            self._fail(waiters, error if isinstance(error, WalError) else interrupted)
            return
        for done in waiters:
            if not done.done():
                done.set_result(None)
        if self._waiters:
            self._schedule(loop)
        else:
            self._is_idle.set()

    def _fail(self, waiters: list[asyncio.Future[None]], error: WalError) -> None:
        """Tell everybody: the failed group with the error itself, the others that the log is poisoned."""
        self._failure = error
        for done in waiters:
            if not done.done():
                # One exception object a caller: a shared one would collect every caller's traceback.
                _set_exception(done, _own_copy(error))
        for done in self._waiters:
            if not done.done():
                _set_exception(done, PoisonedError(self.log.directory, error))
        self._waiters = []
        self._has_room.set()
        self._is_idle.set()


def _set_exception(done: asyncio.Future[None], error: WalError) -> None:
    done.set_exception(error)
    done.exception()  # seen: whoever awaits it hears of it, and for the others the poison tells


def _own_copy(error: WalError) -> WalError:
    if isinstance(error, StorageError):
        copy: WalError = type(error)(error.path, error.operation, error.errno)
    elif isinstance(error, FencedError):
        copy = FencedError(error.directory, error.epoch, error.newest_epoch)
    else:
        copy = WalError(str(error))
    copy.__cause__ = error
    return copy


def _wake(ended: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not ended.done():
        ended.set_result(None)


async def settled(work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Await `work` to its end however often the caller is cancelled, then let the cancellation through.

    For a caller that appends and then folds the record into its own state: a record may be in the log
    although its writer was cancelled while it waited for the sync, and then it must be folded too.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        ended = asyncio.get_running_loop().create_future()  # of our own: a cancellation ends it, and not the task
        task.add_done_callback(partial(_wake, ended))
        try:
            await ended
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # seen here: the cancellation is what the caller hears
    raise cancellation
