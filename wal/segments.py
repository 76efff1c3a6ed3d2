"""Which files are the log, and what a bad frame in one of them means.

`judge` is the recovery decision table of the format document, one branch a row.  The question it
answers is "can a writer that stopped in the middle of an unsynced write have left this?"  Only then
may the bytes be dropped; everything else was durable once, and its damage is an error.

Invariants:
1. Only the newest segment can have a torn tail: a segment is synced whole before the next is named.
2. A tail is dropped only if no valid frame behind it proves that something in it was acknowledged.

See: docs/formats/wal.md, "Recovery".
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from wal import format as fmt
from wal.errors import CorruptError, VersionError
from wal.storage import Storage

SECTOR_BYTES = 512


class Segment(NamedTuple):
    """A segment file as its name describes it."""

    name: str
    first_lsn: int
    epoch: int


class Tear(NamedTuple):
    """Bytes at the end of the newest segment that no acknowledged record needs."""

    segment: str
    offset: int
    size_bytes: int
    why: str


def find_segments(storage: Storage, directory: Path) -> list[Segment]:
    """The segments in log order.

    Raises CorruptError if the first ones are missing or two start at the same lsn.  Other files
    (LOCK, quarantine, leftovers of an interrupted creation) are not the log's content.
    """
    found = []
    for name in storage.names(directory):
        parsed = fmt.parse_name(name)
        if parsed is not None:
            found.append(Segment(name, *parsed))
    found.sort(key=lambda segment: (segment.first_lsn, segment.epoch))
    if found and found[0].first_lsn != 1:
        why = f"it is the first segment but starts at lsn {found[0].first_lsn}: earlier segments are missing"
        raise CorruptError(directory, found[0].name, 0, why)
    for before, after in itertools.pairwise(found):
        if before.first_lsn == after.first_lsn:
            raise CorruptError(directory, after.name, 0, f"{before.name} starts at the same lsn")
    return found


def check_header(directory: Path, segment: Segment, data: bytes, log_id: bytes | None) -> fmt.SegmentHeader:
    """The header of a segment; CorruptError or VersionError if it is not this log's."""
    header = fmt.decode_header(data)
    if header is None:
        raise CorruptError(directory, segment.name, 0, "the segment header fails its checksum")
    if header.version != fmt.FORMAT_VERSION:
        raise VersionError(directory / segment.name, header.version, fmt.FORMAT_VERSION)
    if (header.first_lsn, header.epoch) != (segment.first_lsn, segment.epoch):
        raise CorruptError(directory, segment.name, 0, f"its header belongs to a segment named {header.name}")
    if log_id is not None and header.log_id != log_id:
        raise CorruptError(directory, segment.name, 16, "it belongs to another log than the segment before it")
    return header


def torn_header(segment: Segment, data: bytes) -> Tear | None:
    """The tear if the newest segment holds no whole header and nothing behind it, else None."""
    if len(data) < fmt.HEADER_BYTES:
        return Tear(segment.name, 0, len(data), f"the file ends after {len(data)} bytes of its header")
    if not data.strip(b"\0"):
        return Tear(segment.name, 0, len(data), "the file is filled with zeros")
    return None


def judge(directory: Path, segment: Segment, data: bytes, offset: int, lsn: int, seed: int, is_newest: bool) -> Tear:
    """The tear that starts at `offset`, where the frame of `lsn` should be and is not valid.

    Raises CorruptError where the decision table says so.
    """
    why = defect(data, offset, lsn, seed)
    if not is_newest:
        raise CorruptError(directory, segment.name, offset, f"{why}, and newer segments follow")
    here = fmt.decode_frame(data, offset, seed)
    if here is not None:
        raise CorruptError(directory, segment.name, offset, why)
    tear = Tear(segment.name, offset, len(data) - offset, why)
    next_offset, next_lsn, durable_lsn = frames_behind(data, offset, lsn, seed)
    if next_offset is None:
        return tear
    if durable_lsn >= lsn:
        behind = f"a frame behind it proves that lsn {durable_lsn} was durable"
        raise CorruptError(directory, segment.name, offset, f"{why}, but {behind}")
    if has_lost_sector(data, offset, next_offset):
        return tear
    raise CorruptError(
        directory, segment.name, offset, f"{why}, but lsn {next_lsn} at {next_offset} behind it is valid"
    )


def defect(data: bytes, offset: int, lsn: int, seed: int) -> str:
    """Why there is no valid frame of `lsn` at `offset`, in words."""
    left = len(data) - offset
    if not data[offset:].strip(b"\0"):
        return f"the last {left} bytes are zeros where lsn {lsn} should start"
    if left < fmt.FRAME_BYTES:
        return f"{left} bytes are left where the {fmt.FRAME_BYTES} bytes of lsn {lsn}'s frame header should be"
    frame = fmt.decode_frame(data, offset, seed)
    if frame is not None:
        return f"lsn {frame.lsn} stands where lsn {lsn} should be"
    _, size, found_lsn, _, _, mark = fmt.FRAME.unpack_from(data, offset)
    if mark != fmt.MARK or found_lsn != lsn:
        return f"there is no frame header where lsn {lsn} should start"
    if fmt.frame_bytes(size) > left:
        return f"the frame of lsn {lsn} needs {fmt.frame_bytes(size)} bytes and {left} are left"
    return f"the frame of lsn {lsn} fails its checksum"


def frames_behind(data: bytes, offset: int, lsn: int, seed: int) -> tuple[int | None, int, int]:
    """(offset of the first valid frame of a newer lsn behind `offset` or None, its lsn, newest durable lsn told)."""
    lsn_max = lsn + (len(data) - offset) // fmt.FRAME_BYTES
    first_offset, first_lsn, durable_lsn = None, 0, 0
    mark_at = data.find(fmt.MARK, offset + fmt.ALIGNMENT_BYTES + fmt.MARK_OFFSET)
    while mark_at >= 0:
        at = mark_at - fmt.MARK_OFFSET
        next_search = mark_at + 1
        if at % fmt.ALIGNMENT_BYTES == 0 and lsn < fmt.FRAME.unpack_from(data, at)[2] <= lsn_max:
            frame = fmt.decode_frame(data, at, seed)
            if frame is not None:
                if first_offset is None:
                    first_offset, first_lsn = at, frame.lsn
                durable_lsn = max(durable_lsn, frame.durable_lsn)
                next_search = frame.end
        mark_at = data.find(fmt.MARK, next_search)
    return first_offset, first_lsn, durable_lsn


def has_lost_sector(data: bytes, start: int, end: int) -> bool:
    """True if a disk sector between the two offsets reads as zeros: it was never written.

    A sector is written whole or not at all, so a write that was cut short by a power loss leaves
    zeros up to a sector's border.  Damage to written bytes does not look so.
    """
    at = start
    while True:
        border = at - at % SECTOR_BYTES + SECTOR_BYTES
        if border > end:
            return False
        if not data[at:border].strip(b"\0"):
            return True
        at = border
