"""A crash, and each kind of failure, at every call that a log makes to its disk.

The law: after any of them, every acknowledged record is there, nothing that was not appended is,
and the log can be opened and appended to.
"""

import contextlib
from pathlib import Path

import pytest

from wal import Log, Outcome, Reader, StorageError, WalError
from wal.testing import CrashError, FaultyStorage, Landing

DIRECTORY = Path("/data/log")


def payload(lsn: int) -> bytes:
    """Incompressible enough that no disk sector of it is zeros."""
    return bytes((lsn * 7 + index) % 255 + 1 for index in range(40 + 300 * (lsn % 5)))


def write_records(disk: FaultyStorage, acknowledged: list[int], groups: int = 6) -> None:
    """Append groups of three records over several segments; note each lsn once it is durable."""
    log = Log.open(DIRECTORY, storage=disk, segment_bytes_max=3000)
    for _ in range(groups):
        lsns = [log.append(1, payload(log.next_lsn)) for _ in range(3)]
        log.sync()
        acknowledged.extend(lsns)
    log.close()


def check(disk: FaultyStorage, acknowledged: list[int], appended_max: int) -> None:
    """The law, and appending goes on."""
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=3000) as log:
        count = log.recovery.records_count
        assert len(acknowledged) <= count <= appended_max
        assert log.append(1, payload(count + 1)) == count + 1
    reader = Reader(DIRECTORY, storage=disk)
    assert [(record.lsn, record.payload) for record in reader] == [(lsn, payload(lsn)) for lsn in range(1, count + 2)]
    assert reader.outcome is Outcome.END


def calls_of_a_whole_run() -> list[str]:
    disk = FaultyStorage()
    write_records(disk, [])
    return disk.calls


CALLS = calls_of_a_whole_run()


def test_the_run_makes_every_kind_of_call_of_a_writer() -> None:
    assert {"make_directory", "create", "write", "sync", "rename", "sync_directory"} <= set(CALLS)


@pytest.mark.parametrize("call", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("landing", ["written", "synced", "mixed"])
def test_a_crash_at_any_call_loses_nothing_acknowledged(call: int, landing: Landing) -> None:
    for seed in range(20 if landing == "mixed" else 1):
        disk, acknowledged = FaultyStorage({call: "crash"}), list[int]()
        with pytest.raises(CrashError):
            write_records(disk, acknowledged)
        check(disk.restart(landing, seed), acknowledged, len(acknowledged) + 3)


@pytest.mark.parametrize("call", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_an_error_at_any_call_is_typed_and_loses_nothing_acknowledged(call: int, fault: str) -> None:
    disk, acknowledged = FaultyStorage({call: fault}), list[int]()  # type: ignore[dict-item]
    is_spared = fault == "ENOSPC" and CALLS[call - 1] == "allocate"  # only what counts needs room
    with contextlib.nullcontext() if is_spared else pytest.raises(StorageError, match=f"/data/log.*{fault}"):
        write_records(disk, acknowledged)
    assert len(acknowledged) == 18 or not is_spared
    for landing in ("synced", "written"):
        check(disk.restart(landing), acknowledged, len(acknowledged) + 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", range(1, len(CALLS) + 1))
def test_a_short_write_at_any_call_is_not_noticed(call: int) -> None:
    disk, acknowledged = FaultyStorage({call: "short"}), list[int]()
    write_records(disk, acknowledged)
    assert len(acknowledged) == 18
    check(disk.restart("synced"), acknowledged, 18)


def torn_disk() -> FaultyStorage:
    """Six records are durable, a seventh is cut in its middle."""
    disk = FaultyStorage()
    write_records(disk, [], groups=2)
    newest = max(name for name in disk.names(DIRECTORY) if name.endswith(".wal"))
    disk.open(DIRECTORY / newest).write(b"\xf7\x1e\xa1 the beginning of a frame")
    return disk.restart("written")


def calls_of_a_repair() -> list[str]:
    disk = torn_disk()
    Log.open(DIRECTORY, storage=disk)
    return disk.calls


REPAIR_CALLS = calls_of_a_repair()


def test_a_repair_keeps_a_copy_before_it_cuts() -> None:
    assert REPAIR_CALLS.index("rename") < REPAIR_CALLS.index("truncate")


@pytest.mark.parametrize("call", range(1, len(REPAIR_CALLS) + 1))
@pytest.mark.parametrize("fault", ["crash", "EIO", "ENOSPC"])
@pytest.mark.parametrize("landing", ["written", "synced", "mixed"])
def test_a_repair_that_fails_anywhere_can_be_done_again(call: int, fault: str, landing: Landing) -> None:
    for seed in range(5):
        disk = torn_disk()
        disk.faults = {call: fault}  # type: ignore[dict-item]
        with pytest.raises((CrashError, WalError)):
            Log.open(DIRECTORY, storage=disk, segment_bytes_max=3000)
        check(disk.restart(landing, seed), [1, 2, 3, 4, 5, 6], 6)


def test_a_failed_open_frees_the_lock() -> None:
    disk = torn_disk()
    disk.faults = {2: "EIO"}
    with pytest.raises(StorageError):
        Log.open(DIRECTORY, storage=disk)
    Log.open(DIRECTORY, storage=disk).close()
