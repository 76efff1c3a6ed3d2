"""The threads of blocking calls, made while there is room for them.

asyncio makes them when they are first needed.  A host whose table of processes is full gives none then, and a call
that frees something fails for the lack of one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from dsec.errors import HostUnfitError

ROOM_COUNT = 16
"""Threads and processes beside ours: gRPC's, which ends the program for the lack of one, the keeper and the spawner."""


async def start_threads() -> None:
    """Give the running loop as many threads as it would make in the end (`asyncio.to_thread`), all of them now.

    HostUnfitError where the host has no room for these and what starts next.
    """
    loop, count = asyncio.get_running_loop(), min(32, (os.cpu_count() or 1) + 4)
    threads, room = ThreadPoolExecutor(count, "dsec"), ThreadPoolExecutor(ROOM_COUNT, "dsec-room")
    all_run = threading.Barrier(count + ROOM_COUNT)
    runs: list[asyncio.Future[int]] = []
    try:
        while len(runs) < count + ROOM_COUNT:
            runs.append(loop.run_in_executor(threads if len(runs) < count else room, all_run.wait))
    except RuntimeError as error:
        all_run.abort()  # those that run wait for the others
        await asyncio.gather(*runs, return_exceptions=True)
        raise HostUnfitError(
            f"the host gave {len(runs)} of the {count + ROOM_COUNT} threads that an Edge starts with: "
            "end processes, or raise their bound (ulimit -u, or pids.max of the cgroup)"
        ) from error
    await asyncio.gather(*runs)
    room.shutdown()
    loop.set_default_executor(threads)
