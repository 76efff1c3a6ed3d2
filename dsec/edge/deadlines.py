"""Deadlines: one heap and one task, whatever the number of sandboxes and leases.

What is due is looked at when its time comes and not before: a deadline that moved further away in the
meantime (a command ran, a lease was renewed) is simply put back.  So nothing is paid for a use.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from dsec.edge.clock import Clock

STALE_COUNT_MAX = 1024


class Deadlines:
    """Names and the moments at which they are due."""

    def __init__(self, clock: Clock, now: Callable[[], float], on_due: Callable[[str], float | None]) -> None:
        """`on_due(name)` is called at or after the moment; a later moment that it returns is the next one."""
        self._clock = clock
        self._now = now
        self._on_due = on_due
        self._heap: list[tuple[float, str]] = []
        self._due: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._watch(), name="deadlines")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def put(self, name: str, at_s: float) -> None:
        """Set or move a deadline."""
        self._due[name] = at_s
        heapq.heappush(self._heap, (at_s, name))
        if self._heap[0] == (at_s, name):
            self._changed.set()

    def drop(self, name: str) -> None:
        """Forget a deadline."""
        self._due.pop(name, None)
        if len(self._heap) > 2 * len(self._due) + STALE_COUNT_MAX:
            self._heap = [(at_s, name) for name, at_s in self._due.items()]
            heapq.heapify(self._heap)

    async def _watch(self) -> None:
        while True:
            self._changed.clear()
            await self._clock.wait(self._changed, self._run_due())

    def _run_due(self) -> float | None:
        """Tell of all that is due; seconds until the next, None if there is none."""
        while self._heap:
            at_s, name = self._heap[0]
            left_s = at_s - self._now()
            if self._due.get(name) == at_s:
                if left_s > 0:
                    return left_s
                del self._due[name]
                heapq.heappop(self._heap)
                following_s = self._on_due(name)
                if following_s is not None:
                    self.put(name, following_s)
            else:
                heapq.heappop(self._heap)
        return None
