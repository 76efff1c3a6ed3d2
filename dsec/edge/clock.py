"""Time on one host, on one axis that a jump of the wall clock does not move.

Deadlines must pass while the machine sleeps, must not pass early or late because somebody set the
wall clock, and must mean the same to the next process.  So the axis is CLOCK_BOOTTIME plus an
anchor: what the wall clock said at boot, as the first Edge of this boot saw it and wrote into the
journal.  A moment is then a number of seconds since 1970 that people can read, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Protocol

LOOK_S_MAX = 5.0
"""A loop's timer stands still while the machine sleeps; after this long it is looked again."""


class Clock(Protocol):
    """The three things a host knows about time, and a way to wait."""

    boot_id: str
    """Another one after each boot."""

    def wall_s(self) -> float:
        """Seconds since 1970; may jump."""
        ...

    def boot_s(self) -> float:
        """Seconds since boot, sleep included; never jumps."""
        ...

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        """Return when the event is set, or when so much time has passed, or earlier: the caller looks again."""
        ...


class HostClock:
    """The real one."""

    def __init__(self) -> None:
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def wall_s(self) -> float:
        """See Clock."""
        return time.time()

    def boot_s(self) -> float:
        """See Clock."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        """See Clock."""
        limit_s = None if timeout_s is None else min(max(timeout_s, 0.0), LOOK_S_MAX)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await event.wait()
