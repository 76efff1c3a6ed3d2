"""Many callers, few syncs, each told about its own record."""

import asyncio
from pathlib import Path

import pytest

from wal import (
    ClosedError,
    FullError,
    GroupCommit,
    Log,
    PoisonedError,
    Reader,
    RecordTooLargeError,
    StorageError,
    SyncPolicy,
)
from wal.testing import FaultyStorage

DIRECTORY = Path("/log")


def lsns_by_payload(disk: FaultyStorage) -> dict[bytes, int]:
    return {record.payload: record.lsn for record in Reader(DIRECTORY, storage=disk)}


@pytest.mark.parametrize("policy", [SyncPolicy.always(), SyncPolicy.interval(1), SyncPolicy.os()])
def test_each_of_many_callers_gets_the_lsn_of_its_own_record(policy: SyncPolicy) -> None:
    disk = FaultyStorage()

    async def run() -> tuple[list[int], GroupCommit]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), policy)
        lsns = await asyncio.gather(*(commit.append(1, b"%d" % index) for index in range(500)))
        await commit.close()
        return lsns, commit

    lsns, commit = asyncio.run(run())
    assert lsns_by_payload(disk) == {b"%d" % index: lsn for index, lsn in enumerate(lsns)}
    assert sorted(lsns) == list(range(1, 501))
    assert commit.stats.records_count == 500
    assert commit.stats.groups_count < 50


def test_callers_share_syncs_and_the_statistics_say_so() -> None:
    disk = FaultyStorage()

    async def caller(commit: GroupCommit) -> None:
        for _ in range(5):
            await commit.append(1, b"x" * 8)

    async def run() -> GroupCommit:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk))
        await asyncio.gather(*(caller(commit) for _ in range(64)))
        await commit.close()
        return commit

    stats = asyncio.run(run()).stats
    assert stats.records_count == 320
    assert stats.bytes_count == 320 * 32
    assert 5 <= stats.syncs_count <= 20
    assert stats.sync_s > 0


def test_a_record_is_durable_when_its_caller_goes_on() -> None:
    disk = FaultyStorage()
    lost: list[int] = []

    async def caller(commit: GroupCommit, index: int) -> None:
        payload = b"%d" % index
        await commit.append(1, payload)
        if payload not in lsns_by_payload(disk.restart("synced")):
            lost.append(index)

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk))
        await asyncio.gather(*(caller(commit, index) for index in range(50)))
        await commit.close()

    asyncio.run(run())
    assert lost == []


def test_under_policy_os_nothing_is_synced_until_close() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), SyncPolicy.os())
        calls = len(disk.calls)
        await commit.append(1, b"a")
        assert disk.calls[calls:] == ["allocate", "write"]
        assert commit.stats.syncs_count == 0
        assert lsns_by_payload(disk) == {b"a": 1}
        await commit.close()
        assert disk.calls[calls:] == ["allocate", "write", "sync", "truncate", "sync", "close"]

    asyncio.run(run())


def test_a_failed_sync_reaches_every_caller_and_poisons_later_ones() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk))
        await commit.append(1, b"kept")
        disk.faults[len(disk.calls) + 1] = "ENOSPC"
        results = await asyncio.gather(*(commit.append(1, b"x") for _ in range(5)), return_exceptions=True)
        assert [type(result) for result in results] == [FullError] * 5
        assert len({id(result) for result in results}) == 5
        with pytest.raises(PoisonedError, match="ENOSPC"):
            await commit.append(1, b"late")
        await commit.close()

    asyncio.run(run())
    assert lsns_by_payload(disk.restart("synced")) == {b"kept": 1}


def test_callers_that_wait_for_the_next_group_are_told_that_the_log_is_poisoned() -> None:
    disk = FaultyStorage()

    async def run() -> list[BaseException | int]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), pending_bytes_max=64)
        disk.faults[len(disk.calls) + 1] = "EIO"
        results = await asyncio.gather(*(commit.append(1, b"x" * 8) for _ in range(6)), return_exceptions=True)
        await commit.close()
        return results

    kinds = [type(result) for result in asyncio.run(run())]
    assert kinds == [StorageError] * 2 + [PoisonedError] * 4


def test_waiting_records_are_bounded_and_all_arrive_in_order() -> None:
    disk = FaultyStorage()

    async def run() -> GroupCommit:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), pending_bytes_max=100)
        await asyncio.gather(*(commit.append(1, b"%08d" % index) for index in range(40)))
        await commit.close()
        return commit

    assert asyncio.run(run()).stats.groups_count >= 10
    assert list(lsns_by_payload(disk)) == [b"%08d" % index for index in range(40)]


def test_a_record_too_large_is_refused_alone() -> None:
    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=FaultyStorage(), record_bytes_max=10))
        good, bad = await asyncio.gather(
            commit.append(1, b"small"), commit.append(1, b"x" * 11), return_exceptions=True
        )
        assert good == 1
        assert isinstance(bad, RecordTooLargeError)
        await commit.close()

    asyncio.run(run())


def test_a_cancelled_caller_does_not_disturb_the_others() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk))
        tasks = [asyncio.create_task(commit.append(1, b"%d" % index)) for index in range(10)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[3], asyncio.CancelledError)
        for index, lsn in enumerate(results):
            assert index == 3 or lsns_by_payload(disk)[b"%d" % index] == lsn
        await commit.close()

    asyncio.run(run())


def test_close_commits_what_waits_and_then_refuses() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), SyncPolicy.interval(20))
        await commit.append(1, b"a")
        waiting = asyncio.create_task(commit.append(1, b"b"))
        await asyncio.sleep(0)
        await commit.close()
        assert await waiting == 2
        with pytest.raises(ClosedError):
            await commit.append(1, b"c")
        await commit.close()

    asyncio.run(run())
    assert lsns_by_payload(disk.restart("synced")) == {b"a": 1, b"b": 2}
    Log.open(DIRECTORY, storage=disk.restart("synced")).close()


def test_under_interval_the_syncs_are_as_few_as_the_time_allows() -> None:
    async def run() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        commit = GroupCommit(Log.open(DIRECTORY, storage=FaultyStorage()), SyncPolicy.interval(20))
        start_s = loop.time()
        for _ in range(5):
            await commit.append(1, b"x")
        spent_s = loop.time() - start_s
        syncs = commit.stats.syncs_count
        await commit.close()
        return syncs, spent_s

    syncs, spent_s = asyncio.run(run())
    assert syncs <= 1 + spent_s / 0.020 + 0.01


@pytest.mark.parametrize("text", ["always", "os", "interval(5)", "interval(0.5)"])
def test_a_policy_is_parsed(text: str) -> None:
    policy = SyncPolicy.parse(text)
    assert policy.mode == text.split("(", maxsplit=1)[0]
    assert policy.interval_ms == (float(text[9:-1]) if "(" in text else 0)


@pytest.mark.parametrize("text", ["never", "interval", "interval(0)", "interval(-1)", ""])
def test_a_senseless_policy_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"policy|interval_ms"):
        SyncPolicy.parse(text)
