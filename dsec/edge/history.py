"""Reading back what memory let go: one record by its lsn, or the whole trajectory of a sandbox.

A reader takes no lock, so all of this also works beside a running Edge, and without any.  An Edge reads in threads
of its own, which nothing else waits for: one record at a time, and, apart from these, whole stretches of the
journal for a bounded number of askers.

See: docs/formats/edge_journal.md.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import wal
from dsec import trajectory
from dsec.edge.edge_log import LOG
from dsec.edge.journal import (
    KIND,
    EdgeOpened,
    EdgeRecord,
    JournalRecord,
    Known,
    LeaseEnded,
    LeaseGranted,
    RequestCancelled,
    SandboxEnded,
    SandboxReady,
    SandboxRequested,
    SnapshotTaken,
    StateCarried,
    decode,
)
from dsec.errors import NotFoundError, ResourceExhaustedError, StateError
from dsec.trajectory import CommandFinished, CommandRefused, CommandStarted, CommandUnknown, TrajectoryRecord
from dsec.types import Command, ExecResult, SandboxId
from dsec.views import CommandView

T = TypeVar("T")
YIELD_COUNT, YIELD_S = 128, 0.0002
PAGE_COUNT, PAGE_BYTES = 64, 1 << 20
"""Commands of a trajectory that are read in one go: until there are so many, or so many bytes of them."""


@dataclass(slots=True)
class Outline:
    """Where the records of a command lie; `finished_lsn` is 0 if it has no known end."""

    key: str
    number: int
    started_lsn: int
    finished_lsn: int = 0
    ran: bool = True


@dataclass(frozen=True)
class Past:
    """How a sandbox came to the end of a command: its commands up to there, and snapshots, the newest first."""

    sandbox_id: SandboxId
    commands: tuple[Outline, ...]
    snapshots: tuple[SnapshotTaken, ...]

    def since(self, after: int) -> tuple[Outline, ...]:
        """What leads from the state after command `after` to the end.  StateError if it cannot be run again."""
        commands = [outline for outline in self.commands if outline.number > after and outline.ran]
        for outline, following in itertools.zip_longest(commands, commands[1:]):
            if not outline.finished_lsn or (following and following.started_lsn < outline.finished_lsn):
                raise StateError(
                    f"command {outline.key!r} of sandbox {self.sandbox_id} has no known end, or others ran beside it: "
                    "name an earlier command, or one that ran alone after a later snapshot"
                )
        return tuple(commands)


class History:
    """Trajectory records by lsn, the newest results of them in memory."""

    def __init__(
        self, directory: Path, bytes_max: int, scans_count_max: int, storage: wal.Storage | None = None
    ) -> None:
        """`directory` is the Edge's; at most `bytes_max` bytes of output are kept, and so many may want to read on."""
        self._directory = directory / LOG
        self._scans_count = 0
        self._scans_count_max = scans_count_max
        self._lookups, self._scans = ThreadPoolExecutor(1, "lookup"), ThreadPoolExecutor(1, "scan")
        self._storage = storage
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[int, CommandFinished] = OrderedDict()

    def remember(self, lsn: int, record: CommandFinished) -> None:
        """Keep a result that somebody may ask for again; the ones that were asked for longest ago go."""
        self._kept[lsn] = record
        self._bytes += _size(record)
        while self._bytes > self._bytes_max:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)

    async def record(self, lsn: int) -> TrajectoryRecord:
        """The trajectory record of an lsn.  wal.DroppedError if retention dropped it, wal.CorruptError."""
        if lsn in self._kept:
            self._kept.move_to_end(lsn)
            return self._kept[lsn]
        payload = await asyncio.get_running_loop().run_in_executor(self._lookups, self._read, lsn)
        return trajectory.decode(payload)

    async def trajectory(self, known: Known) -> AsyncGenerator[CommandView, None]:
        """See `read_trajectory`; it counts as a reader until it is closed.  ResourceExhaustedError if too many read."""
        with self._asking():
            entries = _trajectory(known.id, self._records(known))
            while page := await self._scan(lambda: _page(entries)):
                for entry in page:
                    yield entry

    async def past(self, known: Known, key: str) -> Past:
        """How it came to the end of command `key`.

        NotFoundError (no such key), StateError (the journal is damaged), ResourceExhaustedError as `trajectory`.
        """
        with self._asking():
            return await self._scan(lambda: self._past(known, key))

    def close(self) -> None:
        """Read no more; who waits is let go."""
        for threads in (self._lookups, self._scans):
            threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        if self._scans_count >= self._scans_count_max:
            raise ResourceExhaustedError(f"{self._scans_count} others read the journal: ask again later")
        self._scans_count += 1
        try:
            yield
        finally:
            self._scans_count -= 1

    async def _scan(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._scans, work)

    def _records(self, known: Known) -> Iterator[tuple[int, JournalRecord]]:
        last_lsn = known.last_lsn if known.is_ended else None
        return read_records(
            self._directory.parent, known.id, first_lsn=known.first_lsn, last_lsn=last_lsn, storage=self._storage
        )

    def _past(self, known: Known, key: str) -> Past:
        outlines: dict[str, Outline] = {}
        snapshots: list[SnapshotTaken] = []
        for lsn, record in self._records(known):
            match record:
                case CommandStarted():
                    outlines[record.key] = Outline(record.key, record.number, lsn)
                case CommandFinished() if record.key not in outlines:
                    raise StateError(
                        f"the journal has the end of {record.key!r} of {known.id} and no start: it is damaged"
                    )
                case CommandFinished():
                    outlines[record.key].finished_lsn, outlines[record.key].ran = lsn, record.ran
                case CommandRefused():
                    outlines.pop(record.key, None)
                case SnapshotTaken(after=int()):
                    snapshots.append(record)
        if key not in outlines:
            raise NotFoundError(f"sandbox {known.id} has no command with key {key!r}")
        target = outlines[key].number
        usable = [snapshot for snapshot in snapshots if (snapshot.after or 0) <= target]
        usable.sort(key=lambda snapshot: snapshot.after or 0, reverse=True)
        commands = sorted((o for o in outlines.values() if o.number <= target), key=lambda outline: outline.number)
        return Past(known.id, tuple(commands), tuple(usable))

    def _read(self, lsn: int) -> bytes:
        for record in wal.Reader(self._directory, after_lsn=lsn - 1, storage=self._storage):
            if record.lsn == lsn:
                return record.payload
            break
        raise NotFoundError(f"lsn {lsn} is not in {self._directory} any more")


def read_records(
    directory: Path,
    sandbox_id: str,
    *,
    first_lsn: int = 1,
    last_lsn: int | None = None,
    storage: wal.Storage | None = None,
) -> Iterator[tuple[int, JournalRecord]]:
    """The records of one sandbox and their lsns, in order.  NotFoundError if its first ones were dropped."""
    name = sandbox_id.encode(errors="replace")
    is_begun = False
    for record in wal.Reader(directory / LOG, after_lsn=first_lsn - 1, storage=storage):
        if record.kind in (KIND, trajectory.KIND) and name in record.payload:
            value = decode(record.kind, record.payload)
            if sandbox_id in names_of(value):
                is_begun = is_begun or isinstance(value, SandboxRequested)
                if not is_begun:
                    raise NotFoundError(f"the journal in {directory} has let go of the beginning of {sandbox_id}")
                yield record.lsn, value
        if record.lsn == last_lsn:
            return
        if record.lsn % YIELD_COUNT == 0:  # else the interpreter lets the loop's thread wait 5 ms for each of its turns
            time.sleep(YIELD_S)


def names_of(record: JournalRecord) -> tuple[str, ...]:
    """The sandboxes that a record is about."""
    match record:
        case SandboxReady():
            return record.sandbox_ids
        case EdgeOpened() | StateCarried() | LeaseGranted() | LeaseEnded() | RequestCancelled():
            return ()
        case _:
            return (record.sandbox_id if isinstance(record, EdgeRecord) else record.session,)


def read_trajectory(directory: Path, sandbox_id: str) -> Iterator[CommandView]:
    """The commands of a sandbox from the journal of the Edge at `directory`, running or not.

    In the order of their ends, then those without one: `unknown` if nobody will ever say, else
    `running`.  Memory is that of the commands under way.  NotFoundError if the journal does not have its beginning.
    """
    return _trajectory(sandbox_id, read_records(directory, sandbox_id))


def _trajectory(sandbox_id: str, records: Iterator[tuple[int, JournalRecord]]) -> Iterator[CommandView]:
    started: dict[str, CommandStarted] = {}
    is_known = is_ended = False
    for _, record in records:
        is_known = True
        match record:
            case SandboxEnded():
                is_ended = True
            case CommandStarted():
                started[record.key] = record
            case CommandFinished() if record.key in started:
                yield _view(started.pop(record.key), record)
            case CommandRefused():
                started.pop(record.key, None)
            case CommandUnknown() if record.key in started:
                yield _view(started.pop(record.key), None, "unknown")
    if not is_known:
        raise NotFoundError(f"the journal has no sandbox {sandbox_id[:80]!r}")
    for start in started.values():
        yield _view(start, None, "unknown" if is_ended else "running")


def _page(entries: Iterator[CommandView]) -> list[CommandView]:
    """The next ones: bounded, and none only at the end."""
    page: list[CommandView] = []
    size = 0
    for entry in entries:
        page.append(entry)
        size += _command_size(entry.command) + (_output_size(entry.result) if entry.result else 0)
        if len(page) >= PAGE_COUNT or size >= PAGE_BYTES:
            break
    return page


def _view(
    start: CommandStarted, end: CommandFinished | None, state: Literal["running", "finished", "unknown"] = "finished"
) -> CommandView:
    return CommandView(
        key=start.key, number=start.number, command=start.command, state=state, result=end.result if end else None
    )


def _size(record: CommandFinished) -> int:
    return 512 + len(record.key) + _output_size(record.result)


def _command_size(command: Command) -> int:
    return len(command.stdin) + sum(map(len, [*command.argv, *command.env, *command.env.values()]))


def _output_size(result: ExecResult) -> int:
    return sum(len(output.head) + len(output.tail) for output in (result.stdout, result.stderr))
