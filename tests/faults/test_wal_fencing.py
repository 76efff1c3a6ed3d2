"""A takeover at every moment of another writer's work, and a takeover that fails at every call.

The law: what the old writer acknowledged is in the log of the new one; nothing is acknowledged
after the takeover; and the log stays readable whatever the old writer still writes.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from wal import FencedError, Log, Outcome, PoisonedError, Reader, WalError
from wal.log import Batch
from wal.testing import CrashError, Fault, FaultyStorage, Landing

DIRECTORY = Path("/log")
SEGMENT_BYTES_MAX = 700


def payload(lsn: int) -> bytes:
    return bytes((lsn * 7 + index) % 255 + 1 for index in range(60 + 40 * (lsn % 3)))


class InterruptedByTakeover(FaultyStorage):
    """Something happens in front of the call of this number."""

    at_call = 0
    happens: Callable[[], None] = staticmethod(lambda: None)

    def count(self, call: str) -> Fault | None:
        if len(self.calls) + 1 == self.at_call:
            self.at_call = 0
            self.happens()
        return super().count(call)


def write_as_old(log: Log, acknowledged: list[bytes], groups: int) -> None:
    for _ in range(groups):
        appended = [payload(log.next_lsn)]
        log.append(1, appended[0])
        appended.append(payload(log.next_lsn))
        log.append(1, appended[1])
        log.sync()
        acknowledged.extend(appended)


def calls_of_the_old_writer() -> int:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, epoch=1, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX)
    before = len(disk.calls)
    write_as_old(log, [], 6)
    return len(disk.calls) - before


@pytest.mark.parametrize("call", range(1, calls_of_the_old_writer() + 1))
def test_a_takeover_before_any_call_of_the_old_writer_keeps_what_was_acknowledged(call: int) -> None:
    disk = InterruptedByTakeover()
    old = Log.open(DIRECTORY, epoch=1, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX)
    new: list[Log] = []
    acknowledged: list[bytes] = []
    acknowledged_before: list[bytes] = []

    def take_over() -> None:
        acknowledged_before.extend(acknowledged)
        new.append(Log.open(DIRECTORY, epoch=2, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX))

    disk.at_call, disk.happens = len(disk.calls) + call, take_over
    with pytest.raises(FencedError):
        write_as_old(old, acknowledged, 6)
    with pytest.raises(PoisonedError):
        old.sync()
    assert acknowledged == acknowledged_before
    (log,) = new
    found = log.recovery.records_count
    assert found >= len(acknowledged)
    for lsn in range(found + 1, found + 8):
        assert log.append(2, payload(lsn)) == lsn
        log.sync()
    for landing in ("written", "synced"):
        reader = Reader(DIRECTORY, storage=disk.restart(landing))  # type: ignore[arg-type]
        assert [record.payload for record in reader] == [payload(lsn) for lsn in range(1, found + 8)]
        assert reader.outcome is Outcome.END


def fenced_disk() -> FaultyStorage:
    """Six acknowledged records of epoch 1, whose writer still lives, in the middle of a write."""
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, epoch=1, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX)
    write_as_old(log, [], 3)
    log.append(1, payload(7))
    log.append(1, payload(8))
    disk.faults[len(disk.calls) + 1] = "short"
    log.flush()
    return disk


def calls_of_a_takeover() -> int:
    disk = fenced_disk()
    before = len(disk.calls)
    Log.open(DIRECTORY, epoch=2, storage=disk)
    return len(disk.calls) - before


@pytest.mark.parametrize("call", range(1, calls_of_a_takeover() + 1))
@pytest.mark.parametrize("fault", ["crash", "EIO", "ENOSPC"])
@pytest.mark.parametrize("landing", ["written", "synced", "mixed"])
def test_a_takeover_that_fails_anywhere_can_be_done_again(call: int, fault: Fault, landing: Landing) -> None:
    for seed in range(3):
        disk = fenced_disk()
        disk.faults = {len(disk.calls) + call: fault}
        with pytest.raises((CrashError, WalError)):
            Log.open(DIRECTORY, epoch=2, storage=disk)
        after = disk.restart(landing, seed)
        with Log.open(DIRECTORY, epoch=2, storage=after) as log:
            assert log.recovery.records_count >= 6
            count = log.recovery.records_count
            log.append(1, payload(count + 1))
        found = [record.payload for record in Reader(DIRECTORY, storage=after)]
        assert found == [payload(lsn) for lsn in range(1, count + 2)]


class InterruptedReads(FaultyStorage):
    """Something happens behind the read of this number."""

    at_read = 0
    reads_count = 0
    happens: Callable[[], None] = staticmethod(lambda: None)

    def read(self, path: Path) -> bytes:
        data = super().read(path)
        self.reads_count += 1
        if self.reads_count == self.at_read:
            self.happens()
        return data


def half_written(disk: FaultyStorage) -> tuple[Log, Batch]:
    """Six acknowledged records of epoch 1, and two more that its writer is about to write."""
    log = Log.open(DIRECTORY, epoch=1, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX)
    write_as_old(log, [], 3)
    log.append(1, payload(7))
    log.append(1, payload(8))
    return log, log.take()


def reads_of_a_takeover() -> int:
    disk = InterruptedReads()
    half_written(disk)
    before = disk.reads_count
    Log.open(DIRECTORY, epoch=2, storage=disk)
    return disk.reads_count - before


@pytest.mark.parametrize("read", range(1, reads_of_a_takeover() + 1))
def test_a_write_of_the_old_writer_that_lands_while_the_new_one_reads_does_no_harm(read: int) -> None:
    disk = InterruptedReads()
    old, batch = half_written(disk)

    def land() -> None:
        with pytest.raises(FencedError):
            old.commit(batch, sync=True)

    disk.at_read, disk.happens = disk.reads_count + read, land
    with Log.open(DIRECTORY, epoch=2, storage=disk, segment_bytes_max=SEGMENT_BYTES_MAX) as log:
        found = log.recovery.records_count
        assert found in (6, 8)
        log.append(2, payload(found + 1))
    assert [record.payload for record in Reader(DIRECTORY, storage=disk)] == [
        payload(lsn) for lsn in range(1, found + 2)
    ]
