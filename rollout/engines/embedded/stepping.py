"""The thread that owns all models and batches: it obeys, takes a turn, and tells the event loop what came of it.

The loop only posts commands; what the thread has to say comes back through `call_soon_threadsafe`, one
call a turn for all requests.  The C code releases the interpreter lock, so the loop runs while the model
steps.

Invariants:
1. However the thread ends, everybody who waits for it is told.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from rollout.engines.embedded.jobs import Outcome
from rollout.engines.embedded.versions import Versions
from rollout.errors import EngineError

CLOSED = "the engine is closed; open it before use"

T = TypeVar("T")
Told = Callable[[list[Outcome]], None]


class SteppingThread:
    """Steps `versions` from its making to `stop`.  All methods belong to the event loop that made it."""

    def __init__(self, versions: Versions, told: Told, ended: Callable[[], None]) -> None:
        """`told` gets the outcomes of each turn, in order; `ended` is called once, after the last of them."""
        self._told = told
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._posted: list[Callable[[Versions], object]] = []
        self._work = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._waiting: set[asyncio.Future[object]] = set()
        self._stand_still: list[asyncio.Future[object]] = []
        self._thread = threading.Thread(target=self._run, args=(versions,), name="embedded-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> EngineError | None:
        """What ended the thread, if it was not `stop`."""
        if self._failure is None:
            return None
        error = EngineError(f"the engine's thread failed: {self._failure!r}; close the engine and open it again")
        error.__cause__ = self._failure
        return error

    @property
    def error(self) -> EngineError | None:
        """Why nothing can be done any more, or None."""
        return self.failure or (EngineError(CLOSED) if self._closing else None)

    def post(self, command: Callable[[Versions], object]) -> None:
        """Have something done between two turns; nothing, if the thread has ended."""
        with self._work:
            if not self._closing:
                self._posted.append(command)
                self._work.notify()

    async def call(self, command: Callable[[Versions], T]) -> T:
        """What came of it, or the EngineError that it raised."""
        done: asyncio.Future[T] = self._future()

        def carry_out(versions: Versions) -> None:
            try:
                result = command(versions)
            except EngineError as error:
                self._call_loop(_fail, done, error)
            else:
                self._call_loop(_resolve, done, result)

        self.post(carry_out)
        return await done

    async def tell(self, command: Callable[[Versions], list[Outcome]]) -> None:
        """Outcomes that are not a turn's go the same way, in the same order, and whether or not anybody awaits this."""
        await self.call(lambda versions: self._call_loop(self._told, command(versions)))

    async def stood_still(self) -> None:
        """Return once nothing is being drawn, or nobody wants that any more."""
        done: asyncio.Future[object] = self._future()
        self.post(lambda _: self._stand_still.append(done))
        await done

    async def stop(self) -> None:
        """End the thread between two turns and free everything."""
        with self._work:
            self._closing = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    def _future(self) -> asyncio.Future[T]:
        if (error := self.error) is not None:
            raise error
        done: asyncio.Future[T] = self._loop.create_future()
        self._waiting.add(done)  # type: ignore[arg-type]
        done.add_done_callback(self._waiting.discard)
        return done

    def _run(self, versions: Versions) -> None:
        try:
            try:
                while self._obey(versions):
                    outcomes = versions.turn()
                    if outcomes:
                        self._call_loop(self._told, outcomes)
                    if self._stand_still and not versions.is_finishing:
                        for done in self._stand_still:
                            self._call_loop(_resolve, done, None)
                        self._stand_still.clear()
            finally:
                versions.close()
        except BaseException as error:  # nobody is above a thread: the callers are told, now and later
            self._failure = error
        finally:
            with self._work:
                self._closing = True
                self._posted.clear()
            self._call_loop(self._end)

    def _obey(self, versions: Versions) -> bool:
        """Carry out what the loop posted; wait for something to do.  False when closing."""
        with self._work:
            while not self._posted and not self._closing and versions.stands:
                self._work.wait()
            commands, self._posted = self._posted, []
            if self._closing:
                return False
        for command in commands:
            command(versions)
        return True

    def _call_loop(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop.is_closed():  # it ended without closing the engine: nobody is left to tell
            self._closing = True
            return
        self._loop.call_soon_threadsafe(function, *arguments)

    def _end(self) -> None:
        for done in [*self._waiting]:
            _fail(done, self.error or EngineError(CLOSED))
        self._ended()


def _resolve(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: EngineError) -> None:
    if not done.done():
        done.set_exception(error)
