"""A crash, a failure, a pin and a reader at every call that a retention pass makes to its disk.

The law: whatever happens, no record of a request that is not released is lost, nothing pinned is, the
log opens and goes on, and the next pass completes the work.
"""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from wal import Log, Outcome, Reader, Record, StorageError
from wal.errors import DroppedError
from wal.pins import pin, pins_of, unpin
from wal.retention import Retention
from wal.storage import Lock
from wal.testing import CrashError, FaultyStorage, Landing, TextRequests

DIRECTORY = Path("/data/log")
RECORDS = (
    "open a",
    "open b",
    "use a",
    "release b",
    "release a",
    "note",
    "open c",
    "use c",
    "open d",
    "release d",
    "note",
)
LIVE_FROM = 7
"""The first lsn of the oldest live request, c."""


def record_log(disk: FaultyStorage) -> None:
    """Every record in a segment of its own; an earlier pass has already dropped the first two."""
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=1) as log:
        for text in ("open z", "release z", "note"):
            log.append(9, text.encode())
        log.sync()
        told(disk).run_pass()
        for text in RECORDS[3:]:
            log.append(9, text.encode())


def told(disk: FaultyStorage) -> Retention:
    """A retention that has read the whole log."""
    retention = Retention(DIRECTORY, TextRequests(), storage=disk)
    for record in Reader(DIRECTORY, storage=disk):
        retention.add(record)
    return retention


def fresh_disk(faults: dict[int, str] | None = None) -> FaultyStorage:
    """The recorded log; `faults` count from here."""
    disk = FaultyStorage()
    record_log(disk)
    after = disk.restart("synced")
    after.faults = faults or {}  # type: ignore[assignment]
    return after


def lsns(disk: FaultyStorage) -> list[int]:
    reader = Reader(DIRECTORY, storage=disk)
    found = [record.lsn for record in reader]
    assert reader.outcome is Outcome.END
    return found


def segment_files(disk: FaultyStorage) -> list[str]:
    return [name for name in disk.names(DIRECTORY) if name.endswith(".wal")]


def check(disk: FaultyStorage) -> None:
    """Nothing live is lost, the log goes on, and a pass finishes the job."""
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=1) as log:
        found = lsns(disk)
        assert found == list(range(found[0], len(RECORDS) + 1))
        assert found[0] <= LIVE_FROM
        told(disk).run_pass()
        assert lsns(disk)[0] == LIVE_FROM
        assert len(segment_files(disk)) == len(RECORDS) + 1 - LIVE_FROM, "no file is left below the floor"
        assert [name for name in disk.names(DIRECTORY) if name.endswith(".floor")] == [f"{LIVE_FROM:016x}.floor"]
        assert log.append(9, b"note") == len(RECORDS) + 1


def calls_of_a_pass() -> list[str]:
    disk = fresh_disk()
    told(disk).run_pass()
    return disk.calls


CALLS = calls_of_a_pass()
FLOOR_CALLS = CALLS.index("create") + 4
"""The calls up to the one that makes the floor durable."""


def test_the_floor_is_durable_before_the_first_segment_is_unlinked() -> None:
    assert CALLS[:FLOOR_CALLS] == ["sync_directory", "create", "sync", "close", "sync_directory"]
    assert "remove" not in CALLS[:FLOOR_CALLS]
    assert CALLS[FLOOR_CALLS:].count("remove") == LIVE_FROM - 3 + 1


@pytest.mark.parametrize("call", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("landing", ["written", "synced", "mixed"])
def test_a_crash_at_any_call_of_a_pass_loses_nothing_live(call: int, landing: Landing) -> None:
    for seed in range(20 if landing == "mixed" else 1):
        disk = fresh_disk({call: "crash"})
        with pytest.raises(CrashError):
            told(disk).run_pass()
        check(disk.restart(landing, seed))


@pytest.mark.parametrize("call", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_an_error_at_any_call_of_a_pass_is_typed_and_the_same_process_goes_on(call: int, fault: str) -> None:
    disk = fresh_disk({call: fault})
    before = disk.names(DIRECTORY)
    retention = told(disk)
    with pytest.raises(StorageError, match=f"/data/log.*{fault}"):
        retention.run_pass()
    if call <= FLOOR_CALLS:
        assert sorted({*disk.names(DIRECTORY)} - {"retention.lock"}) == sorted({*before} - {"retention.lock"})
        assert lsns(disk)[0] == 3, "the floor is as before"
    for landing in ("synced", "written"):
        check(disk.restart(landing))  # type: ignore[arg-type]
    retention.run_pass()
    check(disk)


def test_a_floor_that_could_neither_be_synced_nor_taken_back_is_synced_by_the_next_pass() -> None:
    disk = fresh_disk({4: "EIO", 5: "EIO"})
    with pytest.raises(StorageError, match="EIO"):
        told(disk).run_pass()
    check(disk)


class Interrupted(FaultyStorage):
    """Something else runs before one of the calls, reads included, that the victim makes."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 0
        self.seen = 0
        self.meanwhile: Callable[[], None] | None = None

    def names(self, directory: Path) -> list[str]:
        self.tick()
        return super().names(directory)

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> int:
        self.tick()
        return super().read_into(path, offset, buffer)

    def lock(self, path: Path, *, wait: bool = False) -> Lock:
        self.tick()
        return super().lock(path, wait=wait)

    def count(self, call: str):  # type: ignore[no-untyped-def]
        self.tick()
        return super().count(call)

    def tick(self) -> None:
        if self.meanwhile is None:
            return
        self.seen += 1
        if self.seen == self.at:
            action, self.meanwhile = self.meanwhile, None
            action()


def interrupted_disk() -> Interrupted:
    disk = Interrupted()
    record_log(disk)
    return disk


def count_ticks(victim: Callable[[Interrupted], object]) -> int:
    disk = interrupted_disk()
    disk.meanwhile = lambda: None
    victim(disk)
    return disk.seen


def pin_or_not(disk: FaultyStorage, lsn: int) -> bool:
    """Whether a pin was set.  The double answers EAGAIN where a real disk would wait for the pass."""
    try:
        return pin(DIRECTORY, "backup", lsn, storage=disk) == lsn
    except DroppedError:
        return False
    except StorageError as error:
        if error.errno != errno.EAGAIN:
            raise
        return False


PASS_TICKS = count_ticks(lambda disk: told(disk).run_pass())


@pytest.mark.parametrize("lsn", [3, 5, 7, 9])
def test_a_pin_set_at_any_moment_of_a_pass_holds_or_is_refused(lsn: int) -> None:
    outcomes = set()
    for at in range(1, PASS_TICKS + 1):
        disk = interrupted_disk()
        retention = told(disk)
        done: list[bool] = []
        disk.at, disk.meanwhile = at, lambda disk=disk, done=done: done.append(pin_or_not(disk, lsn))  # type: ignore[misc]
        retention.run_pass()
        disk.meanwhile = None
        if not done:
            continue
        outcomes.add(done[0])
        assert [found.lsn for found in pins_of(disk.names(DIRECTORY))] == [lsn] * done[0]
        if done[0]:
            assert lsns(disk)[0] <= lsn
            retention.run_pass()
            assert lsns(disk)[0] <= lsn
            unpin(DIRECTORY, "backup", storage=disk)
        retention.run_pass()
        check(disk)
    assert outcomes == ({True, False})


def test_a_pass_run_at_any_moment_of_a_pin_is_deferred_or_seen() -> None:
    for at in range(1, count_ticks(lambda disk: pin(DIRECTORY, "backup", 5, storage=disk)) + 1):
        disk = interrupted_disk()
        retention = told(disk)
        disk.at, disk.meanwhile = at, retention.run_pass  # type: ignore[assignment]
        if pin_or_not(disk, 5):
            assert lsns(disk)[0] <= 5
            retention.run_pass()
            assert lsns(disk)[0] == 5
        else:
            assert pins_of(disk.names(DIRECTORY)) == []
            assert lsns(disk)[0] == LIVE_FROM


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "crash"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_pin_that_fails_anywhere_is_typed_and_leaves_the_earlier_pin(call: int, fault: str) -> None:
    disk = fresh_disk()
    pin(DIRECTORY, "backup", 4, storage=disk)
    disk.faults = {len(disk.calls) + call: fault}  # type: ignore[dict-item]
    with pytest.raises((StorageError, CrashError)):
        pin(DIRECTORY, "backup", 6, storage=disk)
    for landing in ("written", "synced", "mixed"):
        after = disk.restart(landing)  # type: ignore[arg-type]
        assert pins_of(after.names(DIRECTORY))[0].lsn == 4
        told(after).run_pass()
        assert lsns(after)[0] == 4


def test_an_unpin_that_fails_is_typed_and_can_be_done_again() -> None:
    disk = fresh_disk()
    pin(DIRECTORY, "backup", 4, storage=disk)
    disk.faults = {len(disk.calls) + 1: "EIO"}
    with pytest.raises(StorageError, match=r"cannot unpin in /data/log.*EIO"):
        unpin(DIRECTORY, "backup", storage=disk)
    assert unpin(DIRECTORY, "backup", storage=disk)
    check(disk)


def test_a_pin_again_on_a_disk_that_fails_to_sync_is_typed_and_the_pin_stays() -> None:
    disk = fresh_disk()
    pin(DIRECTORY, "backup", 4, storage=disk)
    disk.faults = {len(disk.calls) + 1: "EIO"}
    with pytest.raises(StorageError, match=r"cannot sync /data/log.*EIO"):
        pin(DIRECTORY, "backup", 4, storage=disk)
    assert pins_of(disk.names(DIRECTORY))[0].lsn == 4


def disk_without_live_requests() -> Interrupted:
    disk = interrupted_disk()
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=1) as log:
        log.append(9, b"release c")
    return disk


def roll(disk: FaultyStorage) -> None:
    """A writer begins a new segment."""
    with Log.open(DIRECTORY, storage=disk, segment_bytes_max=1) as log:
        log.append(9, b"note")


ROLL_TICKS = count_ticks(roll)


@pytest.mark.parametrize("call", range(1, FLOOR_CALLS + 2))
def test_power_lost_in_a_pass_beside_a_writer_that_is_naming_a_segment_leaves_a_log(call: int) -> None:
    """The pass may see a segment whose name is not durable yet, and must not make a durable floor of it."""
    durable_lsn = len(RECORDS) + 1
    for at in range(1, ROLL_TICKS + 1):
        disk = disk_without_live_requests()
        retention = told(disk)

        def crash_a_pass(disk: Interrupted = disk, retention: Retention = retention) -> None:
            disk.faults = {len(disk.calls) + call: "crash"}
            retention.run_pass()

        disk.at, disk.meanwhile = at, crash_a_pass
        with pytest.raises(CrashError):
            roll(disk)
        for seed in range(8):
            after = disk.restart("mixed", seed)
            with Log.open(DIRECTORY, storage=after) as log:
                assert log.recovery.next_lsn in (durable_lsn + 1, durable_lsn + 2)


def read_beside_a_pass(at: int) -> tuple[list[Record], bool]:
    """What a reader gets if a pass runs before its call number `at`, and whether it was told of a drop."""
    disk = interrupted_disk()
    retention = told(disk)
    disk.at, disk.meanwhile = at, retention.run_pass  # type: ignore[assignment]
    found: list[Record] = []
    try:
        found.extend(Reader(DIRECTORY, storage=disk))
    except DroppedError:
        return found, True
    return found, False


def test_a_reader_beside_a_pass_reads_without_a_gap_or_is_told_of_the_drop() -> None:
    outcomes = set()
    for at in range(1, count_ticks(lsns) + 1):
        found, is_dropped = read_beside_a_pass(at)
        outcomes.add(is_dropped)
        numbers = [record.lsn for record in found]
        if is_dropped:
            assert numbers == list(range(3, 3 + len(numbers)))
        else:
            assert numbers in (list(range(3, len(RECORDS) + 1)), list(range(LIVE_FROM, len(RECORDS) + 1)))
    assert outcomes == {True, False}


def test_a_reader_that_pinned_first_reads_all_whenever_a_pass_runs() -> None:
    for at in range(1, count_ticks(lsns) + 1):
        disk = interrupted_disk()
        retention = told(disk)
        pin(DIRECTORY, "reader", storage=disk)
        disk.at, disk.meanwhile = at, retention.run_pass  # type: ignore[assignment]
        assert lsns(disk) == list(range(3, len(RECORDS) + 1))


def test_a_segment_lost_above_the_floor_is_a_storage_error_to_a_reader() -> None:
    disk = interrupted_disk()
    disk.at, disk.meanwhile = 3, lambda: disk.remove(DIRECTORY / segment_files(disk)[-1])
    with pytest.raises(StorageError, match=r"cannot read .*ENOENT"):
        lsns(disk)


def test_on_a_real_disk_pins_passes_and_a_writer_run_in_threads(tmp_path: Path) -> None:
    """A pinner in a thread of its own: what it pinned is there to be read, whenever the passes run."""
    log = Log.open(tmp_path, segment_bytes_max=1)
    retention = Retention(tmp_path, TextRequests())
    failures: list[str] = []
    is_over = threading.Event()

    def pin_and_read() -> None:
        while not is_over.is_set():
            lsn = pin(tmp_path, "thread")
            first = next((record.lsn for record in Reader(tmp_path)), lsn)
            if first > lsn:
                failures.append(f"pinned {lsn}, found {first}")
            unpin(tmp_path, "thread")

    thread = threading.Thread(target=pin_and_read)
    thread.start()
    dropped = 0
    for lsn in range(1, 151):
        log.append(9, b"note")
        log.sync()
        retention.add(Record(lsn, 9, b"note", "", 0))
        dropped += len(retention.run_pass().dropped)
    is_over.set()
    thread.join()
    dropped += len(retention.run_pass().dropped)
    log.close()
    assert failures == []
    assert dropped == 149
