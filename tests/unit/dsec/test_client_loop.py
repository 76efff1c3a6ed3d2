"""Blocking calls on a loop of another thread: results, errors, and interrupts at every moment."""

import asyncio
import signal
import threading

import pytest

from dsec.client.loop import Loop


async def double(number: int) -> int:
    return 2 * number


async def fail() -> None:
    raise LookupError("gone")


def test_a_call_gives_what_its_coroutine_gives() -> None:
    loop = Loop()
    assert loop.run(double(21)) == 42
    with pytest.raises(LookupError, match="gone"):
        loop.run(fail())


def test_a_call_that_is_interrupted_before_its_first_step_ends() -> None:
    """The loop's thread is kept busy, so the interrupt comes before the coroutine has begun."""
    loop = Loop()
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        may_go.wait()

    loop._running().call_soon_threadsafe(hold)
    is_held.wait()
    main = threading.main_thread().ident
    threading.Timer(0.05, lambda: (signal.pthread_kill(main, signal.SIGINT), may_go.set())).start()
    with pytest.raises(KeyboardInterrupt):
        loop.run(double(1))
    assert loop.run(double(2)) == 4


def test_an_interrupted_call_has_tidied_up_when_it_ends() -> None:
    loop = Loop()
    steps = []

    async def work() -> None:
        steps.append("begun")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("tidy")

    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert steps == ["begun", "tidy"]
