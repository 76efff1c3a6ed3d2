"""Who listens to a job: each watcher has a bounded queue of the job's durable events.

A watcher that falls behind its bound loses its queue at once and is told so when it reads on; it
attaches again and reads the ledger.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from typing import Self

from dsec.errors import DsecError, ResourceExhaustedError, UnreachableError
from rollout.events import RolloutEvent

Numbered = tuple[int, RolloutEvent]
"""An event behind the number of its log record."""


class Watch:
    """One watcher's events, in order; `aclose` lets go of it, also if it was never iterated."""

    def __init__(self, watchers: Watchers, request_id: str) -> None:
        self._watchers = watchers
        self._request_id = request_id
        self._kept: deque[Numbered | None] = deque()
        self._arrived = asyncio.Event()
        self._error: DsecError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Numbered:
        """The next event and its lsn.

        ResourceExhaustedError if events were lost since, and what the watch was broken off with.
        """
        while not self._kept and self._error is None:
            self._arrived.clear()
            await self._arrived.wait()
        if self._error is not None:
            raise self._error
        if (event := self._kept.popleft()) is None:
            raise StopAsyncIteration
        return event

    def holds(self, lsn: int) -> bool:
        """Whether the next event is of this record, too; all events of a record come at once."""
        return bool(self._kept) and self._kept[0] is not None and self._kept[0][0] == lsn

    async def aclose(self) -> None:
        """No event will be kept any more."""
        self._watchers.drop(self._request_id, self)

    def put(self, event: Numbered | None) -> None:
        """Keep an event (None: the last one was before); beyond the bound, keep nothing any more."""
        if event is not None and len(self._kept) >= self._watchers.events_count_max:
            lost = self._kept[0] or event
            self.break_off(
                ResourceExhaustedError(
                    f"this watcher of {self._request_id!r} fell more than {self._watchers.events_count_max} events "
                    f"behind: attach again from event {lost[0]}"
                )
            )
            self._watchers.drop(self._request_id, self)
        else:
            self._kept.append(event)
            self._arrived.set()

    def break_off(self, error: DsecError) -> None:
        """End with an error, now."""
        self._error = error
        self._kept.clear()
        self._arrived.set()


class Watchers:
    """Request id -> those who watch it."""

    def __init__(self, events_count_max: int) -> None:
        """`events_count_max` bounds what is kept for one watcher."""
        self.events_count_max = events_count_max
        self._watches: dict[str, list[Watch]] = defaultdict(list)
        self._sent_away: DsecError | None = None

    @property
    def count(self) -> int:
        """Watches that are kept."""
        return sum(map(len, self._watches.values()))

    def publish(self, request_id: str, event: RolloutEvent, lsn: int) -> None:
        """Hand a durable event to everyone who watches the job; events come in the order of the log."""
        if request_id in self._watches:
            for watch in [*self._watches[request_id]]:
                watch.put((lsn, event))

    def close(self, request_id: str) -> None:
        """No more events will come: every watch of the job ends."""
        for watch in self._watches.pop(request_id, ()):
            watch.put(None)

    def send_away(self) -> None:
        """End every watch, also each that comes later, with an UnreachableError: it goes on elsewhere, or not now."""
        error = UnreachableError("the job that is followed here is being left by this process: ask again")
        self._sent_away = error
        for watches in self._watches.values():
            for watch in watches:
                watch.break_off(error)
        self._watches.clear()

    def watch(self, request_id: str, *, is_live: bool) -> Watch:
        """Events from now on; registered before this returns, so nothing is missed."""
        watch = Watch(self, request_id)
        if self._sent_away is not None:
            watch.break_off(self._sent_away)
        elif is_live:
            self._watches[request_id].append(watch)
        else:
            watch.put(None)
        return watch

    def drop(self, request_id: str, watch: Watch) -> None:
        """Forget a watch, if it is still known."""
        known = self._watches.get(request_id, [])
        if watch in known:
            known.remove(watch)
        if not known:
            self._watches.pop(request_id, None)
