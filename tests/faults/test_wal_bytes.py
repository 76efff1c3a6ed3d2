"""A log cut, or damaged, at every byte."""

import shutil
from pathlib import Path

import pytest

from wal import CorruptError, Log, Outcome, Reader, Record, read

PAYLOADS = [b"", b"a", b"seven b", b"eight by", b"x" * 61, b"\0" * 40, b"last"]


@pytest.fixture
def small_log(tmp_path: Path) -> Path:
    """Two segments: four records in the first, three in the second."""
    directory = tmp_path / "log"
    with Log.open(directory, segment_bytes_max=232) as log:
        for index, payload in enumerate(PAYLOADS):
            log.append(1 + index, payload)
            if index % 2:
                log.sync()
    assert len(list(directory.glob("*.wal"))) == 2
    return directory


def contents(records: list[Record]) -> list[tuple[int, int, bytes]]:
    return [(record.lsn, record.kind, record.payload) for record in records]


WHOLE = [(index + 1, index + 1, payload) for index, payload in enumerate(PAYLOADS)]


def test_a_log_cut_at_any_byte_gives_a_prefix_and_goes_on(small_log: Path, tmp_path: Path) -> None:
    """The newest segment is cut at every byte, its header included; older ones are whole."""
    newest = max(small_log.glob("*.wal"))
    data = newest.read_bytes()
    first = int(newest.name[:16], 16)
    starts = [record.offset for record in read(small_log) if record.segment == newest.name]
    ends = {*starts[1:], len(data)}
    for size in range(len(data)):
        copy = tmp_path / "copy"
        shutil.copytree(small_log, copy)
        (copy / newest.name).write_bytes(data[:size])
        kept = first - 1 + sum(end <= size for end in ends)
        border = max((end for end in ends if end <= size), default=48)
        is_whole = size >= 48 and not data[border:size].strip(b"\0")  # a frame may begin with a zero
        reader = Reader(copy)
        assert contents(list(reader)) == WHOLE[:kept]
        assert reader.outcome is (Outcome.END if is_whole else Outcome.TORN_TAIL)
        with Log.open(copy) as log:
            assert log.recovery.records_count == kept
            assert (log.recovery.torn_bytes == 0) == (is_whole or size == 0)
            assert log.append(9, b"after the repair") == kept + 1
        after = Reader(copy)
        assert contents(list(after)) == [*WHOLE[:kept], (kept + 1, 9, b"after the repair")]
        assert after.outcome is Outcome.END
        shutil.rmtree(copy)


def test_an_older_segment_cut_at_any_byte_is_corrupt(small_log: Path) -> None:
    oldest = min(small_log.glob("*.wal"))
    data = oldest.read_bytes()
    borders = {record.offset for record in read(small_log) if record.segment == oldest.name}
    for size in range(len(data)):
        oldest.write_bytes(data[:size])
        # Cut between two frames (or behind zeros that one begins with), it is the next segment that shows the gap.
        border = max((border for border in borders if border <= size), default=0)
        is_between = border and not data[border:size].strip(b"\0")
        named = "starts at lsn 5, but the segment before it ends" if is_between else oldest.name
        with pytest.raises(CorruptError, match=named):
            list(Reader(small_log))
        with pytest.raises(CorruptError, match=named):
            Log.open(small_log)


def damage_found(directory: Path) -> tuple[list[tuple[int, int, bytes]], CorruptError | None]:
    """The records up to the damage, and the damage unless it counts as a torn tail."""
    records = iter(Reader(directory))
    seen: list[Record] = []
    while True:
        try:
            record = next(records, None)
        except CorruptError as error:
            return contents(seen), error
        if record is None:
            return contents(seen), None
        seen.append(record)


def test_a_bit_flipped_at_any_byte_never_gives_a_wrong_record(small_log: Path) -> None:
    """Every bit of both segments; only a flip in the very last frame counts as a torn tail."""
    for path in sorted(small_log.glob("*.wal")):
        data = path.read_bytes()
        last_frame = max(record.offset for record in read(small_log) if record.segment == path.name)
        is_newest = path == max(small_log.glob("*.wal"))
        for offset in range(len(data)):
            for bit in range(8):
                changed = bytearray(data)
                changed[offset] ^= 1 << bit
                path.write_bytes(changed)
                seen, error = damage_found(small_log)
                assert seen == WHOLE[: len(seen)]
                assert len(seen) < len(WHOLE)
                assert (error is None) == (is_newest and offset >= last_frame)
                assert error is None or error.segment == path.name
        path.write_bytes(data)


def test_a_file_extended_with_zeros_at_any_size_loses_nothing(small_log: Path) -> None:
    newest = max(small_log.glob("*.wal"))
    data = newest.read_bytes()
    for zeros in range(1, 100):
        newest.write_bytes(data + bytes(zeros))
        reader = Reader(small_log)
        assert contents(list(reader)) == WHOLE
        assert reader.outcome is Outcome.END
