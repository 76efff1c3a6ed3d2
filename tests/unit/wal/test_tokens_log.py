"""The writer of token records: its state is what a reader of its log will see, whatever happens."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from wal import (
    ClosedError,
    GroupCommit,
    Log,
    PoisonedError,
    Reader,
    RecordInvalidError,
    RecordTooLargeError,
    StorageError,
    SyncPolicy,
)
from wal.errors import StreamError
from wal.fold import TokenFold
from wal.testing import FaultyStorage
from wal.token_log import TokenLog
from wal.tokens import RoutesRecorded

DIRECTORY = Path("/log")
ROUTES = RoutesRecorded(0, 0, 1, 1, 4, 1, 2, 1, b"\1", b"\1\2")


def fold_of(disk: FaultyStorage) -> TokenFold:
    fold = TokenFold()
    for record in Reader(DIRECTORY, storage=disk):
        fold.add(record)
    return fold


def told(fold: TokenFold) -> dict[str, tuple[object, ...]]:
    return {
        name: (s.slot, s.status, s.reason, list(s.token_ids), s.policy_versions, s.kv_breaks, s.routes, s.last_lsn)
        for name, s in fold.streams.items()
    }


def writer(disk: FaultyStorage | None = None, **bounds: int) -> TokenLog:
    log = Log.open(DIRECTORY, storage=disk or FaultyStorage())
    return TokenLog(GroupCommit(log, **bounds), TokenFold())


async def test_requests_get_the_lowest_free_slot() -> None:
    log = writer()
    assert [await log.open(name) for name in "abc"] == [0, 1, 2]
    await log.close_request("b", "stop")
    await log.close_request(0, "stop")
    assert [await log.open(name) for name in "def"] == [0, 1, 3]


async def test_what_is_written_is_what_a_reader_folds() -> None:
    disk = FaultyStorage()
    log = writer(disk)
    for name in "ab":
        await log.open(name)
    await log.append([0, 1], [10, 20], [-0.5, -1.0], 3)
    await log.append(array("I", [0, 1]), array("I", [11, 21]), array("f", [-0.5, -1.0]), 3)
    await log.append([1, 0], [22, 23, 12], [-0.5] * 3, [4, 3], counts=[2, 1])
    await log.append([1, 0], [24, 13], [-0.5] * 2, [4, 3])
    await log.append([1, 0], [25, 14], [-0.5] * 2, [4, 3])
    await log.append([1, 0], [26, 27, 15], [-0.5] * 3, 5, counts=[2, 1])
    await log.break_kv(0, 2, "rebuilt")
    await log.record_routes(ROUTES)
    await log.close_request(0, "stop")
    lsn = await log.acknowledge(["a"])
    assert lsn == log.fold.lsn == 12
    assert told(log.fold) == told(fold_of(disk))
    assert list(log.fold.streams["b"].token_ids) == [20, 21, 22, 23, 24, 25, 26, 27]
    assert log.fold.streams["b"].policy_versions == [(0, 2, 3), (2, 4, 4), (6, 2, 5)]
    assert log.fold.streams["a"].policy_versions == [(0, 5, 3), (5, 1, 5)]


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda log: log.append([5], [1], [0.0], 1), StreamError, "slot 5 stands for no open request"),
        (lambda log: log.append([0, 0], [1, 1], [0.0, 0.0], 1), RecordInvalidError, "slots must be distinct"),
        (lambda log: log.append([0], [1, 2], [0.0, 0.0], 1), RecordInvalidError, "token_ids must be as many"),
        (lambda log: log.append([0], [1], [float("nan")], 1), RecordInvalidError, "logprobs must be finite"),
        (lambda log: log.append([0], [1], [0.0], -1), RecordInvalidError, "policy version"),
        (lambda log: log.append([0], [1], [0.0], [1, 1]), RecordInvalidError, "must cover the 1 slots, cover 2"),
        (lambda log: log.append([0], [1] * 30, [0.0] * 30, 1, [30]), RecordTooLargeError, "record_bytes_max = 200"),
        (lambda log: log.open("a"), StreamError, "it is opened as slot 1 but is open as slot 0"),
        (lambda log: log.close_request("b", ""), StreamError, "knows no such request"),
        (lambda log: log.acknowledge(["a"]), StreamError, "acknowledged before its close"),
        (lambda log: log.break_kv("a", 2, "kept"), StreamError, "breaks at 2, the stream has 1"),
        (lambda log: log.record_routes(ROUTES), StreamError, "do not fit"),
    ],
)
async def test_a_refused_call_writes_nothing(
    call: Callable[[TokenLog], Awaitable[int]], error: type[Exception], why: str
) -> None:
    disk = FaultyStorage()
    log = TokenLog(GroupCommit(Log.open(DIRECTORY, storage=disk, record_bytes_max=200)), TokenFold())
    await log.open("a")
    await log.append([0], [7], [-1.0], 1)
    await log.record_routes(ROUTES)
    with pytest.raises(error, match=why):
        await call(log)
    assert await log.append([0], [8], [-1.0], 1) == 4
    assert told(log.fold) == told(fold_of(disk))


async def test_steps_may_be_issued_before_the_one_before_is_durable() -> None:
    disk = FaultyStorage()
    log = TokenLog(GroupCommit(Log.open(DIRECTORY, storage=disk), SyncPolicy.interval(5)), TokenFold())
    calls = [log.open("a"), log.open("b")]
    calls += [log.append([0, 1], [i, 100 + i], [-1.0] * 2, i // 10) for i in range(50)]
    calls += [log.close_request(0, "stop"), log.open("c"), log.append([0, 1], [200, 150], [-1.0] * 2, 5)]
    results = await asyncio.gather(*calls)
    assert (results[:2], results[2:52], results[53]) == ([0, 1], list(range(3, 53)), 0)
    streams = fold_of(disk).streams
    assert list(streams["a"].token_ids) == list(range(50))
    assert list(streams["b"].token_ids) == list(range(100, 151))
    assert list(streams["c"].token_ids) == [200]


async def test_order_holds_while_the_log_has_no_room() -> None:
    """Every call waits for room; no later one passes an earlier one, and one that is cancelled leaves nothing."""
    disk = FaultyStorage()
    log = writer(disk, pending_bytes_max=1)
    await log.open("a")
    tasks = [asyncio.ensure_future(log.append([0], [i], [-1.0], 0)) for i in range(20)]
    await asyncio.sleep(0)
    tasks[7].cancel()
    tasks.append(asyncio.ensure_future(log.append([0], [20], [-1.0], 0)))
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[7], asyncio.CancelledError)
    assert list(fold_of(disk).streams["a"].token_ids) == [i for i in range(21) if i != 7]
    assert told(log.fold) == told(fold_of(disk))


async def test_a_record_counts_though_its_caller_was_cancelled_while_it_was_synced() -> None:
    disk = FaultyStorage()
    log = writer(disk)
    await log.open("a")
    task = asyncio.ensure_future(log.append([0], [1], [-1.0], 0))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await log.append([0], [2], [-1.0], 0)
    assert list(fold_of(disk).streams["a"].token_ids) == [1, 2]


async def test_after_a_failure_of_the_log_the_writer_refuses_on() -> None:
    disk = FaultyStorage()
    log = writer(disk)
    await log.open("a")
    disk.faults = {len(disk.calls) + 1: "EIO"}
    with pytest.raises(StorageError):
        await log.append([0], [1], [-1.0], 0)
    for call in (lambda: log.append([0], [2], [-1.0], 0), lambda: log.open("b"), lambda: log.close_request(0, "")):
        with pytest.raises(PoisonedError):
            await call()


async def test_a_closed_log_is_told_apart() -> None:
    commit = GroupCommit(Log.open(DIRECTORY, storage=FaultyStorage()))
    log = TokenLog(commit)
    await log.open("a")
    await commit.close()
    with pytest.raises(ClosedError):
        await log.append([0], [1], [-1.0], 0)


async def test_a_writer_goes_on_only_from_the_fold_of_its_log() -> None:
    disk = FaultyStorage()
    commit = GroupCommit(Log.open(DIRECTORY, storage=disk))
    await TokenLog(commit).open("a")
    await commit.close()
    reopened = GroupCommit(Log.open(DIRECTORY, storage=disk))
    with pytest.raises(ValueError, match="the fold ends with lsn 0, the log was opened with 1: fold it first"):
        TokenLog(reopened)
    stranger = fold_of(disk)
    stranger.lsn = 9
    with pytest.raises(ValueError, match="the fold ends with lsn 9"):
        TokenLog(reopened, stranger)
    assert await TokenLog(reopened, fold_of(disk)).open("b") == 1


async def test_a_run_that_crashes_after_every_record_ends_like_one_that_does_not() -> None:
    """Power is lost after each call; the next writer resumes from the log and makes the next call."""
    calls: list[Callable[[TokenLog], Awaitable[int]]] = [
        lambda log: log.open("a"),
        lambda log: log.open("b"),
        lambda log: log.append([0, 1], [10, 20], [-1.0] * 2, 1),
        lambda log: log.append([0, 1], [11, 21], [-1.0] * 2, 1),
        lambda log: log.append([1, 0], [22, 23, 12], [-1.0] * 3, 2, [2, 1]),
        lambda log: log.break_kv("a", 3, "rebuilt"),
        lambda log: log.close_request(0, "stop"),
        lambda log: log.open("c"),
        lambda log: log.append([0, 1], [30, 24], [-1.0] * 2, [2, 3]),
        lambda log: log.record_routes(ROUTES),
        lambda log: log.acknowledge(["a"]),
        lambda log: log.append([0, 1], [31, 25], [-1.0] * 2, [2, 3]),
    ]
    steady, crashing = FaultyStorage(), FaultyStorage()
    log = writer(steady)
    for call in calls:
        await call(log)
        commit = GroupCommit(Log.open(DIRECTORY, storage=crashing))
        await call(TokenLog(commit, fold_of(crashing)))
        crashing = crashing.restart("synced")
        assert told(fold_of(crashing)) == told(log.fold)


async def test_of_two_who_wait_for_one_step_a_cancelled_one_takes_nobody_with_him() -> None:
    log = TokenLog(GroupCommit(Log.open(DIRECTORY, storage=FaultyStorage()), SyncPolicy.interval(20)))
    await log.open("a")
    written = log.append([0], [1], [-1.0], 1)

    async def client() -> int:
        return await written

    clients = [asyncio.create_task(client()) for _ in range(2)]
    await asyncio.sleep(0)
    clients[0].cancel()
    assert await clients[1] == 2
    assert await written == 2
    assert clients[0].cancelled()
