"""The byte table of a segment: its header, its frames, its name; encode and decode, nothing else.

Integers are little endian; a frame starts at a multiple of 8 bytes and is padded with zeros.

    segment header, 48 bytes                      frame, 24 bytes + payload + padding
     0  8  magic  89 57 41 4C 0D 0A 1A 0A          0  4  crc32 of bytes 4 .. end of padding, seeded
     8  2  format version (1)                      4  4  payload size n
    10  2  zero                                    8  8  lsn (>= 1)
    12  4  epoch                                  16  4  lag: lsn - 1 - newest lsn known durable
    16 16  log id                                 20  1  kind (1 .. 255)
    32  8  lsn of the first frame                 21  3  mark  F7 1E A1
    40  4  zero                                   24  n  payload, then 0 .. 7 zero bytes
    44  4  crc32 of bytes 0 .. 43

The crc of a frame starts from crc32(log id), so a frame of another log is never valid here.  The
lag is what lets recovery tell a lost unsynced write from the loss of something acknowledged.

See: docs/formats/wal.md.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from isal import isal_zlib

crc32 = isal_zlib.crc32
"""zlib's crc32 to the bit, four to twenty times as fast from 6 KB on (benchmarks/log_append.py)."""

MAGIC = b"\x89WAL\r\n\x1a\n"
FORMAT_VERSION = 1
MARK = b"\xf7\x1e\xa1"  # 0xF7 never occurs in UTF-8, so text does not look like a frame
MARK_OFFSET = 21
HEADER_BYTES = 48
FRAME_BYTES = 24
ALIGNMENT_BYTES = 8
PAYLOAD_BYTES_LIMIT = (1 << 32) - 64
KIND_MAX = 255

_HEADER = struct.Struct("<8sHHI16sQI")
_CRC = struct.Struct("<I")
FRAME = struct.Struct("<IIQIB3s")
_FRAME_TAIL = struct.Struct("<IQIB3s")
_PADDING = tuple(bytes(count) for count in range(ALIGNMENT_BYTES))
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{8})\.wal")
_LOCK_NAME = re.compile(r"([0-9a-f]{8})\.lock")
EPOCH_MAX = (1 << 32) - 1


class SegmentHeader(NamedTuple):
    """What the first 48 bytes of a segment say."""

    log_id: bytes
    first_lsn: int
    epoch: int
    version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The file name: first lsn and epoch in hex, so names sort in log order."""
        return f"{self.first_lsn:016x}-{self.epoch:08x}.wal"

    @property
    def seed(self) -> int:
        """Start value of every frame's crc32 in this log."""
        return crc32(self.log_id)


class Frame(NamedTuple):
    """A valid frame; `end` is the offset after its padding, `durable_lsn` what the writer knew to be synced."""

    lsn: int
    durable_lsn: int
    kind: int
    payload: bytes
    end: int


def parse_name(name: str) -> tuple[int, int] | None:
    """(first lsn, epoch) of a segment's file name, or None if this is not such a name."""
    match = _NAME.fullmatch(name)
    return (int(match[1], 16), int(match[2], 16)) if match else None


def lock_name(epoch: int) -> str:
    """The file name of the lock that a writer of this epoch holds."""
    return f"{epoch:08x}.lock"


def parse_lock_name(name: str) -> int | None:
    """The epoch of a lock's file name, or None if this is not such a name."""
    match = _LOCK_NAME.fullmatch(name)
    return int(match[1], 16) if match else None


def encode_header(header: SegmentHeader) -> bytes:
    """The 48 bytes of a segment header."""
    head = _HEADER.pack(MAGIC, header.version, 0, header.epoch, header.log_id, header.first_lsn, 0)
    return head + _CRC.pack(crc32(head))


def decode_header(data: bytes) -> SegmentHeader | None:
    """The header, of whatever version, if magic and checksum hold; else None."""
    if len(data) < HEADER_BYTES or crc32(data[:44]) != _CRC.unpack_from(data, 44)[0]:
        return None
    magic, version, _, epoch, log_id, first_lsn, _ = _HEADER.unpack_from(data)
    return SegmentHeader(log_id, first_lsn, epoch, version) if magic == MAGIC else None


def encode_frame(seed: int, lsn: int, lag: int, kind: int, payload: bytes) -> bytes:
    """One frame with its padding.  The caller keeps the bounds of the table."""
    size = len(payload)
    rest = _FRAME_TAIL.pack(size, lsn, lag, kind, MARK) + payload + _PADDING[-size & 7]
    return crc32(rest, seed).to_bytes(4, "little") + rest


def frame_bytes(payload_bytes: int) -> int:
    """Size of a frame on disk."""
    return FRAME_BYTES + payload_bytes + (-payload_bytes & 7)


def decode_frame(data: bytes, offset: int, seed: int) -> Frame | None:
    """The frame at `offset` if it is valid by the document's rule, whatever its lsn; else None."""
    if offset + FRAME_BYTES > len(data):
        return None
    crc, size, lsn, lag, kind, mark = FRAME.unpack_from(data, offset)
    end = offset + frame_bytes(size)
    if mark != MARK or end > len(data) or lag >= lsn or kind == 0:
        return None
    if crc32(memoryview(data)[offset + 4 : end], seed) != crc:
        return None
    start = offset + FRAME_BYTES
    return Frame(lsn, lsn - 1 - lag, kind, data[start : start + size], end)
