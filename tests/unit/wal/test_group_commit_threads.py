"""Where a group commit runs, and what it does when it is interrupted, cancelled or closed."""

import asyncio
import errno
import itertools
import threading
from pathlib import Path

import pytest

from wal import GroupCommit, Log, PoisonedError, Reader, StorageError, SyncPolicy, WalError
from wal.testing import Fault, FaultyStorage

DIRECTORY = Path("/log")


def lsns_by_payload(disk: FaultyStorage) -> dict[bytes, int]:
    return {record.payload: record.lsn for record in Reader(DIRECTORY, storage=disk)}


class WatchedStorage(FaultyStorage):
    """Notes the thread of each sync, and raises what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.interruption: BaseException | None = None

    def count(self, call: str) -> Fault | None:
        if call == "sync":
            self.threads.append(threading.get_ident())
            if self.interruption is not None:
                raise self.interruption
        return super().count(call)


@pytest.mark.parametrize(
    ("policy", "inline_s_max", "is_inline"),
    [(SyncPolicy.always(), 60.0, True), (SyncPolicy.always(), 0.0, False), (SyncPolicy.interval(0.1), 60.0, True)],
)
def test_syncs_run_on_the_loop_while_they_are_fast_and_in_a_thread_otherwise(
    policy: SyncPolicy, inline_s_max: float, is_inline: bool
) -> None:
    disk = WatchedStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), policy, inline_s_max=inline_s_max)
        disk.threads.clear()
        for _ in range(4):
            await commit.append(1, b"x")
        here = threading.get_ident()
        assert [thread == here for thread in disk.threads] == [False, is_inline, is_inline, is_inline]
        await commit.close()

    asyncio.run(run())


def test_one_slow_sync_sends_the_next_ones_to_the_thread_and_fast_ones_bring_them_back() -> None:
    clock = iter(float(time_s) for time_s in itertools.accumulate([0, 0.1, 0, 0.1, 0, 50, *[0, 0.1] * 60]))
    disk = WatchedStorage()

    async def run() -> list[bool]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), inline_s_max=1.0, clock=lambda: next(clock))
        disk.threads.clear()
        for _ in range(60):
            await commit.append(1, b"x")
        here = threading.get_ident()
        told = [thread == here for thread in disk.threads]
        await commit.close()
        return told

    told = asyncio.run(run())
    assert told[:4] == [False, True, True, False]
    back = told.index(True, 3)
    assert told[back:] == [True] * (60 - back)
    assert 20 < back < 40


@pytest.mark.parametrize("inline_s_max", [0.0, 60.0])
def test_an_interrupted_commit_fails_its_callers_and_poisons(inline_s_max: float) -> None:
    disk = WatchedStorage()
    results: list[object] = []

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), inline_s_max=inline_s_max)
        await commit.append(1, b"kept")
        disk.interruption = KeyboardInterrupt()
        results.extend(await asyncio.gather(*(commit.append(1, b"x") for _ in range(2)), return_exceptions=True))
        with pytest.raises(PoisonedError):
            await commit.append(1, b"late")
        await commit.close()

    loop = asyncio.new_event_loop()
    task = loop.create_task(run())
    if inline_s_max:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
    loop.run_until_complete(task)
    loop.close()
    assert [str(result) for result in results] == ["the commit of a group was interrupted"] * 2
    assert lsns_by_payload(disk) == {b"kept": 1, b"x": 3}


def test_a_caller_cancelled_during_a_failing_commit_is_left_alone() -> None:
    disk = FaultyStorage()

    async def run() -> list[object]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), SyncPolicy.interval(20), pending_bytes_max=32)
        await commit.append(1, b"kept")
        disk.faults[len(disk.calls) + 1] = "EIO"
        tasks = [asyncio.create_task(commit.append(1, b"x")) for _ in range(2)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await commit.close()
        return [*results]

    kinds = [type(result) for result in asyncio.run(run())]
    assert kinds == [asyncio.CancelledError, PoisonedError]


class HeldStorage(FaultyStorage):
    """A sync waits until it may go on, and then fails."""

    is_held = False

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_fail = threading.Event(), threading.Event()

    def count(self, call: str) -> Fault | None:
        if call == "sync" and self.is_held:
            self.begun.set()
            self.may_fail.wait(30)
            raise OSError(errno.EIO, "broken")
        return super().count(call)


def test_who_waits_behind_a_failing_group_is_told_and_who_was_cancelled_is_left_alone() -> None:
    disk = HeldStorage()

    async def run() -> list[object]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), inline_s_max=0.0)
        disk.is_held = True
        tasks = [asyncio.create_task(commit.append(1, b"in the group"))]
        await asyncio.to_thread(disk.begun.wait, 30)
        tasks += [asyncio.create_task(commit.append(1, b"behind it")) for _ in range(2)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        disk.may_fail.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await commit.close()
        return [*results]

    kinds = [type(result) for result in asyncio.run(run())]
    assert kinds == [StorageError, asyncio.CancelledError, PoisonedError]


def test_a_cancelled_close_goes_on_and_a_second_one_waits_for_it() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), SyncPolicy.interval(20))
        await commit.append(1, b"a")
        waiting = asyncio.create_task(commit.append(1, b"b"))
        await asyncio.sleep(0)
        first = asyncio.create_task(commit.close())
        await asyncio.sleep(0)
        first.cancel()
        second, third = (asyncio.create_task(commit.close()) for _ in range(2))
        await asyncio.gather(second, third)
        assert first.cancelled()
        assert waiting.done()

    asyncio.run(run())
    assert lsns_by_payload(disk.restart("synced")) == {b"a": 1, b"b": 2}
    Log.open(DIRECTORY, storage=disk).close()


def test_it_closes_when_its_block_is_left() -> None:
    disk = FaultyStorage()

    async def run() -> None:
        async with GroupCommit(Log.open(DIRECTORY, storage=disk)) as commit:
            await commit.append(1, b"a")

    asyncio.run(run())
    Log.open(DIRECTORY, storage=disk).close()


def test_another_event_loop_is_refused() -> None:
    commit = GroupCommit(Log.open(DIRECTORY, storage=FaultyStorage()))
    assert asyncio.run(commit.append(1, b"a")) == 1
    with pytest.raises(WalError, match="/log is written from another event loop"):
        asyncio.run(commit.append(1, b"b"))
    asyncio.run(commit.close())


@pytest.mark.parametrize("inline_s_max", [0.0, 60.0])
def test_a_commit_that_fails_is_told_wherever_it_ran(inline_s_max: float) -> None:
    disk = FaultyStorage()

    async def run() -> list[object]:
        commit = GroupCommit(Log.open(DIRECTORY, storage=disk), inline_s_max=inline_s_max)
        await commit.append(1, b"kept")
        disk.faults[len(disk.calls) + 1] = "EIO"
        results = await asyncio.gather(*(commit.append(1, b"x") for _ in range(3)), return_exceptions=True)
        await commit.close()
        return [*results]

    assert [type(result) for result in asyncio.run(run())] == [StorageError] * 3
