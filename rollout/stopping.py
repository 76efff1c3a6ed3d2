"""SIGINT and SIGTERM, as something that a process waits for beside its work."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def stop_signal() -> asyncio.Future[signal.Signals]:
    """Done with SIGINT or SIGTERM, whichever comes first; neither ends the process by itself any more."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not came.done():
            came.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return came


async def done_before(stopped: asyncio.Future[signal.Signals], work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, unless a signal comes first: then it is cancelled, and False when it has ended."""
    working = asyncio.create_task(work)
    ends: list[asyncio.Future[Any]] = [working, stopped]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
