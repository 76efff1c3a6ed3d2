"""Which sealed segments may go, and the pass that lets them go.

Only a prefix of the log is dropped, so lsns stay dense, and a request holds everything from its
first record on.  That makes the rule cheap: of each request that is not released yet its first lsn
is kept, nothing else, and the log may begin at the first segment that starts at or below all of them.
Bounds on size and age decide how much released history is kept beyond that; they never widen what
may go.  Every input only grows (a released request stays released, lsns only rise), so a pass that
knows less than there is drops less: it may run beside the writer, late, or twice.

Invariants:
1. A segment is dropped only when every request that has a record in it is released, no pin and no
   HOLD record lies in or before it, all of it was fed to `add`, and everything before it is dropped too.
2. The newest segment is never dropped.

See: docs/formats/wal_retention.md.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wal.errors import storage_error
from wal.floor import FIRST_LSN, raise_floor, remove_below_floor
from wal.pins import RETENTION_LOCK, pins_of
from wal.reader import Reader, Record
from wal.requests import Hold, Requests
from wal.segments import Segment, find_segments
from wal.storage import FileStat, Lock, OsStorage, Storage

HOLDERS_TOLD_MAX = 8
NAME_CHARS_MAX = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetentionPolicy:
    """How much released history is kept: the oldest goes once a bound that is set is passed.

    `keep_bytes_max`: size of all segments, the newest included, in bytes.  `keep_age_s_max`: seconds
    since a segment was last written.  None is no bound; without any, all that may go goes.
    """

    keep_bytes_max: int | None = None
    keep_age_s_max: float | None = None

    def __post_init__(self) -> None:
        for name, bound in (("keep_bytes_max", self.keep_bytes_max), ("keep_age_s_max", self.keep_age_s_max)):
            if bound is not None and not bound >= 0:
                raise ValueError(f"{name} is {bound}, must be at least 0 or None")

    def lets_go(self, log_bytes: int, age_s: float) -> bool:
        """Whether the oldest segment goes, if it may, in a log of this size."""
        if self.keep_bytes_max is None and self.keep_age_s_max is None:
            return True
        return bool(self.passed(log_bytes, age_s))

    def passed(self, log_bytes: int, age_s: float) -> tuple[BoundPassed, ...]:
        """The bounds that a log of this size, whose oldest segment has this age, is above."""
        values = (("keep_bytes_max", self.keep_bytes_max, log_bytes), ("keep_age_s_max", self.keep_age_s_max, age_s))
        return tuple(BoundPassed(n, bound, value) for n, bound, value in values if bound is not None and value > bound)


class BoundPassed(NamedTuple):
    """A bound of the policy and the value that is above it, in the bound's unit."""

    name: str
    bound: float
    value: float

    @property
    def excess(self) -> float:
        """How much above."""
        return self.value - self.bound


class Holder(NamedTuple):
    """Who needs the log from `lsn` on.

    `record`: a HOLD record.  `unseen`: records that were not fed to `add`.  Both have no name.
    """

    lsn: int
    kind: Literal["request", "pin", "record", "unseen"]
    name: str = ""


@dataclass(frozen=True)
class RetentionReport:
    """What one pass found and did.

    `dropped` are file names, gone durably.  `floor_lsn`, `segments_count` and `log_bytes` describe
    the log after the pass.  `holders`: the oldest 8 of `holders_count` that need a sealed segment.
    `passed`: bounds that the log is above although a sealed segment had to stay.  `is_deferred`: a pin
    was being set at that moment, so nothing was dropped; the next pass will.
    """

    dropped: tuple[str, ...]
    floor_lsn: int
    segments_count: int
    log_bytes: int
    holders: tuple[Holder, ...]
    holders_count: int
    passed: tuple[BoundPassed, ...]
    is_deferred: bool = False


class Retention:
    """The retention of one log; keep one, in the process that writes the log.

    Tell it every durable record, from the first that the log holds on, and `run_pass` now and then.
    Either `catch_up` before each pass, which reads the segments sealed since the last one, or `add`:
    first what a `Reader` gives, then what was appended.  `add` and `run_pass` may run in different
    threads; a pass blocks for a few syncs and unlinks, so an event loop hands it to a thread.
    Nothing here touches the newest segment, so it needs nothing of the `Log` that writes beside it.
    """

    def __init__(
        self,
        directory: Path,
        requests: Requests,
        policy: RetentionPolicy | None = None,
        *,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds since the epoch, comparable with the files' modification times."""
        self.directory = Path(directory)
        self.policy = policy or RetentionPolicy()
        self._requests, self._clock = requests, clock
        self._storage: Storage = storage or OsStorage()
        self._mutex = threading.Lock()
        self._first_lsn = self._next_lsn = FIRST_LSN
        self._is_fed = False
        self._held: dict[str, int] = {}
        self._hold_lsn: int | None = None
        self._warned: object = None

    def add(self, record: Record) -> None:
        """Take note of the next record, which must be durable.

        Durable, because a release that a crash takes back must not have dropped anything.  Raises
        ValueError if the record is not the one after the last, and what `requests_of` raises; the
        record is not noted then, and nothing from it on is dropped.
        """
        if self._is_fed and record.lsn != self._next_lsn:
            raise ValueError(f"retention of {self.directory} needs lsn {self._next_lsn} next, was given {record.lsn}")
        touched = self._requests.requests_of(record)
        is_hold = isinstance(touched, Hold)
        released = {} if isinstance(touched, Hold) else {name: self._requests.is_released(name) for name in touched}
        with self._mutex:
            if not self._is_fed:
                self._first_lsn, self._is_fed = record.lsn, True
            self._next_lsn = record.lsn + 1
            if is_hold and self._hold_lsn is None:
                self._hold_lsn = record.lsn
            for request, is_released in released.items():
                if is_released:
                    self._held.pop(request, None)
                else:
                    self._held.setdefault(request, record.lsn)

    def catch_up(self) -> None:
        """`add` the records of all sealed segments that were not added yet; they are durable.

        What the newest segment says is learned once it is sealed.  Raises what `wal.read` and `add` do.
        """
        segments, _, _ = self._look()
        end_lsn = segments[-1].first_lsn if segments else FIRST_LSN
        if self._next_lsn >= end_lsn:
            return
        start_lsn = max(self._next_lsn, segments[0].first_lsn)
        reader = Reader(self.directory, after_lsn=start_lsn - 1, storage=self._storage)
        for record in itertools.islice(reader, end_lsn - start_lsn):
            self.add(record)

    def run_pass(self) -> RetentionReport:
        """Drop what may go and the policy lets go; finish what an interrupted pass began.

        One pass at a time.  Raises StorageError (dropped or not, the log is whole: the next pass goes
        on from there) and CorruptError or StorageError from looking at the log (nothing was changed).
        """
        lock = self._lock()
        try:
            segments, stats, pins = self._look()
            holders = self._holders(segments, pins)
            count = self._droppable(segments, stats, holders) if lock else 0
            if count:
                raise_floor(self._storage, self.directory, segments[count].first_lsn)
        finally:
            if lock:
                lock.close()
        dropped = remove_below_floor(self._storage, self.directory)
        report = self._report(segments[count:], stats[count:], holders, tuple(dropped), is_deferred=lock is None)
        self._warn(report, segments[count:])
        return report

    def _lock(self) -> Lock | None:
        """The lock against new pins; None if a pin is being set, which a pass does not wait for."""
        path = self.directory / RETENTION_LOCK
        try:
            return self._storage.lock(path)
        except BlockingIOError:
            return None
        except OSError as error:
            raise storage_error(path, "lock", error) from error

    def _look(self) -> tuple[list[Segment], list[FileStat], list[Holder]]:
        try:
            segments = find_segments(self._storage, self.directory)
            stats = [self._storage.stat(self.directory / segment.name) for segment in segments]
            pins = [Holder(pin.lsn, "pin", pin.name) for pin in pins_of(self._storage.names(self.directory))]
        except OSError as error:
            raise storage_error(self.directory, "look at", error) from error
        return segments, stats, pins

    def _holders(self, segments: list[Segment], pins: list[Holder]) -> list[Holder]:
        """Everybody who needs a sealed segment."""
        if not segments:
            return []
        with self._mutex:
            holders = [Holder(lsn, "request", request) for request, lsn in self._held.items()]
            is_whole = self._is_fed and self._first_lsn <= segments[0].first_lsn
            holders.append(Holder(self._next_lsn if is_whole else segments[0].first_lsn, "unseen"))
            if self._hold_lsn is not None:
                holders.append(Holder(self._hold_lsn, "record"))
        return [holder for holder in holders + pins if holder.lsn < segments[-1].first_lsn]

    def _droppable(self, segments: list[Segment], stats: list[FileStat], holders: list[Holder]) -> int:
        """How many of the oldest segments may go and are let go."""
        limit = min((holder.lsn for holder in holders), default=None)
        now_s, log_bytes = self._clock(), sum(stat.size_bytes for stat in stats)
        for index, (following, stat) in enumerate(zip(segments[1:], stats, strict=False)):
            may_go = limit is None or following.first_lsn <= limit
            if not may_go or not self.policy.lets_go(log_bytes, now_s - stat.modified_s):
                return index
            log_bytes -= stat.size_bytes
        return max(0, len(segments) - 1)

    def _report(
        self,
        segments: list[Segment],
        stats: list[FileStat],
        holders: list[Holder],
        dropped: tuple[str, ...],
        *,
        is_deferred: bool,
    ) -> RetentionReport:
        log_bytes = sum(stat.size_bytes for stat in stats)
        is_held = len(segments) > 1 and any(holder.lsn < segments[1].first_lsn for holder in holders)
        return RetentionReport(
            dropped,
            segments[0].first_lsn if segments else FIRST_LSN,
            len(segments),
            log_bytes,
            tuple(heapq.nsmallest(HOLDERS_TOLD_MAX, holders)),
            len(holders),
            self.policy.passed(log_bytes, self._clock() - stats[0].modified_s) if is_held else (),
            is_deferred,
        )

    def _warn(self, report: RetentionReport, segments: list[Segment]) -> None:
        """Say that a bound is passed; again only if the oldest holder changed or the excess doubled."""
        if not report.passed:
            if self._warned is not None:
                _log.info("log %s is within its retention bounds again", self.directory)
            self._warned = None
            return
        case = report.holders[0], *((passed.name, int(passed.excess).bit_length()) for passed in report.passed)
        if case == self._warned:
            return
        self._warned = case
        units = {"keep_bytes_max": "bytes", "keep_age_s_max": "s"}
        bounds = " and ".join(
            f"{passed.excess:.0f} {units[passed.name]} above {passed.name} = {passed.bound:.0f}"
            for passed in report.passed
        )
        told = ", ".join(f"{describe(holder)} (from lsn {holder.lsn})" for holder in report.holders)
        more = report.holders_count - len(report.holders)
        _log.warning(
            "log %s is %s and may not drop its oldest segment %s (%d bytes in %d segments): needed by %s%s. "
            "Nothing was deleted that is still needed. "
            "Way out: end and acknowledge these requests, unpin, or raise the bound",
            self.directory,
            bounds,
            segments[0].name,
            report.log_bytes,
            report.segments_count,
            told,
            f" and {more} more" if more else "",
        )


def describe(holder: Holder) -> str:
    """A holder in a few words, its name printable and cut to 64 characters."""
    if holder.kind == "unseen":
        return "records that retention was not told of"
    if holder.kind == "record":
        return "a record that is held for good"
    name = holder.name if len(holder.name) <= NAME_CHARS_MAX else holder.name[:NAME_CHARS_MAX] + "..."
    return f"{holder.kind} {name!a}"
