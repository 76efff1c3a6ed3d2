"""The threads of blocking calls, made while there is room for them.

asyncio makes them when they are first needed.  A host whose table of processes is full gives none then, and a call
that frees something fails for the lack of one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor


async def start_threads() -> None:
    """Give the running loop as many threads as it would make in the end (`asyncio.to_thread`), all of them now."""
    loop, count = asyncio.get_running_loop(), min(32, (os.cpu_count() or 1) + 4)
    threads = ThreadPoolExecutor(count, "dsec")
    all_run = threading.Barrier(count)
    await asyncio.gather(*(loop.run_in_executor(threads, all_run.wait) for _ in range(count)))
    loop.set_default_executor(threads)
