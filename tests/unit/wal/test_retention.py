"""What the owner of a log notices of its retention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wal import Log, Reader, Record, StorageError
from wal.pins import pin
from wal.retention import Holder, Retention, RetentionPolicy, RetentionReport
from wal.storage import OsStorage
from wal.testing import FaultyStorage, TextRequests

DIRECTORY = Path("/log")


def test_a_log_of_released_requests_keeps_its_newest_segment_only(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "use a", "release a", "note")
    report = owner.run_pass()
    assert report.dropped == tuple(f"{lsn:016x}-00000000.wal" for lsn in (1, 2, 3))
    assert (report.floor_lsn, report.segments_count, report.holders) == (4, 1, ())
    assert owner.lsns() == [4]
    assert owner.files(".floor") == ["0000000000000004.floor"]


def test_a_live_request_keeps_everything_from_its_first_record_on(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "release a", "open b", "use b", "open c", "release c", "note")
    report = owner.run_pass()
    assert owner.lsns() == [3, 4, 5, 6, 7]
    assert report.holders == (Holder(3, "request", "b"),)
    assert owner.run_pass().dropped == ()


def test_a_release_frees_what_the_request_held_and_older_floors_go(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "release a", "open b", "note")
    owner.run_pass()
    owner.write("release b", "note")
    assert len(owner.run_pass().dropped) == 3
    assert owner.lsns() == [6]
    assert owner.files(".floor") == ["0000000000000006.floor"]


def test_a_record_that_names_several_requests_stays_for_each(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "open b", "use a b", "release a", "note")
    assert owner.run_pass().floor_lsn == 2
    owner.write("release b", "note")
    assert owner.run_pass().floor_lsn == 7


def test_a_held_record_stays_for_good(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "hold", "hold", "note")
    report = owner.run_pass()
    assert owner.lsns() == [2, 3, 4]
    assert report.holders == (Holder(2, "record"),)


def test_lsns_go_on_and_retention_too_after_a_reopen_at_a_floor(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "open b", "use a", "release a", "note")
    owner.run_pass()
    owner.log.close()
    again = owning(disk=owner.disk)
    assert again.log.recovery.records_count == 4
    assert again.log.recovery.next_lsn == 6
    again.write("release b", "note")
    assert again.run_pass().floor_lsn == 7
    assert again.lsns() == [7]


def test_records_of_a_request_whose_beginning_was_dropped_hold_nothing(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("open a", "open b", "use a", "release a", "note")
    owner.run_pass()
    owner.log.close()
    again = owning(disk=owner.disk)
    assert again.run_pass().holders == (Holder(2, "request", "b"),)


def test_reading_after_an_lsn_works_above_and_below_the_floor(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note", "open a", "use a", "use a")
    owner.run_pass()
    assert [record.lsn for record in Reader(DIRECTORY, after_lsn=3, storage=owner.disk)] == [4, 5]
    assert [record.lsn for record in Reader(DIRECTORY, after_lsn=1, storage=owner.disk)] == [3, 4, 5]


def test_records_that_were_not_told_are_not_dropped(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    for _ in range(3):
        owner.log.append(9, b"note")
    owner.log.sync()
    report = owner.run_pass()
    assert report.holders == (Holder(3, "unseen"),)
    assert owner.lsns() == [3, 4, 5]


def test_a_retention_that_was_not_told_of_the_beginning_drops_nothing(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note", "note", "note")
    late = Retention(DIRECTORY, TextRequests(), storage=owner.disk)
    assert late.run_pass().holders == (Holder(1, "unseen"),)
    for record in Reader(DIRECTORY, after_lsn=2, storage=owner.disk):
        late.add(record)
    report = late.run_pass()
    assert (report.dropped, report.holders) == ((), (Holder(1, "unseen"),))


def test_records_must_be_told_in_order_and_the_error_names_the_next(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    record = next(iter(Reader(DIRECTORY, storage=owner.disk)))
    with pytest.raises(ValueError, match="retention of /log needs lsn 3 next, was given 1"):
        owner.retention.add(record)


def test_a_record_that_the_fold_refuses_stops_the_dropping_before_it(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    owner.log.append(9, b"\xff")
    owner.log.append(9, b"note")
    owner.log.sync()
    records = list(Reader(DIRECTORY, after_lsn=2, storage=owner.disk))
    with pytest.raises(UnicodeDecodeError):
        owner.retention.add(records[0])
    assert owner.run_pass().floor_lsn == 3


def test_an_empty_directory_has_nothing_to_drop() -> None:
    disk = FaultyStorage()
    disk.make_directory(DIRECTORY)
    report = Retention(DIRECTORY, TextRequests(), storage=disk).run_pass()
    assert report == RetentionReport((), 1, 0, 0, (), 0, ())


def test_a_missing_directory_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="/log"):
        Retention(DIRECTORY, TextRequests(), storage=FaultyStorage()).run_pass()


class Unlockable(FaultyStorage):
    def lock(self, path: Path, *, wait: bool = False) -> object:  # type: ignore[override]
        raise PermissionError(13, "no", str(path))


def test_a_lock_that_cannot_be_taken_is_a_storage_error_of_pass_and_pin() -> None:
    disk = Unlockable()
    with pytest.raises(StorageError, match=r"cannot lock /log/retention\.lock.*EACCES"):
        Retention(DIRECTORY, TextRequests(), storage=disk).run_pass()
    with pytest.raises(StorageError, match=r"cannot lock /log/retention\.lock.*EACCES"):
        pin(DIRECTORY, "x", storage=disk)


def test_on_a_real_disk_a_pass_drops_and_the_log_goes_on(tmp_path: Path) -> None:
    with Log.open(tmp_path, segment_bytes_max=1) as log:
        retention = Retention(tmp_path, TextRequests(), RetentionPolicy(keep_age_s_max=3600))
        for _ in range(3):
            log.append(9, b"note")
        log.sync()
        for record in Reader(tmp_path):
            retention.add(record)
        assert retention.run_pass().dropped == ()
        eager = Retention(tmp_path, TextRequests(), storage=OsStorage())
        for record in Reader(tmp_path):
            eager.add(record)
        assert len(eager.run_pass().dropped) == 2
        log.append(9, b"note")
    assert [record.lsn for record in Reader(tmp_path)] == [3, 4]
    with Log.open(tmp_path) as log:
        assert log.recovery.next_lsn == 5


def test_catching_up_reads_what_was_sealed_since_and_leaves_the_newest_segment(owning: Callable[..., Any]) -> None:
    owner = owning()
    late = Retention(DIRECTORY, TextRequests(), storage=owner.disk)
    late.catch_up()
    owner.write("open a", "use a", "release a", "note")
    late.catch_up()
    assert late.run_pass().floor_lsn == 4
    late.catch_up()
    owner.write("open b", "note", "note")
    late.catch_up()
    assert late.run_pass().holders == (Holder(5, "request", "b"),)
    with pytest.raises(ValueError, match="needs lsn 7 next, was given 1"):
        late.add(Record(1, 9, b"note", "", 0))


def test_catching_up_with_a_log_that_has_no_segment_is_nothing() -> None:
    disk = FaultyStorage()
    disk.make_directory(DIRECTORY)
    Retention(DIRECTORY, TextRequests(), storage=disk).catch_up()


def test_catching_up_begins_at_the_floor(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note", "open a", "note")
    owner.run_pass()
    late = Retention(DIRECTORY, TextRequests(), storage=owner.disk)
    late.catch_up()
    assert late.run_pass().holders == (Holder(3, "request", "a"),)


def test_a_pass_of_a_writer_that_was_fenced_off_drops_nothing_that_its_successor_needs(
    owning: Callable[..., Any],
) -> None:
    owner = owning()
    owner.write("open a", "release a", "open b", "note")
    with Log.open(DIRECTORY, epoch=1, storage=owner.disk, segment_bytes_max=1) as successor:
        for text in ("release b", "open c", "note"):
            successor.append(9, text.encode())
        successor.sync()
        assert owner.run_pass().holders == (Holder(3, "request", "b"), Holder(5, "unseen"))
        assert owner.lsns() == [3, 4, 5, 6, 7]
        takeover = Retention(DIRECTORY, TextRequests(), storage=owner.disk)
        takeover.catch_up()
        assert takeover.run_pass().holders == (Holder(6, "request", "c"),)
        assert owner.run_pass().dropped == ()
    assert owner.lsns() == [6, 7]


def test_what_a_fenced_writer_left_behind_the_takeover_goes_with_the_segments_around_it(
    owning: Callable[..., Any],
) -> None:
    owner = owning()
    owner.write("note", "note")
    with Log.open(DIRECTORY, epoch=1, storage=owner.disk, segment_bytes_max=1) as successor:
        successor.append(9, b"note")
        successor.append(9, b"note")
        successor.append(9, b"note")
        successor.sync()
        owner.disk.create(DIRECTORY / "0000000000000004-00000000.wal").close()
        takeover = Retention(DIRECTORY, TextRequests(), storage=owner.disk)
        takeover.catch_up()
        takeover.run_pass()
    assert owner.files(".wal") == ["0000000000000005-00000001.wal"]
