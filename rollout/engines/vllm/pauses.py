"""Pauses of a vLLM server, which hold for all who use it."""

from __future__ import annotations

from rollout.engine import PauseMode
from rollout.engines.vllm.connection import CALL_S_MAX, Connection
from rollout.errors import EngineError

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
