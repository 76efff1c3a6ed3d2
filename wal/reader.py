"""Reading a log from its files: records in order, and one of three outcomes.

A reader takes no lock and changes nothing, so it may run beside a writer: what a write in progress
has left of its last frame is a torn tail to it, like after a crash.  Files are read in pieces, so
memory is bounded by the largest record.  `END` and `TORN_TAIL` are outcomes; corruption is an
error, raised after every good record before it was handed out.

Invariants:
1. A yielded record is exactly what was appended under its lsn, and lsns come without a gap.

See: docs/formats/wal.md, "A record is valid iff".
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wal import format as fmt
from wal.errors import CorruptError, storage_error
from wal.floor import read_error
from wal.segments import Segment, Tear, check_header, find_segments, judge, torn_header
from wal.storage import OsStorage, Storage

READ_BYTES = 1 << 20
"""Size of a piece; a record above it makes the buffer grow."""


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
    hence not checked.  Raises CorruptError, VersionError or StorageError while iterating, and
    DroppedError if retention drops the segment that is to be read next (pin it to prevent that).
    """

    def __init__(self, directory: Path, *, after_lsn: int = 0, storage: Storage | None = None) -> None:
        self._directory = Path(directory)
        self._storage: Storage = storage or OsStorage()
        self._after_lsn = after_lsn
        self._buffer = bytearray(READ_BYTES)
        self.outcome: Outcome | None = None
        """None until the last record was handed out."""
        self.tear: Tear | None = None
        self.next_lsn = 1
        self.durable_lsn = 0
        """What the writer of the newest record knew to be durable when it wrote it; more may be."""
        self.records_count = 0
        """Records handed out."""
        self.segments: list[Segment] = []
        self.header: fmt.SegmentHeader | None = None
        """Of the newest whole segment; None in an empty log."""
        self.end_offset = 0
        """Where the next frame belongs in the newest whole segment."""
        self._marks: list[tuple[int, int]] = []
        """(lsn, offset) of the first frame in each piece of it that was read."""

    def __iter__(self) -> Iterator[Record]:
        try:
            self.segments = find_segments(self._storage, self._directory)
        except OSError as error:
            raise storage_error(self._directory, "list", error) from error
        if self.segments:
            self.next_lsn = self.segments[0].first_lsn  # the floor
        for segment, following in itertools.zip_longest(self.segments, self.segments[1:]):
            if following is not None and following.first_lsn <= self._after_lsn + 1:
                self.next_lsn = following.first_lsn
                continue
            try:
                yield from self._walk(segment, following)
            except OSError as error:
                path = self._directory / segment.name
                raise read_error(self._storage, path, segment.first_lsn, error) from error
        self.outcome = Outcome.TORN_TAIL if self.tear else Outcome.END

    def _walk(self, segment: Segment, following: Segment | None) -> Iterator[Record]:
        if segment.first_lsn != self.next_lsn:
            why = f"it starts at lsn {segment.first_lsn}, but the segment before it ends with lsn {self.next_lsn - 1}"
            raise CorruptError(self._directory, segment.name, 0, why)
        path = self._directory / segment.name
        filled = self._storage.read_into(path, 0, memoryview(self._buffer))
        head = bytes(self._buffer[: min(filled, fmt.HEADER_BYTES)])
        if following is None and (len(head) < fmt.HEADER_BYTES or (not head.strip(b"\0") and self._is_unused(path, 0))):
            self.tear = torn_header(segment, head)
            return
        header = check_header(self._directory, segment, head, self.header.log_id if self.header else None)
        self.header = header
        taken_over = following is not None and following.epoch > segment.epoch
        yield from self._frames(segment, header.seed, filled, following.first_lsn if following and taken_over else 0)
        if taken_over and following and self.next_lsn == following.first_lsn:
            return  # what lies behind was written by a fenced writer
        self.tear = self._verdict(segment, header.seed, following is None)

    def _verdict(self, segment: Segment, seed: int, is_newest: bool) -> Tear | None:
        """What stands behind the last frame that was read.  CorruptError.

        The newest segment may be growing: a frame that is there by now was not there when this reader
        came by, and damage is believed only if two looks show the same bytes.
        """
        path, seen = self._directory / segment.name, b""
        while not self._is_unused(path, self.end_offset):
            data = self._storage.read(path)
            frame = fmt.decode_frame(data, self.end_offset, seed)
            if is_newest and frame is not None and frame.lsn == self.next_lsn:
                break
            try:
                return judge(self._directory, segment, data, self.end_offset, self.next_lsn, seed, is_newest)
            except CorruptError:
                if not is_newest or data == seen:
                    raise
            seen = data
        return None

    def _frames(self, segment: Segment, seed: int, filled: int, end_lsn: int) -> Iterator[Record]:
        """Yield valid frames in lsn order up to `end_lsn`; stops at the first that is not (this is the hot path)."""
        name, after_lsn, crc32, new = segment.name, self._after_lsn, fmt.crc32, tuple.__new__
        unpack, mark, head_bytes = fmt.FRAME.unpack_from, fmt.MARK, fmt.FRAME_BYTES
        buffer, base, start, lsn, lag = self._buffer, 0, fmt.HEADER_BYTES, segment.first_lsn, 0
        view = memoryview(buffer)
        self._marks = [(lsn, start)]
        try:
            while lsn != end_lsn:
                body = end = start + head_bytes
                if body <= filled:
                    crc, length, found_lsn, found_lag, kind, found_mark = unpack(buffer, start)
                    if found_lsn != lsn or found_mark != mark or found_lag >= lsn or not kind:
                        return
                    end += length + (-length & 7)
                if end > filled:
                    rest = filled - start
                    filled = self._refill(segment, base, start, filled)
                    base, start, buffer = base + start, 0, self._buffer
                    self._marks.append((lsn, base))
                    view = memoryview(buffer)
                    if filled == rest:
                        return
                    continue
                if crc32(view[start + 4 : end], seed) != crc:
                    return
                at, start, lag, lsn = base + start, end, found_lag, lsn + 1
                if found_lsn > after_lsn:
                    yield new(Record, (found_lsn, kind, view[body : body + length].tobytes(), name, at))
        finally:
            self.next_lsn, self.end_offset = lsn, base + start
            if lsn > segment.first_lsn:
                self.durable_lsn = lsn - 2 - lag
            self.records_count += max(0, lsn - max(segment.first_lsn, after_lsn + 1))

    def offset_behind(self, path: Path, lsn: int) -> int:
        """Where the frames behind that of `lsn` start in the newest whole segment, at `path`; after the last record."""
        at = max(0, sum(first <= lsn + 1 for first, _ in self._marks) - 1)
        next_lsn, offset = self._marks[at]
        end = self._marks[at + 1][1] if at + 1 < len(self._marks) else self.end_offset
        piece = bytearray(end - offset)
        self._storage.read_into(path, offset, memoryview(piece))
        base = offset
        for _ in range(lsn - next_lsn + 1):
            offset += fmt.frame_bytes(fmt.FRAME.unpack_from(piece, offset - base)[1])
        return offset

    def _is_unused(self, path: Path, offset: int) -> bool:
        """True if only zeros follow: space that was reserved and never written (or nothing at all)."""
        piece = bytearray(READ_BYTES)
        while count := self._storage.read_into(path, offset, memoryview(piece)):
            if bytes(piece[:count]).strip(b"\0"):
                return False
            offset += count
        return True

    def _refill(self, segment: Segment, base: int, start: int, filled: int) -> int:
        """Move what is left to the front and read on behind it; returns how much is in the buffer then."""
        rest = filled - start
        if rest == len(self._buffer):  # one record fills it
            self._buffer = self._buffer + bytearray(rest)
        else:
            self._buffer[:rest] = self._buffer[start:filled]
        room = memoryview(self._buffer)[rest:]
        return rest + self._storage.read_into(self._directory / segment.name, base + start + rest, room)


def read(directory: Path, *, after_lsn: int = 0) -> Iterator[Record]:
    """The records of a log after `after_lsn`, in order; needs no lock, changes nothing.

    A torn tail ends the iteration silently (use `Reader` to learn of it).  Raises CorruptError
    after the good records before the damage, StorageError if a file cannot be read.
    """
    return iter(Reader(directory, after_lsn=after_lsn))
