"""Who listens to a job: each watcher has a bounded queue of the job's durable events.

A watcher that falls behind its bound is told so and dropped; it attaches again and reads the ledger.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator

from rollout.errors import RequestError
from rollout.events import Event


class Watchers:
    """Request id -> the queues of those who watch it."""

    def __init__(self, events_count_max: int) -> None:
        """`events_count_max` bounds what is kept for one watcher."""
        self._events_count_max = events_count_max
        self._queues: dict[str, list[asyncio.Queue[Event | None]]] = defaultdict(list)

    def publish(self, request_id: str, event: Event) -> None:
        """Hand a durable event to everyone who watches the job."""
        for queue in self._queues.get(request_id, ()):
            if queue.qsize() <= self._events_count_max:
                queue.put_nowait(event)

    def close(self, request_id: str) -> None:
        """No more events will come: every watch of the job ends."""
        for queue in self._queues.pop(request_id, ()):
            queue.put_nowait(None)

    def watch(self, request_id: str, *, is_live: bool) -> AsyncGenerator[Event, None]:
        """Events from now on; registered before this returns, so nothing is missed."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        if is_live:
            self._queues[request_id].append(queue)
        else:
            queue.put_nowait(None)
        return self._drain(request_id, queue)

    async def _drain(self, request_id: str, queue: asyncio.Queue[Event | None]) -> AsyncGenerator[Event, None]:
        try:
            while (event := await queue.get()) is not None:
                if queue.qsize() >= self._events_count_max:
                    raise RequestError(f"watcher of {request_id!r} fell {queue.qsize()} events behind: attach again")
                yield event
        finally:
            if queue in self._queues.get(request_id, ()):
                self._queues[request_id].remove(queue)
