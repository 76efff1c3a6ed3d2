"""An event loop on a thread of its own, for callers that have none.

One thread of the process serves all of them; every call waits for its coroutine there.  An
interrupted wait (Ctrl-C) cancels the coroutine and waits until it has tidied up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from dsec.errors import StateError

T = TypeVar("T")
_THREAD = "dsec client"


class Loop:
    """The thread with the event loop; begun by the first call, and anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result; raises what it raises.  StateError on the loop's own thread, which would wait for itself."""
        if threading.current_thread().name == _THREAD:
            coroutine.close()
            raise StateError("a blocking call from the client's own event loop: use AsyncSandbox there")
        loop = self._running()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: _settle(task, done))

        def give_up() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # interrupted before it was begun
                coroutine.close()
                done.cancel()

        try:
            loop.call_soon_threadsafe(begin)
            return done.result()
        except BaseException:
            if not done.done():
                loop.call_soon_threadsafe(give_up)
                concurrent.futures.wait([done])
            raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """One item at a time, asked for when it is wanted."""
        try:
            while (item := self.run(_next(items))) is not None:
                yield item
        finally:
            self.run(_close(items))

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name=_THREAD, daemon=True).start()
            return self._loop


def _settle(task: asyncio.Task[T], done: concurrent.futures.Future[T]) -> None:
    """Whatever came of it, the waiting thread gets it; also of a task that was cancelled before its first step."""
    if task.cancelled():
        done.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


async def _close(items: AsyncIterator[T]) -> None:
    """End what an abandoned iterator has under way."""
    if (close := getattr(items, "aclose", None)) is not None:
        await close()


LOOP = Loop()
