"""The write side of an Edge's journal: durable, folded in order, and on its feet again after a full disk.

A failed write poisons a `wal` log, and then nobody knows which of the records under way are in it.
So the log is opened again, which reads it back, and each of them is told the truth: in the log, or
not.  Records that begin something are refused while the disk is full; records that end something
that did begin wait until they can be written, and a file of zeros is kept for that, to be given up
when the disk is full.

Invariants:
1. `append` returns only when the record is durable and folded; if it raises, the record is not in the log.
2. Records are folded in the order of the log, also those whose writer was cancelled.

See: docs/formats/edge_journal.md; wal/group_commit.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

import wal
from dsec.edge.admission import free_bytes_above_floor
from dsec.edge.clock import Clock
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.journal import JournalRecord, decode, encode
from dsec.errors import ResourceExhaustedError, StateError

LOG = "log"
RESERVE = "log.reserve"
RETRY_S = 1.0
_log = logging.getLogger(__name__)


class _Generation:
    """One opening of the log; `next_lsn` is done once a later opening knows what this one left in it."""

    def __init__(self, commit: wal.GroupCommit) -> None:
        self.commit = commit
        self.next_lsn: asyncio.Future[int] | None = None


class EdgeLog:
    """The journal of one Edge, open for writing."""

    def __init__(
        self,
        directory: Path,
        config: EdgeConfig,
        clock: Clock,
        apply: Callable[[JournalRecord, int], None],
        storage: wal.Storage | None = None,
    ) -> None:
        """`directory/log` is the log; `apply` folds."""
        self.directory = directory / LOG
        self._disk = directory
        self._reserve = directory / RESERVE
        self._config = config
        self._clock = clock
        self._apply = apply
        self._storage = storage
        self._generation: _Generation | None = None
        self._lsn = 0
        self._is_reserve_spent = False
        self._closing = asyncio.Event()
        self._reopening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Lock the log, repair it, fold it.  StateError (another Edge has it), wal.CorruptError."""
        try:
            log = await asyncio.to_thread(self._open_log)
        except wal.LockedError as error:
            raise StateError(f"another Edge serves this directory: {error}") from error
        if log.recovery.torn_bytes:
            _log.warning("cut %d bytes of an unfinished write off %s", log.recovery.torn_bytes, self.directory)
        self._fold_rest()
        self._generation = _Generation(wal.GroupCommit(log, self._config.sync_policy))
        self._keep_reserve()

    def _open_log(self) -> wal.Log:
        bytes_max = self._config.log_segment_bytes_max
        return wal.Log.open(self.directory, segment_bytes_max=bytes_max, storage=self._storage)

    def _fold_rest(self) -> None:
        for record in wal.Reader(self.directory, after_lsn=self._lsn, storage=self._storage):
            try:
                self._fold(decode(record.kind, record.payload), record.lsn)
            except msgspec.DecodeError as error:
                where = f"{record.segment} at byte {record.offset} (lsn {record.lsn})"
                raise StateError(f"the journal {self.directory} is not an Edge's: {where}: {error}") from error

    def _fold(self, record: JournalRecord, lsn: int) -> None:
        if lsn > self._lsn:
            self._lsn = lsn
            self._apply(record, lsn)

    async def append(self, record: JournalRecord, *, is_refusable: bool = False) -> int:
        """Make a record durable and fold it; returns its lsn.

        A refusable one raises ResourceExhaustedError while the disk is full; the others wait.  A caller that
        is cancelled leaves, and the record may still be written and is folded then.
        """
        kind, payload = encode(record)
        while True:
            if is_refusable:
                self.check_room(len(payload))
            generation = await self._current()
            commit = generation.commit
            try:
                if not commit.has_room():
                    await commit.room()
                lsn, durable = commit.admit(kind, payload)
            except wal.WalError as error:
                await self._recover(generation, error)
                continue
            folded = asyncio.get_running_loop().create_future()  # our own: a caller that leaves cancels no commit
            durable.add_done_callback(partial(self._on_durable, record, lsn, folded))
            try:
                await folded
            except wal.WalError as error:
                if lsn < await self._recover(generation, error):
                    return lsn
                if is_refusable:
                    raise ResourceExhaustedError(
                        f"the journal could not be written, nothing was done: {error}"
                    ) from error
                continue
            return lsn

    def _on_durable(
        self, record: JournalRecord, lsn: int, folded: asyncio.Future[None], durable: asyncio.Future[None]
    ) -> None:
        error = durable.exception()
        if not folded.done():
            folded.set_result(None) if error is None else folded.set_exception(error)
        if error is None:
            self._fold(record, lsn)  # before the writer's next step

    def check_room(self, size_bytes: int = 0) -> None:
        """ResourceExhaustedError while the disk has no room for new work."""
        if self._generation is not None and self._generation.next_lsn is not None:
            raise ResourceExhaustedError("the journal cannot be written at the moment; free some disk space")
        above = free_bytes_above_floor(self._disk, self._config.disk_free_bytes_min)
        if above < size_bytes:
            raise ResourceExhaustedError(
                f"disk of {self._disk}: asked {size_bytes} bytes, {size_bytes - above} too few are free"
            )
        if self._is_reserve_spent and above > 2 * self._config.log_reserve_bytes:
            self._keep_reserve()

    async def _current(self) -> _Generation:
        while True:
            generation = self._generation
            if generation is None:
                raise StateError("the Edge is not open")
            if generation.next_lsn is None:
                return generation
            await asyncio.shield(generation.next_lsn)

    async def _recover(self, failed: _Generation, error: wal.WalError) -> int:
        """Open the log again, once for all who failed; the lsn behind the last record of the failed opening.

        What is not the disk's fault (a fence, a record too large) is raised again.
        """
        cause = error.cause if isinstance(error, wal.PoisonedError) else error
        if not isinstance(cause, wal.StorageError):
            raise error
        if failed.next_lsn is None:
            _log.error("the journal failed, opening it again: %s", error)
            failed.next_lsn = asyncio.get_running_loop().create_future()
            self._reopening = asyncio.create_task(self._reopen(failed, failed.next_lsn), name="reopen journal")
        return await asyncio.shield(failed.next_lsn)

    async def _reopen(self, failed: _Generation, next_lsn: asyncio.Future[int]) -> None:
        try:
            next_lsn.set_result(await self._open_again(failed))
        except BaseException as error:
            next_lsn.set_exception(error)
            next_lsn.exception()  # seen: whoever waits for it hears of it
            raise

    async def _open_again(self, failed: _Generation) -> int:
        with contextlib.suppress(wal.WalError):
            await failed.commit.close()
        self._reserve.unlink(missing_ok=True)
        self._is_reserve_spent = True
        is_told = False
        while not self._closing.is_set():
            try:
                log = await asyncio.to_thread(self._open_log)
            except wal.StorageError as error:
                if not is_told:
                    is_told = True
                    _log.warning("what ends waits: the journal cannot be opened, tried every %g s: %s", RETRY_S, error)
                await self._clock.wait(self._closing, RETRY_S)
                continue
            if is_told:
                _log.warning("the journal is open again")
            self._fold_rest()
            self._generation = _Generation(wal.GroupCommit(log, self._config.sync_policy))
            return log.recovery.next_lsn
        raise StateError("the Edge was closed while its journal could not be written")

    def _keep_reserve(self) -> None:
        """Hold some disk back, if there is enough; without it a full disk is met a little earlier."""
        self._is_reserve_spent = False
        size = self._config.log_reserve_bytes
        disk = os.statvfs(self._disk)
        if not size or self._reserve.exists() or disk.f_bavail * disk.f_frsize < 2 * size:
            return
        try:
            fd = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError as error:
            _log.warning("no disk could be held back for the journal: %s", error)
            self._reserve.unlink(missing_ok=True)

    async def close(self) -> None:
        """Write what waits, close the log, let go of its lock; safe to call twice."""
        self._closing.set()
        if self._reopening is not None:
            await asyncio.gather(self._reopening, return_exceptions=True)
        generation, self._generation = self._generation, None
        if generation is not None:
            with contextlib.suppress(wal.PoisonedError):
                await generation.commit.close()

    @property
    def lsn(self) -> int:
        """The newest record that is durable and folded."""
        return self._lsn
