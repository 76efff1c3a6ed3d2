"""Which jobs have rollouts that run or wait to, and who waits until none of a job does.

A job that is at rest has no entry here, so what is remembered is bounded by what is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class _Job:
    def __init__(self) -> None:
        self.rollout_ids: set[str] = set()
        self.ends_count = 0
        self.ends = asyncio.Lock()
        self.is_at_rest = asyncio.Event()


class Activity:
    """What is under way, by request id."""

    def __init__(self, rests: Callable[[str], None]) -> None:
        """`rests` hears of each job that comes to rest."""
        self._rests = rests
        self._jobs: dict[str, _Job] = {}

    @property
    def rollouts_count(self) -> int:
        """Rollouts that run or wait to."""
        return sum(len(job.rollout_ids) for job in self._jobs.values())

    def is_live(self, request_id: str) -> bool:
        """Whether a rollout of the job runs, waits to, or is being ended."""
        return request_id in self._jobs

    def begin(self, request_id: str, rollout_id: str) -> None:
        """A rollout runs or waits to."""
        self._jobs.setdefault(request_id, _Job()).rollout_ids.add(rollout_id)

    def end(self, request_id: str, rollout_id: str) -> None:
        """It does no longer."""
        if (job := self._jobs.get(request_id)) is not None:
            job.rollout_ids.discard(rollout_id)
        self._look_at(request_id)

    @asynccontextmanager
    async def ending(self, request_id: str) -> AsyncIterator[None]:
        """Rollouts of the job are being ended meanwhile, by nobody else."""
        job = self._jobs.setdefault(request_id, _Job())
        job.ends_count += 1
        try:
            async with job.ends:
                yield
        finally:
            job.ends_count -= 1
            self._look_at(request_id)

    async def rest(self, request_id: str) -> None:
        """Return once the job has come to rest."""
        if (job := self._jobs.get(request_id)) is not None:
            await job.is_at_rest.wait()

    def _look_at(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None and (job.rollout_ids or job.ends_count):
            return
        if job is not None:
            del self._jobs[request_id]
            job.is_at_rest.set()
        self._rests(request_id)
