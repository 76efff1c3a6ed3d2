"""Which files are the log, and what a bad frame in one of them means.

`judge` is the recovery decision table of the format document, one branch a row.  The question it
answers is "can a writer that stopped in the middle of an unsynced write have left this?"  Only then
may the bytes be dropped; everything else was durable once, and its damage is an error.

Invariants:
1. Only the newest segment can have a torn tail: a segment is synced whole before the next is named.
2. A tail is dropped only if no valid frame behind it proves that something in it was acknowledged.
3. What a writer of a lower epoch writes after a takeover is not part of the log.

See: docs/formats/wal.md, "Recovery".
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from wal import format as fmt
from wal.errors import CorruptError, VersionError
from wal.floor import FIRST_LSN, floor_name, floor_of
from wal.storage import Storage

SECTOR_BYTES = 512
QUARANTINE = "quarantine"
"""The folder of a log directory where repairs keep what they cut off."""


class Segment(NamedTuple):
    """A segment file as its name describes it."""

    name: str
    first_lsn: int
    epoch: int


class Tear(NamedTuple):
    """Bytes at the end of the newest segment that no acknowledged record needs; space never written is not counted."""

    segment: str
    offset: int
    size_bytes: int
    why: str


def is_log_file(name: str) -> bool:
    """True for the names that a log makes in its directory."""
    return name == QUARANTINE or name.endswith((".wal", ".lock", ".floor", ".pin", ".tmp"))


def find_segments(storage: Storage, directory: Path) -> list[Segment]:
    """The segments in log order, those below the floor and those that a takeover superseded left out.

    Raises CorruptError if the first ones are missing: a log begins at its floor, lsn 1 if it has
    none.  Other files (locks, pins, quarantine, leftovers of an interrupted creation) are not the
    log's content.  A retention pass beside the call may change the directory under the listing, so
    missing segments are believed only when a second listing shows the same.
    """
    names = storage.names(directory)
    while True:
        try:
            return _in_force(_from_floor(directory, names))
        except CorruptError:
            before, names = names, storage.names(directory)
            if names == before:
                raise


def _from_floor(directory: Path, names: list[str]) -> list[Segment]:
    """Every segment file from the floor on, by first lsn and epoch.  CorruptError if none starts at the floor."""
    floor = floor_of(names)
    parsed = [(name, fmt.parse_name(name)) for name in names]
    found = [Segment(name, *fields) for name, fields in parsed if fields and fields[0] >= floor]
    found.sort(key=lambda segment: (segment.first_lsn, segment.epoch))
    if found and found[0].first_lsn != floor:
        begins = f" and the floor is {floor}" if floor > FIRST_LSN else ""
        why = f"it is the first segment but starts at lsn {found[0].first_lsn}{begins}: earlier segments are missing"
        raise CorruptError(directory, found[0].name, 0, why)
    if not found and floor > FIRST_LSN:
        why = "it says where the log begins, and no segment starts there or later: segments are missing"
        raise CorruptError(directory, floor_name(floor), 0, why)
    return found


def _in_force(found: list[Segment]) -> list[Segment]:
    """Without what a fenced writer left: where a higher epoch starts, every lower one is over."""
    kept: list[Segment] = []
    for segment in found:
        if kept and kept[-1].first_lsn == segment.first_lsn:
            kept.pop()
        if not kept or kept[-1].epoch <= segment.epoch:
            kept.append(segment)
    return kept


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


def torn_header(segment: Segment, head: bytes) -> Tear:
    """The tear of a newest segment that holds no whole header, or zeros only."""
    if len(head) < fmt.HEADER_BYTES:
        return Tear(segment.name, 0, len(head), f"the file ends after {len(head)} bytes of its header")
    return Tear(segment.name, 0, 0, "the file is filled with zeros")


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
    used = -(-len(data.rstrip(b"\0")) // fmt.ALIGNMENT_BYTES) * fmt.ALIGNMENT_BYTES
    tear = Tear(segment.name, offset, min(used, len(data)) - offset, why)
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
