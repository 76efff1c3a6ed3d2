"""Pauses of a vLLM server, which hold for all who use it.

A server does not know who paused it.  So who did keeps that in mind, and ends no pause but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rollout.engine import PauseMode
from rollout.engines.vllm.connection import CALL_S_MAX, Connection
from rollout.engines.vllm.facts import read_label
from rollout.errors import EngineError, RolloutError

DRAIN_S_MAX = 10.0
"""Until a server that is to finish what it draws is asked whether it is still there."""
ASKED_S_MAX = 10.0
"""For its answer to that."""


class Pause:
    """The one that an engine made, or is to make: `mode`, None without one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.mode: PauseMode | None = None
        self.holds_server = False
        """The server may be paused, by us."""
        self._asked_count = 0
        self._telling = asyncio.Lock()
        """So that the server is told to end one pause before it is told to begin the next."""

    def ask(self, mode: PauseMode | None) -> int:
        """What is wanted from now on, before the server is told; a number for `take_back`."""
        self.mode = mode
        self._asked_count += 1
        return self._asked_count

    def take_back(self, number: int, mode: PauseMode | None) -> None:
        """What was asked for cannot be done: `mode` is wanted as before, unless somebody has asked for more since."""
        if number == self._asked_count:
            self.mode = mode

    async def begin(self, mode: PauseMode) -> None:
        """Have the server draw no more.  EngineError."""
        if mode == "wait":
            await self._drain()
            return
        async with self._telling:
            self.holds_server |= self._connection.is_open  # else nothing is sent
            await self._post(mode, CALL_S_MAX)

    async def _drain(self) -> None:
        """Have it finish what it draws, while that is wanted.  EngineError.

        The answers of others take as long as they do; but a server whose scheduler says nothing has failed.
        """
        while True:
            async with self._telling:
                if self.mode != "wait":
                    return  # it may be resumed already, and nobody would end another pause
                self.holds_server |= self._connection.is_open
            try:
                await self._post("wait", DRAIN_S_MAX)
            except EngineError as error:
                if not error.is_absent:
                    raise
                await self._connection.get("/is_paused", call_s_max=ASKED_S_MAX)
            else:
                return

    async def _post(self, mode: PauseMode, call_s_max: float) -> None:
        # without the flag it would forget its prefix cache
        await self._connection.post(f"/pause?mode={mode}&clear_cache=false", call_s_max=call_s_max)

    async def _resume(self) -> None:
        await self._connection.post("/resume")
        self.holds_server = False

    async def end(self) -> None:
        """Have it draw again.  EngineError."""
        async with self._telling:
            await self._resume()

    @contextlib.asynccontextmanager
    async def lifted(self) -> AsyncIterator[None]:
        """The server draws meanwhile, and what it still draws at the end is aborted; a pause waits for that.

        EngineError.
        """
        async with self._telling:
            try:
                await self._resume()
                yield
            finally:
                self.holds_server |= self._connection.is_open
                await self._post("abort", CALL_S_MAX)

    async def find(self, *, is_first: bool) -> None:
        """Agree with a server that is opened: who does so first ends any pause; later, ours lasts if it has a mode.

        EngineError: another's.
        """
        if await self._connection.get("/is_paused") == {"is_paused": False}:
            self.mode, self.holds_server = None, False  # it was started again since
        elif is_first or (self.holds_server and self.mode is None):
            await self.end()
        elif self.mode is None:
            raise EngineError("somebody else paused it, and must resume it")

    async def leave(self) -> None:
        """End it, whatever the engine's connection is; the server may be gone.

        Not while weights change there: who changes them ends it, or nobody can, and none may draw.
        """
        if self.mode is None and not self.holds_server:
            return
        if not self._connection.is_open:
            await self._connection.open()
        with contextlib.suppress(RolloutError, TimeoutError):
            async with asyncio.timeout(CALL_S_MAX / 10):
                await read_label(self._connection)
                await self.end()
        self.ask(None)
