"""When rollouts end that nobody waits for any longer: the deadline of a job, the stragglers of a group.

A group may stop early: once `min_usable` members have a reward, the others have `grace_s` left.  A restart counts a
grace anew, but not a deadline, which stands in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from rollout.events import FinishReason, RolloutFinished
from rollout.ledger import Ledger
from rollout.request import Group, Job

Finish = Callable[[str, list[str], FinishReason], Awaitable[object]]
"""End these rollouts of a job."""


class Endings:
    """The timers of a service."""

    def __init__(self, ledger: Ledger, finish: Finish, failed: Callable[[BaseException], None]) -> None:
        """`failed` hears what `finish` raised."""
        self._ledger = ledger
        self._finish = finish
        self._failed = failed
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[object]] = set()

    def watch(self, job: Job) -> None:
        """From now on the job ends in time."""
        if self._ledger.is_ended(job.request_id):
            return
        if job.deadline_s:
            left_s = self._ledger.submitted_s[job.request_id] + job.deadline_s - time.time()
            self._after(left_s, job.request_id, lambda: self._end_job(job))
        for group in job.groups if job.early_stop else ():
            self._check(job, group)

    def note(self, finished: RolloutFinished) -> None:
        """A rollout has ended: it may be the last that its group waits for."""
        opened = self._ledger.rollouts[finished.rollout_id].opened
        if not opened.judged_rollout_id:
            job, group, _ = self._ledger.member(finished.rollout_id)
            self._check(job, group)

    def rest(self, job: Job) -> None:
        """Nothing of the job runs or waits to: if all of it has ended, no timer is needed."""
        if not self._ledger.is_ended(job.request_id):
            return
        for name in (job.request_id, *(group.group_id for group in job.groups if job.early_stop)):
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()

    async def close(self) -> None:
        """No more timers; an end that has begun is carried out."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, job: Job, group: Group) -> None:
        if job.early_stop is None or group.group_id in self._timers:
            return
        states = [self._ledger.rollouts.get(member) for member in group.members]
        usable_count = sum(s is not None and s.finished is not None and s.judged is not None for s in states)
        is_over = all(self._ledger.is_done(member) for member in group.members)
        if usable_count >= job.early_stop.min_usable and not is_over:
            self._after(job.early_stop.grace_s, group.group_id, lambda: self._end_group(job, group))

    def _after(self, seconds: float, name: str, end: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = asyncio.get_running_loop().call_later(max(0.0, seconds), end)

    def _end_group(self, job: Job, group: Group) -> None:
        self._begin(job, list(group.members), FinishReason.STRAGGLER)

    def _end_job(self, job: Job) -> None:
        members = [member for group in job.groups for member in group.members]
        self._begin(job, members, FinishReason.DEADLINE)

    def _begin(self, job: Job, members: list[str], reason: FinishReason) -> None:
        task = asyncio.ensure_future(self._finish(job.request_id, members, reason))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
