"""A cancelled caller of `settled` learns of its cancellation only when the work is done."""

import asyncio

import pytest

from wal import settled


async def test_work_that_was_begun_ends_before_the_cancellation_arrives() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    caller = asyncio.create_task(settled(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()


async def test_a_result_and_an_error_come_through() -> None:
    async def give() -> int:
        return 3

    async def fail() -> None:
        raise ValueError("no")

    assert await settled(give()) == 3
    with pytest.raises(ValueError, match="no"):
        await settled(fail())


async def test_work_that_cancels_itself_is_heard_as_that() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await settled(work())


async def test_a_second_cancellation_does_not_cut_the_work_short() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    caller = asyncio.create_task(settled(work()))
    await asyncio.sleep(0)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
    assert not caller.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()


async def test_a_caller_that_is_cancelled_with_its_work_hears_of_it_once() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise asyncio.CancelledError

    caller = asyncio.create_task(settled(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
