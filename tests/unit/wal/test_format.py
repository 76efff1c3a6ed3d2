"""The byte table of docs/formats/wal.md, checked against the code."""

import re
import struct
import zlib
from pathlib import Path

import pytest

from wal import format as fmt
from wal import tokens

HEADER = fmt.SegmentHeader(log_id=bytes(range(16)), first_lsn=7, epoch=3)


def test_a_segment_header_has_the_bytes_of_the_table() -> None:
    data = fmt.encode_header(HEADER)
    assert len(data) == 48
    assert data[:8] == b"\x89WAL\r\n\x1a\n"
    assert struct.unpack_from("<HHI", data, 8) == (1, 0, 3)
    assert data[16:32] == bytes(range(16))
    assert struct.unpack_from("<QI", data, 32) == (7, 0)
    assert struct.unpack_from("<I", data, 44) == (zlib.crc32(data[:44]),)


def test_a_frame_has_the_bytes_of_the_table() -> None:
    data = fmt.encode_frame(HEADER.seed, 9, 1, 2, b"hello")
    assert len(data) == 32
    assert struct.unpack_from("<IQIB", data, 4) == (5, 9, 1, 2)
    assert data[21:24] == b"\xf7\x1e\xa1"
    assert data[24:] == b"hello\0\0\0"
    assert struct.unpack_from("<I", data) == (zlib.crc32(data[4:], zlib.crc32(bytes(range(16)))),)


def test_a_header_is_read_back() -> None:
    assert fmt.decode_header(fmt.encode_header(HEADER)) == HEADER


@pytest.mark.parametrize("offset", range(48))
def test_a_header_with_any_byte_changed_is_no_header(offset: int) -> None:
    data = bytearray(fmt.encode_header(HEADER))
    data[offset] ^= 1
    assert fmt.decode_header(bytes(data)) is None


def test_a_header_with_another_magic_is_no_header_even_with_a_good_checksum() -> None:
    data = b"\x89LOG\r\n\x1a\n" + fmt.encode_header(HEADER)[8:44]
    assert fmt.decode_header(data + struct.pack("<I", zlib.crc32(data))) is None


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_a_frame_is_read_back_and_ends_at_a_multiple_of_eight(size: int) -> None:
    data = fmt.encode_frame(HEADER.seed, 5, 2, 255, b"x" * size)
    assert fmt.decode_frame(b"before.." + data, 8, HEADER.seed) == fmt.Frame(5, 2, 255, b"x" * size, 8 + len(data))
    assert len(data) == fmt.frame_bytes(size)
    assert len(data) % 8 == 0


def test_a_frame_of_another_log_is_not_valid() -> None:
    data = fmt.encode_frame(HEADER.seed, 5, 2, 1, b"x")
    other = fmt.SegmentHeader(bytes(16), 1, 0)
    assert fmt.decode_frame(data, 0, other.seed) is None


def test_a_frame_that_is_cut_is_not_valid_at_any_length() -> None:
    data = fmt.encode_frame(HEADER.seed, 5, 2, 1, b"0123456789")
    assert [fmt.decode_frame(data[:end], 0, HEADER.seed) for end in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize(("kind", "lag"), [(0, 0), (1, 5), (1, 9)])
def test_kind_zero_and_an_impossible_lag_are_not_valid(kind: int, lag: int) -> None:
    assert fmt.decode_frame(fmt.encode_frame(1, 5, lag, kind, b""), 0, 1) is None


def test_zeros_are_not_a_frame() -> None:
    assert fmt.decode_frame(bytes(4096), 48, 0) is None


def test_names_sort_in_log_order_and_are_parsed_back() -> None:
    names = [fmt.SegmentHeader(b"", lsn, epoch).name for lsn, epoch in [(1, 0), (9, 0), (16, 1), (16, 2), (1 << 40, 0)]]
    assert names == sorted(names)
    assert fmt.parse_name(names[3]) == (16, 2)


@pytest.mark.parametrize("name", ["LOCK", "1-1.wal", "0000000000000001-00000000.wal.tmp", "quarantine"])
def test_other_files_are_not_segments(name: str) -> None:
    assert fmt.parse_name(name) is None


def test_the_worked_example_of_the_document_is_what_the_code_writes() -> None:
    document = (Path(__file__).parents[3] / "docs" / "formats" / "wal.md").read_text()
    rows = re.findall(r"^00[0-9a-f]{2}  ((?:[0-9a-f]{2} )+) ", document, re.MULTILINE)
    header = fmt.SegmentHeader(bytes(range(16)), 1, 0)
    record = tokens.TokensAppended("r1", 0, (5, 6), (-0.5, -1.0), 3)
    written = fmt.encode_header(header)
    written += fmt.encode_frame(header.seed, 1, 0, 2, b"hello")
    written += fmt.encode_frame(header.seed, 2, 1, 1, tokens.encode(record))
    assert bytes.fromhex("".join(rows)) == written
