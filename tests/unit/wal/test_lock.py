"""One writer: locked out within an epoch, fenced by a higher one."""

import asyncio
import errno
from pathlib import Path

import pytest

from wal import FencedError, GroupCommit, LockedError, Log, PoisonedError, Reader, Storage, StorageError
from wal.lock import take_lock
from wal.storage import Lock
from wal.testing import FaultyStorage

DIRECTORY = Path("/log")


def names(disk: FaultyStorage, suffix: str) -> list[str]:
    return [name for name in disk.names(DIRECTORY) if name.endswith(suffix)]


def payloads(disk: FaultyStorage) -> list[bytes]:
    return [record.payload for record in Reader(DIRECTORY, storage=disk)]


def test_a_new_log_has_epoch_zero_and_a_reopen_goes_on_in_the_same_segment() -> None:
    disk = FaultyStorage()
    for _ in range(3):
        with Log.open(DIRECTORY, storage=disk) as log:
            assert log.epoch == 0
            log.append(1, b"x")
    assert names(disk, ".wal") == ["0000000000000001-00000000.wal"]
    assert names(disk, ".lock") == ["00000000.lock"]


def test_the_epoch_is_in_the_names_of_the_segments_and_of_the_lock() -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, storage=disk) as log:
        log.append(1, b"x")
    with Log.open(DIRECTORY, epoch=7, storage=disk) as log:
        assert log.epoch == 7
        log.append(1, b"y")
    assert names(disk, ".wal") == ["0000000000000001-00000000.wal", "0000000000000002-00000007.wal"]
    assert names(disk, ".lock") == ["00000007.lock"]


def test_without_an_epoch_a_writer_goes_on_with_the_newest() -> None:
    disk = FaultyStorage()
    Log.open(DIRECTORY, epoch=7, storage=disk).close()
    with Log.open(DIRECTORY, storage=disk) as log:
        assert log.epoch == 7


def test_a_lower_epoch_than_was_seen_is_refused() -> None:
    disk = FaultyStorage()
    Log.open(DIRECTORY, epoch=7, storage=disk).close()
    with pytest.raises(FencedError, match=r"no longer written by epoch 6 \(the newest is 7\)") as failure:
        Log.open(DIRECTORY, epoch=6, storage=disk)
    assert (failure.value.epoch, failure.value.newest_epoch) == (6, 7)


def test_a_second_writer_of_the_same_epoch_is_locked_out() -> None:
    disk = FaultyStorage()
    with Log.open(DIRECTORY, epoch=7, storage=disk), pytest.raises(LockedError):
        Log.open(DIRECTORY, epoch=7, storage=disk)


@pytest.mark.parametrize("epoch", [-1, 1 << 32])
def test_a_senseless_epoch_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match=f"epoch is {epoch}"):
        Log.open(DIRECTORY, epoch=epoch, storage=FaultyStorage())


def test_a_writer_that_lost_its_lease_acknowledges_nothing_more() -> None:
    disk = FaultyStorage()
    old = Log.open(DIRECTORY, epoch=1, storage=disk)
    old.append(1, b"acknowledged")
    old.sync()
    new = Log.open(DIRECTORY, epoch=2, storage=disk)
    old.append(1, b"too late")
    with pytest.raises(FencedError, match=r"epoch 1 .* newest is 2"):
        old.sync()
    assert old.durable_lsn == 1
    with pytest.raises(PoisonedError):
        old.append(1, b"never")
    new.append(1, b"of the new writer")
    new.sync()
    old.close()
    new.close()
    assert payloads(disk) == [b"acknowledged", b"of the new writer"]
    assert payloads(disk.restart("synced")) == [b"acknowledged", b"of the new writer"]


def test_a_fenced_writer_that_starts_a_segment_does_not_harm_the_log() -> None:
    disk = FaultyStorage()
    old = Log.open(DIRECTORY, epoch=1, storage=disk, segment_bytes_max=100)
    with Log.open(DIRECTORY, epoch=2, storage=disk) as new:
        for _ in range(4):
            old.append(1, b"x" * 40)
        with pytest.raises(FencedError):
            old.sync()
        new.append(1, b"new")
    assert payloads(disk) == [b"new"]


def test_callers_of_a_group_hear_that_they_were_fenced() -> None:
    disk = FaultyStorage()

    async def run() -> list[object]:
        commit = GroupCommit(Log.open(DIRECTORY, epoch=1, storage=disk))
        await commit.append(1, b"kept")
        Log.open(DIRECTORY, epoch=2, storage=disk).close()
        results = await asyncio.gather(*(commit.append(1, b"x") for _ in range(3)), return_exceptions=True)
        with pytest.raises(PoisonedError, match="no longer written by epoch 1"):
            await commit.append(1, b"late")
        await commit.close()
        return [*results]

    results = asyncio.run(run())
    assert [type(result) for result in results] == [FencedError] * 3
    assert payloads(disk) == [b"kept"]


def test_a_removed_lock_file_ends_the_right_to_write() -> None:
    disk = FaultyStorage()
    log = Log.open(DIRECTORY, storage=disk)
    disk.remove(DIRECTORY / "00000000.lock")
    log.append(1, b"x")
    with pytest.raises(FencedError, match="take over with a new, higher epoch"):
        log.sync()


def test_the_real_lock_is_taken_over_while_its_holder_lives(tmp_path: Path) -> None:
    old = Log.open(tmp_path)
    old.append(1, b"acknowledged")
    old.sync()
    with Log.open(tmp_path, epoch=1) as new:
        assert new.recovery.records_count == 1
        old.append(1, b"too late")
        with pytest.raises(FencedError):
            old.sync()
    old.close()
    assert [record.payload for record in Reader(tmp_path)] == [b"acknowledged"]


class RacingStorage(FaultyStorage):
    """Another writer takes the directory between the look at its names and the lock."""

    race_with = 0

    def lock(self, path: Path) -> Lock:
        if self.race_with:
            epoch, self.race_with = self.race_with, 0
            Log.open(DIRECTORY, epoch=epoch, storage=self)
        return super().lock(path)


def test_of_two_writers_that_come_at_once_the_higher_epoch_wins() -> None:
    disk = RacingStorage()
    Log.open(DIRECTORY, storage=disk).close()
    disk.race_with = 3
    with pytest.raises(FencedError, match=r"epoch 2 .* newest is 3"):
        Log.open(DIRECTORY, epoch=2, storage=disk)
    disk.race_with = 4
    with Log.open(DIRECTORY, epoch=5, storage=disk) as log:
        assert log.epoch == 5


class BrokenStorage(FaultyStorage):
    """One call fails when asked."""

    broken = ""

    def names(self, directory: Path) -> list[str]:
        return self._or_fail("names") or super().names(directory)

    def lock(self, path: Path) -> Lock:
        self._or_fail("lock")
        return super().lock(path)

    def read(self, path: Path) -> bytes:
        self._or_fail("read")
        return super().read(path)

    def _or_fail(self, call: str) -> list[str] | None:
        if call == self.broken:
            raise OSError(errno.EIO, "broken")
        return None


@pytest.mark.parametrize(("call", "told"), [("names", "cannot list /log"), ("lock", "cannot lock /log/00000000.lock")])
def test_a_directory_that_cannot_be_listed_or_locked_is_named(call: str, told: str) -> None:
    disk = BrokenStorage()
    Log.open(DIRECTORY, storage=disk).close()
    disk.broken = call
    with pytest.raises(StorageError, match=told):
        Log.open(DIRECTORY, storage=disk)


def test_a_lock_whose_holder_cannot_be_read_is_still_a_lock() -> None:
    disk = BrokenStorage()
    with Log.open(DIRECTORY, storage=disk):
        disk.broken = "read"
        with pytest.raises(LockedError, match="/log is locked: a log"):
            Log.open(DIRECTORY, storage=disk)
        disk.broken = ""


def test_a_lower_lock_that_cannot_be_removed_frees_the_one_that_was_taken() -> None:
    disk = FaultyStorage()
    Log.open(DIRECTORY, storage=disk).close()
    disk.faults[len(disk.calls) + 1] = "EIO"
    storage: Storage = disk
    with pytest.raises(StorageError, match=r"cannot remove /log/00000000\.lock"):
        take_lock(storage, DIRECTORY, 1)
    take_lock(storage, DIRECTORY, 1)[0].close()


class UnsureLock:
    """A lock that cannot say whether it is current, nor be let go of without an error."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    def is_current(self) -> bool:
        raise OSError(errno.ESTALE, "stale")

    def close(self) -> None:
        self._lock.close()
        raise OSError(errno.EIO, "broken")


class UnsureStorage(FaultyStorage):
    """Its locks turn unsure when asked."""

    is_unsure = False

    def lock(self, path: Path, *, wait: bool = False) -> Lock:
        lock = super().lock(path, wait=wait)
        return UnsureLock(lock) if self.is_unsure else lock


def test_a_lock_that_cannot_be_looked_at_or_let_go_of_is_a_typed_error() -> None:
    disk = UnsureStorage()
    disk.is_unsure = True
    with pytest.raises(StorageError, match="cannot unlock /log") as failure:
        Log.open(DIRECTORY, storage=disk)
    assert "cannot look at /log/00000000.lock" in str(failure.value.__context__.__context__)  # type: ignore[union-attr]
    disk.is_unsure = False
    Log.open(DIRECTORY, storage=disk).close()


class ListedTooSoonStorage(FaultyStorage):
    """Its listing still shows a lock that another taker has removed."""

    def names(self, directory: Path) -> list[str]:
        return [*super().names(directory), "00000000.lock"]


def test_a_lower_lock_that_another_taker_has_removed_is_no_error() -> None:
    disk = ListedTooSoonStorage()
    with Log.open(DIRECTORY, epoch=2, storage=disk) as log:
        assert log.epoch == 2
