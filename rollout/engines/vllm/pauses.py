"""Pauses of a vLLM server, which hold for all who use it.

A server does not know who paused it.  So who did keeps that in mind, and ends no pause but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rollout.engine import PauseMode
from rollout.engines.vllm.connection import CALL_S_MAX, Connection
from rollout.errors import EngineError, RolloutError

DRAIN_S_MAX = 10.0
"""Until a server that is to finish what it draws is asked whether it is still there."""
ASKED_S_MAX = 10.0
"""For its answer to that."""


async def pause_server(connection: Connection, mode: PauseMode) -> None:
    """Have a server draw no more.  EngineError.

    In "wait" the answers of others take as long as they do; but a server whose scheduler says nothing has failed.
    """
    call_s_max = DRAIN_S_MAX if mode == "wait" else CALL_S_MAX
    while True:
        try:  # without the flag it would forget its prefix cache
            await connection.post(f"/pause?mode={mode}&clear_cache=false", call_s_max=call_s_max)
        except EngineError as error:
            if mode != "wait" or not error.is_absent:
                raise
            await connection.get("/is_paused", call_s_max=ASKED_S_MAX)
        else:
            return


class Pause:
    """The one that an engine made, or is to make: `mode`, None without one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.mode: PauseMode | None = None
        self.holds_server = False
        """The server may be paused, by us."""
        self._may_begin = asyncio.Event()
        self._may_begin.set()

    async def begin(self, mode: PauseMode) -> None:
        """Have the server draw no more.  EngineError."""
        await self._may_begin.wait()
        self.holds_server = True
        await pause_server(self._connection, mode)

    async def end(self, call_s_max: float = CALL_S_MAX) -> None:
        """Have it draw again.  EngineError."""
        await self._connection.post("/resume", call_s_max=call_s_max)
        self.holds_server = False

    @contextlib.asynccontextmanager
    async def lifted(self) -> AsyncIterator[None]:
        """The server draws meanwhile, and what it still draws at the end is aborted; a pause waits for that.

        EngineError.
        """
        self._may_begin.clear()
        try:
            try:
                await self.end()
                yield
            finally:
                self.holds_server = True
                await pause_server(self._connection, "abort")
        finally:
            self._may_begin.set()

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
        """End it, whatever the engine's connection is; the server may be gone."""
        if self.mode is None:
            return
        if not self._connection.is_open:
            await self._connection.open()
        with contextlib.suppress(RolloutError):
            await self.end(CALL_S_MAX / 10)
        self.mode = None
