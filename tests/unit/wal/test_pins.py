"""Pins: who sets one can rely on it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wal import Log, Reader, StorageError
from wal.errors import DroppedError
from wal.pins import Pin, pin, pinned, pins_of, unpin
from wal.retention import Holder, Retention
from wal.storage import OsStorage
from wal.testing import FaultyStorage, TextRequests

DIRECTORY = Path("/log")


def test_a_pin_keeps_the_log_from_its_lsn_on_until_unpinned(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write(*["note"] * 5)
    assert pin(DIRECTORY, "backup", 3, storage=owner.disk) == 3
    assert owner.run_pass().holders == (Holder(3, "pin", "backup"),)
    assert owner.lsns() == [3, 4, 5]
    assert unpin(DIRECTORY, "backup", storage=owner.disk)
    owner.run_pass()
    assert owner.lsns() == [5]


def test_a_pin_in_the_middle_of_a_segment_keeps_the_segment() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk, segment_bytes_max=48 + 2 * 32)
    retention = Retention(DIRECTORY, TextRequests(), storage=disk)
    for _ in range(6):
        log.append(9, b"note")
    log.sync()
    for record in Reader(DIRECTORY, storage=disk):
        retention.add(record)
    pin(DIRECTORY, "p", 4, storage=disk)
    assert retention.run_pass().floor_lsn == 3


def test_a_pin_without_an_lsn_keeps_all_that_the_log_holds(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write(*["note"] * 3)
    owner.run_pass()
    owner.write(*["note"] * 3)
    with pinned(DIRECTORY, "reader", storage=owner.disk) as lsn:
        assert lsn == 3
        assert owner.run_pass().dropped == ()
    assert owner.run_pass().floor_lsn == 6
    assert owner.files(".pin") == []


def test_a_pin_below_the_floor_is_refused_and_nothing_is_pinned(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write(*["note"] * 5)
    owner.run_pass()
    with pytest.raises(DroppedError, match="asked for records from lsn 4 on, and begins at lsn 5") as caught:
        pin(DIRECTORY, "late", 4, storage=owner.disk)
    assert (caught.value.lsn, caught.value.floor_lsn, caught.value.code) == (4, 5, "WAL_DROPPED")
    assert owner.files(".pin") == []


def test_pinning_a_name_again_moves_its_pin(owning: Callable[..., Any]) -> None:
    disk = owning().disk
    for lsn in (7, 3, 3, 9):
        pin(DIRECTORY, "b-1", lsn, storage=disk)
        pin(DIRECTORY, "b", 2, storage=disk)
        assert pins_of(disk.names(DIRECTORY)) == [Pin(2, "b"), Pin(lsn, "b-1")]


def test_a_pin_outlives_a_power_loss_and_an_unpin_too(owning: Callable[..., Any]) -> None:
    disk = owning().disk
    pin(DIRECTORY, "p", 2, storage=disk)
    assert pins_of(disk.restart("synced").names(DIRECTORY)) == [Pin(2, "p")]
    unpin(DIRECTORY, "p", storage=disk)
    assert pins_of(disk.restart("synced").names(DIRECTORY)) == []


def test_a_pin_of_a_killed_process_is_made_durable_when_pinned_again(owning: Callable[..., Any]) -> None:
    disk = owning().disk
    disk.create(DIRECTORY / Pin(2, "p").file_name).close()
    pin(DIRECTORY, "p", 2, storage=disk)
    assert pins_of(disk.restart("synced").names(DIRECTORY)) == [Pin(2, "p")]


def test_unpinning_what_was_not_pinned_is_told(owning: Callable[..., Any]) -> None:
    assert not unpin(DIRECTORY, "nobody", storage=owning().disk)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-a", ".a", "a b", "ä", "x" * 65, "a\n"])
def test_a_name_that_is_not_a_plain_file_name_is_refused(owning: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match="a pin's name must match"):
        pin(DIRECTORY, name, 1, storage=owning().disk)


@pytest.mark.parametrize("lsn", [0, -1, 1 << 64])
def test_an_lsn_out_of_bounds_is_refused(owning: Callable[..., Any], lsn: int) -> None:
    with pytest.raises(ValueError, match="a pinned lsn is"):
        pin(DIRECTORY, "p", lsn, storage=owning().disk)


def test_a_pin_of_a_missing_log_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        pin(tmp_path / "none", "p")
    with pytest.raises(StorageError):
        unpin(tmp_path / "none", "p")


def test_a_pass_does_not_wait_for_a_pin_that_is_being_set(owning: Callable[..., Any]) -> None:
    owner = owning()
    owner.write("note", "note")
    lock = owner.disk.lock(DIRECTORY / "retention.lock")
    report = owner.run_pass()
    assert (report.is_deferred, report.dropped, report.passed) == (True, (), ())
    lock.close()
    assert owner.run_pass().floor_lsn == 2


def test_on_a_real_disk_a_pin_waits_for_the_pass_that_decides_and_sees_its_floor(tmp_path: Path) -> None:
    with Log.open(tmp_path, segment_bytes_max=1) as log:
        for _ in range(3):
            log.append(9, b"note")
    deciding = OsStorage().lock(tmp_path / "retention.lock")
    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin, tmp_path, "late", 2)
        (tmp_path / "0000000000000003.floor").touch()
        deciding.close()
        with pytest.raises(DroppedError, match="begins at lsn 3"):
            pinning.result()
    assert pins_of(OsStorage().names(tmp_path)) == []
