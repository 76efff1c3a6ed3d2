"""Three outcomes: end, torn tail, corruption.  One test a row of the recovery decision table."""

import errno
from pathlib import Path

import pytest

from wal import CorruptError, Log, Outcome, Reader, Record, StorageError, VersionError, is_log_file, read
from wal import format as fmt
from wal.testing import FaultyStorage

DIRECTORY = Path("/log")
HEADER = fmt.SegmentHeader(bytes(range(16)), 1, 0)


def segment(*frames: bytes, header: fmt.SegmentHeader = HEADER) -> tuple[str, bytes]:
    return header.name, fmt.encode_header(header) + b"".join(frames)


def frame(lsn: int, payload: bytes = b"payload", lag: int = 0) -> bytes:
    return fmt.encode_frame(HEADER.seed, lsn, lag, 1, payload)


def damaged(data: bytes, offset: int = 24) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]


def disk_of(*files: tuple[str, bytes]) -> FaultyStorage:
    disk = FaultyStorage()
    disk.make_directory(DIRECTORY)
    for name, data in files:
        disk.create(DIRECTORY / name).write(data)
    return disk


def walk(*files: tuple[str, bytes]) -> tuple[list[int], Reader]:
    reader = Reader(DIRECTORY, storage=disk_of(*files))
    return [record.lsn for record in reader], reader


def assert_corrupt(*files: tuple[str, bytes], good: list[int], offset: int, why: str) -> None:
    """The damage is named, what comes before it is handed out first, and a writer changes nothing."""
    with pytest.raises(CorruptError, match=why) as failure:
        list(Reader(DIRECTORY, storage=disk_of(*files)))
    assert failure.value.offset == offset
    assert failure.value.segment in str(failure.value)
    disk = disk_of(*files)
    iterator = iter(Reader(DIRECTORY, storage=disk))
    assert [next(iterator).lsn for _ in good] == good
    with pytest.raises(CorruptError):
        Log.open(DIRECTORY, storage=disk)
    assert [(name, disk.read(DIRECTORY / name)) for name, _ in files] == list(files)


def assert_torn(*files: tuple[str, bytes], good: list[int], why: str) -> None:
    """The tail is told, cut by the next writer, kept aside, and appending goes on behind it."""
    lsns, reader = walk(*files)
    assert (lsns, reader.outcome) == (good, Outcome.TORN_TAIL)
    assert reader.tear is not None
    assert why in reader.tear.why
    disk = disk_of(*files)
    torn = files[-1][1][reader.tear.offset :]
    with Log.open(DIRECTORY, storage=disk) as log:
        assert log.recovery.torn_bytes == len(torn) == reader.tear.size_bytes
        if torn:
            assert log.recovery.quarantine is not None
            assert disk.read(log.recovery.quarantine) == torn
        assert log.append(1, b"next") == len(good) + 1
    again = Reader(DIRECTORY, storage=disk)
    assert [record.lsn for record in again] == [*good, len(good) + 1]
    assert again.outcome is Outcome.END


def test_a_log_that_ends_with_a_whole_frame_ended() -> None:
    lsns, reader = walk(segment(frame(1), frame(2)))
    assert (lsns, reader.outcome, reader.next_lsn, reader.tear) == ([1, 2], Outcome.END, 3, None)


def test_a_record_tells_where_it_lies() -> None:
    name, data = segment(frame(1), frame(2, b"two"))
    records = list(Reader(DIRECTORY, storage=disk_of((name, data))))
    assert records[1] == Record(2, 1, b"two", name, 48 + 32)


def test_an_empty_directory_is_an_empty_log() -> None:
    assert walk()[1].outcome is Outcome.END


def test_a_missing_directory_is_an_error_that_names_it() -> None:
    with pytest.raises(StorageError, match="cannot list /nowhere: No such file or directory"):
        list(Reader(Path("/nowhere"), storage=FaultyStorage()))


@pytest.mark.parametrize("kept", [1, 23, 24, 31])
def test_an_incomplete_last_frame_is_a_torn_tail(kept: int) -> None:
    assert_torn(segment(frame(1), frame(2)[:kept]), good=[1], why="left")


def test_a_last_frame_that_fails_its_checksum_is_a_torn_tail() -> None:
    assert_torn(segment(frame(1), damaged(frame(2))), good=[1], why="fails its checksum")


@pytest.mark.parametrize("zeros", [1, 24, 4096, 3 << 20])
def test_zeros_behind_the_last_frame_are_space_that_was_reserved_and_the_log_ended_there(zeros: int) -> None:
    files = segment(frame(1), bytes(zeros))
    lsns, reader = walk(files)
    assert (lsns, reader.outcome, reader.tear) == ([1], Outcome.END, None)
    disk = disk_of(files)
    with Log.open(DIRECTORY, storage=disk) as log:
        assert log.recovery == (1, 2, 0, None)
        assert log.append(1, b"next") == 2
    assert len(disk.read(DIRECTORY / HEADER.name)) == 48 + 32 + 32


def test_a_torn_frame_in_reserved_space_is_counted_without_the_space() -> None:
    lsns, reader = walk(segment(frame(1), frame(2, b"x" * 100)[:60], bytes(5000)))
    assert (lsns, reader.outcome) == ([1], Outcome.TORN_TAIL)
    assert reader.tear is not None
    assert reader.tear.size_bytes == 64


def test_garbage_behind_the_last_frame_is_a_torn_tail() -> None:
    assert_torn(segment(frame(1), b"\xa5" * 100), good=[1], why="no frame header")


@pytest.mark.parametrize("kept", [0, 1, 47])
def test_a_newest_segment_cut_inside_its_header_is_a_torn_tail(kept: int) -> None:
    second = segment(header=HEADER._replace(first_lsn=3))
    assert_torn(segment(frame(1), frame(2)), (second[0], second[1][:kept]), good=[1, 2], why="header")


def test_a_newest_segment_of_zeros_is_a_torn_tail_without_content() -> None:
    files = (HEADER.name, bytes(4096))
    _, reader = walk(files)
    assert reader.outcome is Outcome.TORN_TAIL
    assert reader.tear == (HEADER.name, 0, 0, "the file is filled with zeros")
    with Log.open(DIRECTORY, storage=disk_of(files)) as log:
        assert log.recovery == (0, 1, 0, None)


def test_a_newest_segment_with_a_header_of_zeros_in_front_of_frames_is_corruption() -> None:
    assert_corrupt((HEADER.name, bytes(48) + frame(1)), good=[], offset=0, why="header fails its checksum")


def test_frames_behind_a_sector_that_never_reached_the_disk_are_a_torn_tail() -> None:
    lost = frame(2, b"x" * 1500, lag=0)
    lost = lost[:100] + bytes(1300) + lost[1400:]
    assert_torn(segment(frame(1), lost, frame(3, lag=1)), good=[1], why="fails its checksum")


def test_a_lost_sector_in_front_of_a_frame_that_proves_a_sync_is_corruption() -> None:
    lost = frame(2, b"x" * 1500)
    lost = lost[:100] + bytes(1300) + lost[1400:]
    files = segment(frame(1), lost, frame(3, lag=1), frame(4, lag=1))
    assert_corrupt(files, good=[1], offset=80, why="lsn 2 was durable")


def test_a_bad_frame_in_front_of_a_valid_one_is_corruption() -> None:
    files = segment(frame(1), damaged(frame(2)), frame(3, lag=1))
    assert_corrupt(files, good=[1], offset=80, why="lsn 3 at 112 behind it is valid")


def test_a_frame_whose_length_was_damaged_does_not_hide_the_frames_behind_it() -> None:
    files = segment(frame(1), damaged(frame(2), 7), frame(3, lag=1))
    assert_corrupt(files, good=[1], offset=80, why="needs .* bytes and 64 are left")


def test_a_gap_in_the_lsns_is_corruption() -> None:
    assert_corrupt(segment(frame(1), frame(3)), good=[1], offset=80, why="lsn 3 stands where lsn 2 should be")


def test_a_repeated_frame_is_corruption() -> None:
    assert_corrupt(segment(frame(1), frame(1)), good=[1], offset=80, why="lsn 1 stands where lsn 2 should be")


def test_a_bad_last_frame_of_an_older_segment_is_corruption() -> None:
    second = segment(frame(3), header=HEADER._replace(first_lsn=3))
    assert_corrupt(segment(frame(1), frame(2)[:-1]), second, good=[1], offset=80, why="newer segments follow")


def test_bytes_behind_the_last_frame_of_an_older_segment_are_corruption() -> None:
    second = segment(frame(2), header=HEADER._replace(first_lsn=2))
    assert_corrupt(segment(frame(1), b"12345678"), second, good=[1], offset=80, why="newer segments follow")


def test_zeros_behind_the_last_frame_of_an_older_segment_are_reserved_space() -> None:
    second = segment(frame(2), header=HEADER._replace(first_lsn=2))
    assert walk(segment(frame(1), bytes(5000)), second)[0] == [1, 2]


def test_frames_of_zeros_in_an_older_segment_show_as_a_gap() -> None:
    third = segment(frame(3), header=HEADER._replace(first_lsn=3))
    assert_corrupt(segment(frame(1), bytes(32)), third, good=[1], offset=0, why="before it ends with lsn 1")


def test_a_missing_middle_segment_is_corruption() -> None:
    third = segment(frame(5), header=HEADER._replace(first_lsn=5))
    assert_corrupt(segment(frame(1), frame(2)), third, good=[1, 2], offset=0, why="before it ends with lsn 2")


def test_a_missing_segment_behind_an_empty_one_is_corruption() -> None:
    third = segment(frame(5), header=HEADER._replace(first_lsn=5))
    assert_corrupt(segment(), third, good=[], offset=0, why="before it ends with lsn 0")


def test_a_missing_first_segment_is_corruption() -> None:
    assert_corrupt(segment(frame(3), header=HEADER._replace(first_lsn=3)), good=[], offset=0, why="starts at lsn 3")


def epoch_1(*frames: bytes, first_lsn: int) -> tuple[str, bytes]:
    return segment(*frames, header=HEADER._replace(first_lsn=first_lsn, epoch=1))


def test_where_a_higher_epoch_starts_the_frames_of_the_lower_one_are_over() -> None:
    fenced = segment(frame(1), frame(2), frame(3, b"never acknowledged"), b"garbage")
    lsns, reader = walk(fenced, epoch_1(frame(3), first_lsn=3))
    assert (lsns, reader.outcome) == ([1, 2, 3], Outcome.END)
    assert [segment.epoch for segment in reader.segments] == [0, 1]


def test_a_segment_that_a_fenced_writer_starts_is_not_part_of_the_log() -> None:
    stale = segment(frame(3), header=HEADER._replace(first_lsn=3))
    assert walk(segment(frame(1)), stale, epoch_1(frame(2), frame(3), frame(4), first_lsn=2))[0] == [1, 2, 3, 4]
    assert walk(segment(), epoch_1(frame(1), first_lsn=1))[0] == [1]


def test_a_frame_missing_before_a_takeover_is_corruption() -> None:
    files = segment(frame(1), damaged(frame(2))), epoch_1(frame(3), first_lsn=3)
    assert_corrupt(*files, good=[1], offset=80, why="newer segments follow")


def test_a_renamed_segment_is_corruption() -> None:
    files = (HEADER.name, segment(frame(2), header=HEADER._replace(first_lsn=2))[1])
    assert_corrupt(files, good=[], offset=0, why="belongs to a segment named 0000000000000002")


def test_a_segment_of_another_log_is_corruption() -> None:
    other = segment(header=fmt.SegmentHeader(bytes(16), 2, 0))
    assert_corrupt(segment(frame(1)), other, good=[1], offset=16, why="another log")


def test_a_damaged_header_in_front_of_frames_is_corruption() -> None:
    name, data = segment(frame(1))
    assert_corrupt((name, damaged(data, 20)), good=[], offset=0, why="header fails its checksum")


def test_a_newer_format_version_is_refused_by_name() -> None:
    with pytest.raises(VersionError, match="format version 2, this program reads version 1"):
        walk(segment(header=HEADER._replace(version=2)))


def test_reading_on_from_an_lsn_does_not_open_older_segments() -> None:
    files = [segment(frame(lsn), header=HEADER._replace(first_lsn=lsn)) for lsn in (1, 2, 3)]
    files[0] = (files[0][0], b"not even a header")
    reader = Reader(DIRECTORY, after_lsn=1, storage=disk_of(*files))
    assert [record.lsn for record in reader] == [2, 3]


def test_a_payload_full_of_frame_marks_does_not_confuse_the_verdict() -> None:
    hostile = fmt.MARK * 300 + frame(9)  # a copy of a frame of this log, at an lsn that cannot be here
    whole = segment(frame(1), frame(2, hostile))
    assert walk(whole)[0] == [1, 2]
    assert_torn(segment(frame(1), frame(2, fmt.MARK * 300)[:-1]), good=[1], why="left")


def test_the_writer_keeps_a_bounded_number_of_quarantined_tails() -> None:
    disk = disk_of(segment(frame(1)))
    path = DIRECTORY / HEADER.name
    for _ in range(70):
        disk.open(path).write(b"torn")
        Log.open(DIRECTORY, storage=disk).close()
    kept = disk.names(DIRECTORY / "quarantine")
    assert len(kept) == 64
    assert kept[-1].startswith("00000070-")


def test_a_record_larger_than_a_piece_of_the_reader_is_read_whole() -> None:
    payloads = [b"a" * 700_000, b"b" * 5_000_000, b"c" * 700_000]
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk) as log:
        for payload in payloads:
            log.append(1, payload)
    assert [record.payload for record in Reader(DIRECTORY, storage=disk)] == payloads


def test_a_length_that_claims_gigabytes_costs_no_memory_beyond_the_file() -> None:
    huge = bytearray(frame(2))
    huge[4:8] = b"\xff\xff\xff\xff"
    assert_torn(segment(frame(1), bytes(huge)), good=[1], why="needs 4294967")


class UnreadableStorage(FaultyStorage):
    """Lists its files and fails to read any."""

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        raise OSError(errno.EIO, "bad sector", str(path))


def test_a_file_that_cannot_be_read_is_named() -> None:
    disk = UnreadableStorage()
    disk.make_directory(DIRECTORY)
    disk.create(DIRECTORY / HEADER.name)
    with pytest.raises(StorageError, match=rf"cannot read /log/{HEADER.name}"):
        list(Reader(DIRECTORY, storage=disk))


def test_read_gives_the_records_behind_an_lsn(tmp_path: Path) -> None:
    with Log.open(tmp_path) as log:
        for payload in (b"a", b"b", b"c"):
            log.append(1, payload)
    assert [(record.lsn, record.payload) for record in read(tmp_path, after_lsn=1)] == [(2, b"b"), (3, b"c")]


def test_a_logs_own_files_are_told_from_others(tmp_path: Path) -> None:
    Log.open(tmp_path, epoch=1).close()
    with next(tmp_path.glob("*.wal")).open("ab") as file:
        file.write(b"torn")
    Log.open(tmp_path).close()
    assert (tmp_path / "quarantine").is_dir()
    assert [entry for entry in tmp_path.iterdir() if not is_log_file(entry.name)] == []
    assert not any(map(is_log_file, ("summary.json", "wal", "notes.txt")))


def test_a_frame_that_a_writer_adds_behind_a_reader_is_no_corruption(tmp_path: Path) -> None:
    with Log.open(tmp_path) as log:
        log.append(1, b"one")
        log.sync()
        reader = Reader(tmp_path)
        records = iter(reader)
        assert next(records).payload == b"one"  # its buffer holds the file as it is now
        log.append(1, b"two")
        log.sync()
        assert list(records) == []
        assert reader.outcome is Outcome.END
    assert [record.lsn for record in Reader(tmp_path)] == [1, 2]


class GrowingStorage(FaultyStorage):
    """Whoever reads the file whole gets another state of it each time, and at last the true one."""

    def __init__(self, states: list[bytes]) -> None:
        super().__init__()
        self.states = states

    def read(self, path: Path) -> bytes:
        return self.states.pop(0) if self.states else super().read(path)

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        piece = super().read(path)[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


def growing(name: str, data: bytes, states: list[bytes]) -> Reader:
    disk = GrowingStorage(states)
    disk.make_directory(DIRECTORY)
    disk.create(DIRECTORY / name).write(data)
    return Reader(DIRECTORY, storage=disk)


def test_damage_that_another_look_does_not_show_is_a_write_under_way() -> None:
    name, start = segment(frame(1))
    hole = start + bytes(32) + frame(3, lag=0)  # pages of two writes: the older one is missing
    whole = start + frame(2) + frame(3, lag=0)
    reader = growing(name, hole, [hole, whole])
    assert [record.lsn for record in reader] == [1]
    assert reader.outcome is Outcome.END


def test_damage_that_two_looks_show_is_corruption() -> None:
    name, start = segment(frame(1))
    hole = start + bytes(32) + frame(3, lag=0)
    with pytest.raises(CorruptError, match="lsn 2 was durable"):
        list(growing(name, hole, [hole + bytes(8), hole]))
