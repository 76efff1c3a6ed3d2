"""Reading a log from its files: records in order, and one of three outcomes.

A reader takes no lock and changes nothing, so it may run beside a writer: what a write in progress
has left of its last frame is a torn tail to it, like after a crash.  One segment is in memory at a
time.  `END` and `TORN_TAIL` are outcomes; corruption is an error, raised after every good record
before it was handed out.

Invariants:
1. A yielded record is exactly what was appended under its lsn, and lsns come without a gap.

See: docs/formats/wal.md, "A record is valid iff".
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from wal import format as fmt
from wal.errors import CorruptError, storage_error
from wal.segments import Segment, Tear, check_header, find_segments, judge, torn_header
from wal.storage import OsStorage, Storage


class Record(NamedTuple):
    """One record and where it lies.  `offset`: bytes from the start of the file named `segment`."""

    lsn: int
    kind: int
    payload: bytes
    segment: str
    offset: int


class Outcome(enum.Enum):
    """How a log ended."""

    END = "end"
    TORN_TAIL = "torn tail"


class Reader:
    """One pass over a log directory; iterate once, then look at `outcome`.

    Records of lsn <= `after_lsn` are skipped; segments that hold only such records are not read,
    hence not checked.  Raises CorruptError, VersionError or StorageError while iterating.
    """

    def __init__(self, directory: Path, *, after_lsn: int = 0, storage: Storage | None = None) -> None:
        self._directory = Path(directory)
        self._storage: Storage = storage or OsStorage()
        self._after_lsn = after_lsn
        self.outcome: Outcome | None = None
        """None until the last record was handed out."""
        self.tear: Tear | None = None
        self.next_lsn = 1
        self.records_count = 0
        """Records handed out."""
        self.segments: list[Segment] = []
        self.header: fmt.SegmentHeader | None = None
        """Of the newest whole segment; None in an empty log."""
        self.end_offset = 0
        """Where the next frame belongs in the newest whole segment."""
        self.group_offset = 0
        """Where the newest write that may not have been synced starts in it."""

    def __iter__(self) -> Iterator[Record]:
        try:
            self.segments = find_segments(self._storage, self._directory)
        except OSError as error:
            raise storage_error(self._directory, "list", error) from error
        last = len(self.segments) - 1
        for index, segment in enumerate(self.segments):
            if index < last and self.segments[index + 1].first_lsn <= self._after_lsn + 1:
                self.next_lsn = self.segments[index + 1].first_lsn
                continue
            yield from self._walk(segment, index == last)
        self.outcome = Outcome.TORN_TAIL if self.tear else Outcome.END

    def _walk(self, segment: Segment, is_newest: bool) -> Iterator[Record]:
        path = self._directory / segment.name
        try:
            data = self._storage.read(path)
        except OSError as error:
            raise storage_error(path, "read", error) from error
        if segment.first_lsn != self.next_lsn:
            why = f"it starts at lsn {segment.first_lsn}, but the segment before it ends with lsn {self.next_lsn - 1}"
            raise CorruptError(self._directory, segment.name, 0, why)
        if is_newest:
            self.tear = torn_header(segment, data)
            if self.tear:
                self.next_lsn = segment.first_lsn
                return
        header = check_header(self._directory, segment, data, self.header.log_id if self.header else None)
        self.header, self.next_lsn = header, header.first_lsn
        yield from self._frames(segment, data, header.seed)
        if self.end_offset < len(data):
            self.tear = judge(self._directory, segment, data, self.end_offset, self.next_lsn, header.seed, is_newest)

    def _frames(self, segment: Segment, data: bytes, seed: int) -> Iterator[Record]:
        """Yield valid frames in lsn order; stops at the first that is not (this loop is the hot path)."""
        view, size, name, after_lsn = memoryview(data), len(data), segment.name, self._after_lsn
        unpack, mark = fmt.FRAME.unpack_from, fmt.MARK
        offset, lsn = fmt.HEADER_BYTES, segment.first_lsn
        self.end_offset = self.group_offset = offset
        while offset + fmt.FRAME_BYTES <= size:
            crc, length, found_lsn, lag, kind, found_mark = unpack(data, offset)
            start = offset + fmt.FRAME_BYTES
            end = start + length + (-length & 7)
            if found_lsn != lsn or found_mark != mark or end > size or lag >= lsn or not kind:
                return
            if crc32(view[offset + 4 : end], seed) != crc:
                return
            if not lag:
                self.group_offset = offset
            self.next_lsn, self.end_offset = lsn + 1, end
            if lsn > after_lsn:
                self.records_count += 1
                yield Record(lsn, kind, data[start : start + length], name, offset)
            offset, lsn = end, lsn + 1


def read(directory: Path, *, after_lsn: int = 0) -> Iterator[Record]:
    """The records of a log after `after_lsn`, in order; needs no lock, changes nothing.

    A torn tail ends the iteration silently (use `Reader` to learn of it).  Raises CorruptError
    after the good records before the damage, StorageError if a file cannot be read.
    """
    return iter(Reader(directory, after_lsn=after_lsn))
