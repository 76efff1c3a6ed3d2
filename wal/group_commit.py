"""Group commit: many asyncio callers, one write and one sync for all that wait.

While a sync runs in a worker thread the loop goes on, and the records that arrive meanwhile form
the next group; so the more callers, the larger the groups, and the cost of a sync is shared without
any tuning.  Each caller learns when *its* record is durable, and nothing earlier.

Invariants:
1. `append` returns only after a sync (under `os`: a write) that began after the record was in the file.
2. Records get their lsns in the order in which they were admitted; what one task appends stays in order.
3. One group is under way at a time, so only one thread touches the log.

See: docs/formats/wal.md, "Group commit".
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from wal.errors import ClosedError, PoisonedError, StorageError, WalError
from wal.format import frame_bytes
from wal.log import Log

T = TypeVar("T")
PENDING_BYTES_MAX = 64 << 20
GROUP_BYTES_MAX = 8 << 20


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
    """What was committed so far.  `sync_s`: seconds spent encoding, writing and syncing groups."""

    syncs_count: int = 0
    groups_count: int = 0
    records_count: int = 0
    bytes_count: int = 0
    sync_s: float = 0.0


class _Waiter(NamedTuple):
    kind: int
    payload: bytes
    done: asyncio.Future[int]


class GroupCommit:
    """The asyncio front of a `Log`, which it owns from now on; use it from one event loop."""

    def __init__(
        self, log: Log, policy: SyncPolicy | None = None, *, pending_bytes_max: int = PENDING_BYTES_MAX
    ) -> None:
        self.log = log
        self.policy = policy or SyncPolicy.always()
        self.stats = GroupStats()
        self._pending_bytes_max = pending_bytes_max
        self._pending: deque[_Waiter] = deque()
        self._pending_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wal-sync")
        self._committer: asyncio.Task[None] | None = None
        self._newest_group_s = -math.inf
        self._failure: WalError | None = None
        self._is_closing = False

    async def append(self, kind: int, payload: bytes) -> int:
        """Append a record and return its lsn once THIS record is durable (`os`: written).

        Waits for room while `pending_bytes_max` bytes wait for their group (the bound is passed by
        at most one record).  If the caller is cancelled, its record may still be in the log.  Raises
        RecordInvalidError or RecordTooLargeError (nothing was appended), StorageError (this group
        failed: whether the record is in the log is not known), PoisonedError (an earlier group
        failed: this record was not appended), ClosedError.
        """
        self._check_open()
        self.log.check(kind, payload)
        while self._pending_bytes >= self._pending_bytes_max:
            self._has_room.clear()
            await self._has_room.wait()
            self._check_open()
        waiter = _Waiter(kind, payload, asyncio.get_running_loop().create_future())
        self._pending.append(waiter)
        self._pending_bytes += frame_bytes(len(payload))
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit_groups())
        return await waiter.done

    async def close(self) -> None:
        """Commit what is waiting, then close the log (with a sync, under every policy).

        Later appends get ClosedError.  Failures were raised to the callers of `append`; only a
        failure of the last sync itself is raised here (StorageError).
        """
        if self._is_closing:
            return
        self._is_closing = True
        self._has_room.set()
        if self._committer is not None:
            await self._committer
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self.log.close)
        finally:
            self._worker.shutdown()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise PoisonedError(self.log.directory, self._failure)
        if self._is_closing:
            raise ClosedError(self.log.directory)

    async def _commit_groups(self) -> None:
        """Commit group after group until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._pending:
            # One turn of the loop: callers that the last group woke get into this one.
            await asyncio.sleep(max(0.0, self._newest_group_s + self._interval_s() - loop.time()))
            self._newest_group_s = loop.time()
            group = self._take_group()
            try:
                first_lsn = await loop.run_in_executor(self._worker, self._write_group, group)
            except WalError as error:
                self._fail(group, error)
                break
            except BaseException:
                self._fail(group, WalError("the commit of a group was interrupted"))
                raise
            for index, waiter in enumerate(group):
                if not waiter.done.done():
                    waiter.done.set_result(first_lsn + index)

    def _interval_s(self) -> float:
        return self.policy.interval_ms / 1000 if self.policy.mode == "interval" and not self._is_closing else 0.0

    def _take_group(self) -> list[_Waiter]:
        group: list[_Waiter] = []
        group_bytes = 0
        while self._pending and group_bytes < GROUP_BYTES_MAX:
            waiter = self._pending.popleft()
            group_bytes += frame_bytes(len(waiter.payload))
            group.append(waiter)
        self._pending_bytes -= group_bytes
        self._has_room.set()
        return group

    def _write_group(self, group: list[_Waiter]) -> int:
        """Runs in the worker thread: one write, one sync.  Returns the first lsn of the group."""
        start_s = time.perf_counter()
        first_lsn, syncs_before = self.log.next_lsn, self.log.syncs_count
        for waiter in group:
            self.log.append(waiter.kind, waiter.payload)
        if self.policy.mode == "os":
            self.log.flush()
        else:
            self.log.sync()
        stats = self.stats
        stats.sync_s += time.perf_counter() - start_s
        stats.syncs_count += self.log.syncs_count - syncs_before
        stats.groups_count += 1
        stats.records_count += len(group)
        stats.bytes_count += sum(frame_bytes(len(waiter.payload)) for waiter in group)
        return first_lsn

    def _fail(self, group: list[_Waiter], error: WalError) -> None:
        """Tell everybody: the failed group with the error itself, the others that the log is poisoned."""
        self._failure = error
        for waiter in group:
            if not waiter.done.done():
                # One exception object a caller: a shared one would collect every caller's traceback.
                waiter.done.set_exception(_own_copy(error))
        for waiter in self._pending:
            if not waiter.done.done():
                waiter.done.set_exception(PoisonedError(self.log.directory, error))
        self._pending.clear()
        self._pending_bytes = 0
        self._has_room.set()


def _own_copy(error: WalError) -> WalError:
    if isinstance(error, StorageError):
        copy: WalError = type(error)(error.path, error.operation, error.errno)
    else:
        copy = WalError(str(error))
    copy.__cause__ = error
    return copy


async def settled(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled, then let the cancellation through.

    For a caller that appends and then folds the record into its own state: a record may be in the log
    although its writer was cancelled while it waited for the sync, and then it must be folded too.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen here: the cancellation is what the caller hears
        raise
