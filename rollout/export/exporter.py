"""From a ledger to its shards: what has ended and is not there yet, in the order of the log.

A service writes each rollout when it ends and, when it starts, those that a crash kept it from writing;
`dsec export` does the same for a log that nobody runs.  The log never waits for it: what a full disk
refuses is told once, and written by the next start.

See: docs/formats/shards.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

import wal
from rollout.errors import ResultsError
from rollout.events import Event, RolloutFinished
from rollout.ledger import Ledger
from rollout.record import TrajectoryRecord, trajectory_record

if TYPE_CHECKING:
    from rollout.export.shards import ShardWriter

SHARDS = "shards"
"""Of a run directory."""
_ROWS_AT_ONCE = 16
_log = logging.getLogger(__name__)


def ended_record(ledger: Ledger, rollout_id: str) -> TrajectoryRecord:
    """The record of a rollout that has ended, as it will be for ever.

    Which members of its group lack a reward is known when the last of them has ended: the rows of the group say it.
    """
    record = trajectory_record(ledger, rollout_id)
    return msgspec.structs.replace(record, group=msgspec.structs.replace(record.group, missing_reasons={}))


def ended(ledger: Ledger, written: Iterable[str]) -> list[str]:
    """Rollouts that have ended and are not written, in the order of the log."""
    left = ledger.rollouts.keys() - set(written)
    return sorted((each for each in left if ledger.is_done(each)), key=lambda each: ledger.lsns[each][1])


def export(ledger: Ledger, directory: Path) -> int:
    """Write what a ledger holds to shards; how many rollouts were not there yet.  The errors of ShardWriter."""
    from rollout.export.shards import ShardWriter  # loads pyarrow, which nobody needs before

    with ShardWriter.open(directory) as writer:
        ids = ended(ledger, writer.rollout_ids)
        return writer.append(ended_record(ledger, each) for each in ids)


class Exporter:
    """Writes rollouts of a running service as they end; an async context manager, which writes the rest at its end."""

    def __init__(self, directory: Path, ledger: Ledger, epoch: int | None = None) -> None:
        """`ledger` and `epoch` are the service's; records are made in its event loop, and written by a thread."""
        self._directory, self._ledger, self._epoch = directory, ledger, epoch
        self._waiting: deque[str] = deque()
        self._wake = asyncio.Event()
        self._has_taken_all = asyncio.Event()
        self._is_closing = False

    async def __aenter__(self) -> Self:
        """Go on with the directory, and with what a crash left unwritten.

        wal.LockedError while another exporter has it, ShardError, ResultsError.
        """
        self._writer = await asyncio.to_thread(self._open)
        self._waiting.extend(ended(self._ledger, self._writer.rollout_ids))
        if not self._waiting:
            self._has_taken_all.set()
        self._wake.set()
        self._work = asyncio.create_task(self._write(), name="exporter")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await wal.settled(self._close())

    def _open(self) -> ShardWriter:
        from rollout.export.shards import ShardWriter  # loads pyarrow

        return ShardWriter.open(self._directory, epoch=self._epoch)

    def observe(self, event: Event) -> None:
        """What the service calls with each event that is durable and folded."""
        if isinstance(event, RolloutFinished) and not self._work.done():
            self._waiting.append(event.rollout_id)
            self._has_taken_all.clear()
            self._wake.set()

    async def taken_all(self) -> None:
        """Return once nothing that has ended is still looked up in the ledger, which may forget it then."""
        await self._has_taken_all.wait()

    async def _close(self) -> None:
        self._is_closing = True
        self._wake.set()
        await self._work

    async def _write(self) -> None:
        try:
            while self._waiting or not self._is_closing:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    ids = [self._waiting.popleft() for _ in range(min(len(self._waiting), _ROWS_AT_ONCE))]
                    records = [ended_record(self._ledger, each) for each in ids]
                    if not self._waiting:
                        self._has_taken_all.set()
                    await asyncio.to_thread(self._writer.append, records)
        except (ResultsError, wal.WalError) as error:
            _log.warning("%s; rollouts that end from now on are written by the next start", error)
        finally:
            self._has_taken_all.set()
            await asyncio.to_thread(self._writer.close)
