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
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec

import wal
from rollout.engine import EngineInfo
from rollout.errors import ResultsError, RolloutError
from rollout.events import Event, RolloutFinished
from rollout.export.manifest import SideChannel
from rollout.ledger import Ledger
from rollout.record import TrajectoryRecord, trajectory_record
from rollout.request import HEAVY, Returned

if TYPE_CHECKING:
    from rollout.export.shards import ShardWriter

SHARDS = "shards"
"""Of a run directory."""
_ROWS_AT_ONCE = 16
_log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """A rollout that has ended, as it will be for ever; `returns` are the side channels that stand in the log."""

    record: TrajectoryRecord
    engines: tuple[tuple[int, EngineInfo], ...]
    returns: frozenset[Returned]


def ended_rollout(ledger: Ledger, rollout_id: str) -> Ended:
    """What goes to a shard.

    Which members of its group lack a reward is known when the last of them has ended: the rows of the group say it.
    """
    record, state = trajectory_record(ledger, rollout_id), ledger.rollouts[rollout_id]
    record = msgspec.structs.replace(record, group=msgspec.structs.replace(record.group, missing_reasons={}))
    return Ended(record, state.engines, HEAVY.intersection(state.job.returns))


def ended(ledger: Ledger, written: Iterable[str]) -> list[str]:
    """Rollouts that have ended and are not written, in the order of the log."""
    left = ledger.rollouts.keys() - set(written)
    return sorted((each for each in left if ledger.is_done(each)), key=lambda each: ledger.lsns[each][1])


def export(log: Path, ledger: Ledger, directory: Path) -> int:
    """Write what a log and its ledger hold to shards; how many rollouts were not there yet.

    The errors of ShardWriter and of reading a log.
    """
    from rollout.export.shards import ShardWriter  # loads pyarrow, which nobody needs before

    with ShardWriter.open(directory) as writer:
        ids = ended(ledger, writer.rollout_ids)
        starts = range(0, len(ids), _ROWS_AT_ONCE)
        batches = ([ended_rollout(ledger, each) for each in ids[start : start + _ROWS_AT_ONCE]] for start in starts)
        return sum(_append(log, writer, batch) for batch in batches)


def _append(log: Path, writer: ShardWriter, batch: list[Ended]) -> int:
    """Write rollouts with their side channels; those of one file are laid out alike."""
    from rollout.export.rows import layout_of, read_rows

    channels, count = read_rows(log, batch), 0
    for _, alike in groupby(batch, key=layout_of):
        count += writer.append([each.record for each in alike], channels)
    return count


class Exporter:
    """Writes rollouts of a running service as they end; an async context manager, which writes the rest at its end."""

    def __init__(self, run: Path, ledger: Ledger, epoch: int | None = None) -> None:
        """The run, `ledger` and `epoch` are the service's; records are made in its event loop, written by a thread."""
        self._directory, self._log, self._ledger, self._epoch = run / SHARDS, run / "wal", ledger, epoch
        self._waiting: deque[str] = deque()
        self._wake = asyncio.Event()
        self._ended_count = 0
        self._taken_count = 0
        self._has_taken = asyncio.Event()
        self._has_written = asyncio.Event()
        self._is_closing = False
        self._has_stopped = False
        """Nothing is taken or written any more, and nobody waits for that."""

    async def __aenter__(self) -> Self:
        """Go on with the directory, and with what a crash left unwritten.

        wal.LockedError while another exporter has it, ShardError, ResultsError.
        """
        self._writer = await asyncio.to_thread(self._open)
        self._waiting.extend(ended(self._ledger, self._writer.rollout_ids))
        self._ended_count = len(self._waiting)
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
        if isinstance(event, RolloutFinished) and not self._has_stopped:
            self._waiting.append(event.rollout_id)
            self._ended_count += 1
            self._wake.set()

    async def taken_all(self) -> None:
        """Return once nothing that has ended by now is still looked up in ledger or log, which may forget it then."""
        ended_count = self._ended_count
        while self._taken_count < ended_count and not self._has_stopped:
            await self._has_taken.wait()

    def _take(self, count: int) -> None:
        self._taken_count += count
        self._has_taken.set()
        self._has_taken.clear()

    async def side_channels(self, rollout_id: str) -> tuple[SideChannel, ...]:
        """Where those of a rollout that has ended lie, once they do; `uri` is a path.  ResultsError: they do not."""
        while (found := self._writer.side_channels.get(rollout_id)) is None:
            if self._has_stopped:
                raise ResultsError(f"the side channels of {rollout_id} are not written: see the server's log")
            await self._has_written.wait()
        where = self._directory.absolute()
        return tuple(msgspec.structs.replace(each, uri=str(where / each.uri)) for each in found)

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
                    batch = [ended_rollout(self._ledger, each) for each in ids]
                    if is_taken := not any(each.returns for each in batch):
                        self._take(len(batch))
                    await asyncio.to_thread(_append, self._log, self._writer, batch)
                    self._has_written.set()
                    self._has_written.clear()
                    if not is_taken:
                        self._take(len(batch))
        except (RolloutError, wal.WalError) as error:
            _log.warning("%s; rollouts that end from now on are written by the next start", error)
        except BaseException:
            _log.exception("shards are written no more; rollouts that end from now on are written by the next start")
            raise
        finally:
            self._has_stopped = True
            self._has_taken.set()
            self._has_written.set()
            await asyncio.to_thread(self._writer.close)
