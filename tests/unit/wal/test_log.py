"""What a user of `Log` notices, on a disk in memory."""

import errno
from pathlib import Path

import pytest

from wal import (
    ClosedError,
    FullError,
    LockedError,
    Log,
    PoisonedError,
    Reader,
    RecordInvalidError,
    RecordTooLargeError,
    StorageError,
)
from wal.testing import Fault, FaultyStorage

DIRECTORY = Path("/log")


def payloads(disk: FaultyStorage, after_lsn: int = 0) -> list[bytes]:
    return [record.payload for record in Reader(DIRECTORY, after_lsn=after_lsn, storage=disk)]


def segments(disk: FaultyStorage) -> list[str]:
    return [name for name in disk.names(DIRECTORY) if name.endswith(".wal")]


def test_a_new_log_is_empty_and_starts_at_lsn_one() -> None:
    log = Log.open(DIRECTORY, storage=FaultyStorage())
    assert log.recovery == (0, 1, 0, None)
    assert log.append(1, b"first") == 1
    assert log.append(2, b"second") == 2


def test_lsns_go_on_after_a_reopen() -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk) as log:
        log.append(1, b"a")
    with Log.open(DIRECTORY, storage=disk) as log:
        assert log.recovery == (1, 2, 0, None)
        assert log.append(1, b"b") == 2
    assert payloads(disk) == [b"a", b"b"]


def test_synced_records_survive_a_power_loss_and_others_need_not() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"synced")
    log.sync()
    log.append(1, b"flushed")
    log.flush()
    log.append(1, b"in memory")
    assert log.durable_lsn == 1
    assert payloads(disk) == [b"synced", b"flushed"]
    assert payloads(disk.restart("synced")) == [b"synced"]


def test_a_sync_with_nothing_new_costs_nothing() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"a")
    log.sync()
    calls = len(disk.calls)
    log.sync()
    assert len(disk.calls) == calls


def test_a_full_segment_is_followed_by_another_and_reading_spans_them() -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=200) as log:
        for index in range(20):
            log.append(1, bytes([index]) * 30)
    assert len(segments(disk)) == 10
    assert payloads(disk) == [bytes([index]) * 30 for index in range(20)]
    assert payloads(disk, after_lsn=17) == [bytes([index]) * 30 for index in range(17, 20)]


def test_a_record_larger_than_a_segment_gets_one_of_its_own() -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=100) as log:
        for size in (10, 5000, 10):
            log.append(1, b"x" * size)
    assert len(segments(disk)) == 3
    assert [len(payload) for payload in payloads(disk)] == [10, 5000, 10]


def test_a_record_above_the_bound_is_refused_and_the_log_goes_on() -> None:
    log = Log.open(DIRECTORY, storage=FaultyStorage(), record_bytes_max=10)
    with pytest.raises(RecordTooLargeError, match="11 bytes is above the bound record_bytes_max = 10"):
        log.append(1, b"x" * 11)
    assert log.append(1, b"x" * 10) == 1


@pytest.mark.parametrize("kind", [0, -1, 256])
def test_a_kind_outside_its_byte_is_refused(kind: int) -> None:
    with pytest.raises(RecordInvalidError, match=f"not {kind}"):
        Log.open(DIRECTORY, storage=FaultyStorage()).append(kind, b"")


@pytest.mark.parametrize("bounds", [{"record_bytes_max": 0}, {"record_bytes_max": 1 << 32}, {"segment_bytes_max": 0}])
def test_senseless_bounds_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        Log.open(DIRECTORY, storage=FaultyStorage(), **bounds)


def test_a_large_buffer_is_written_without_waiting_for_a_sync() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    for _ in range(3):
        log.append(1, bytes(600_000))
    assert len(payloads(disk)) == 2


def test_a_second_writer_is_locked_out_until_the_first_closes() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    with pytest.raises(LockedError, match="/log"):
        Log.open(DIRECTORY, storage=disk)
    log.close()
    Log.open(DIRECTORY, storage=disk).close()


def test_a_closed_log_says_so_and_closing_twice_is_fine() -> None:
    log = Log.open(DIRECTORY, storage=FaultyStorage())
    log.close()
    log.close()
    for use in (log.sync, log.flush, lambda: log.append(1, b"")):
        with pytest.raises(ClosedError, match="/log is closed"):
            use()


def test_a_failed_sync_poisons_the_log_for_good() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"kept")
    log.sync()
    log.append(1, b"lost")
    disk.faults[len(disk.calls) + 2] = "EIO"
    with pytest.raises(StorageError, match=r"cannot sync .*EIO") as failure:
        log.sync()
    assert failure.value.errno == errno.EIO
    for use in (log.sync, log.flush, lambda: log.append(1, b"")):
        with pytest.raises(PoisonedError, match="EIO"):
            use()
    assert log.durable_lsn == 1


def test_records_of_a_failed_sync_that_a_reopen_still_reads_are_made_durable_again() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"a")
    disk.faults[len(disk.calls) + 3] = "EIO"
    with pytest.raises(StorageError):
        log.sync()
    log.close()
    assert payloads(disk.restart("synced")) == []  # the kernel forgot the dirty pages
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"a")
    disk.faults[len(disk.calls) + 3] = "EIO"
    with pytest.raises(StorageError):
        log.sync()
    log.close()
    assert Log.open(DIRECTORY, storage=disk).recovery.records_count == 1
    assert payloads(disk.restart("synced")) == [b"a"]


def test_a_full_disk_names_the_file_and_keeps_what_was_acknowledged() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"acknowledged")
    log.sync()
    log.append(1, b"too much")
    disk.faults[len(disk.calls) + 1] = "ENOSPC"
    with pytest.raises(FullError, match=r"cannot write /log/0.*\.wal: No space left on device.*free some space"):
        log.sync()
    log.close()
    with Log.open(DIRECTORY, storage=disk) as log:
        assert log.recovery.records_count == 1
        assert log.recovery.torn_bytes > 0
        assert log.append(1, b"again") == 2
    assert payloads(disk) == [b"acknowledged", b"again"]


def test_a_short_write_is_continued() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"0123456789" * 10)
    disk.faults = {len(disk.calls) + 1: "short", len(disk.calls) + 2: "short"}
    log.sync()
    assert payloads(disk.restart("synced")) == [b"0123456789" * 10]


class InterruptedStorage(FaultyStorage):
    """Ctrl-C arrives in the call of this name."""

    interrupted_call = ""

    def count(self, call: str) -> Fault | None:
        if call == self.interrupted_call:
            raise KeyboardInterrupt
        return super().count(call)


def test_an_interrupted_write_poisons_because_its_end_is_not_known() -> None:
    disk = InterruptedStorage()
    log = Log.open(DIRECTORY, storage=disk)
    log.append(1, b"a")
    disk.interrupted_call = "write"
    with pytest.raises(KeyboardInterrupt):
        log.sync()
    with pytest.raises(PoisonedError, match="interrupted by KeyboardInterrupt"):
        log.append(1, b"")


def test_leftovers_of_an_interrupted_creation_are_removed() -> None:
    disk = FaultyStorage()
    Log.open(DIRECTORY, storage=disk).close()
    disk.create(DIRECTORY / "0000000000000002-00000000.wal.tmp").write(b"half a header")
    Log.open(DIRECTORY, storage=disk).close()
    assert not [name for name in disk.names(DIRECTORY) if name.endswith(".tmp")]
