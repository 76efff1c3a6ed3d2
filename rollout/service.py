"""The rollout service's use-cases: submit a job, watch it, look at it, cancel it; resume what a log holds.

One service owns one run directory (its log), one engine and one substrate.  The command line and the
gRPC server are both callers of this class and share everything below it.

Invariants:
1. A job is durable before `submit` returns; the same `request_id` never makes a second job.
2. `start` takes up every unfinished rollout of the log; nothing else is needed to resume.

See: docs/architecture.md, "Service"; docs/formats/events.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Self

import wal
from dsec.errors import UnreachableError
from dsec.sandbox import Substrate
from rollout import context
from rollout.bench.tasks import Task, check_networks
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.errors import ConflictError, JournalError, NotFoundError, RequestError
from rollout.events import (
    ConversationAdmitted,
    Event,
    FinishReason,
    JobCancelled,
    JobEvent,
    JobSubmitted,
    JobWorked,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
    TaskAdmitted,
    rollout_of,
)
from rollout.jobs import check_conversations
from rollout.journal import Journal
from rollout.ledger import Ledger
from rollout.request import Conversation, Group, Job
from rollout.rewards.callables import check_allowed
from rollout.runner import Rollout, Runner
from rollout.sandboxes import Sandboxes
from rollout.watchers import Watch, Watchers
from toolcall_dsl import Tokenizer

_log = logging.getLogger(__name__)
_CANCELS_IN_FLIGHT_MAX = 256
"""Rollouts of a cancelled job whose last events are written together."""


class RolloutService:
    """Everything that runs over one log; an async context manager."""

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        substrate: Substrate,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        epoch: int | None = None,
        observe: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        """`directory/wal` is the log; engine and substrate are opened and closed by the service.

        With an `epoch` the log is taken from any writer of a lower one; `observe` sees each event once it is durable.
        """
        self.directory = directory
        self.engine = engine
        self.substrate = substrate
        self.tokenizer = tokenizer
        self.config = config
        self.ledger = Ledger(tokenizer)
        self.watchers = Watchers(config.watch_events_count_max)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._running_of_job: Counter[str] = Counter()
        self._cancelling: set[str] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resources = AsyncExitStack()
        self._is_started = False
        self._admission = asyncio.Lock()
        self._epoch = epoch
        self._observe = observe
        self._is_handed_over = False

    async def __aenter__(self) -> Self:
        """Lock and repair the log, fold it: jobs can be submitted, nothing runs before `start`.

        Raises RequestError (no such directory can be), wal.LockedError, FencedError, CorruptError, JournalError.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"cannot use {self.directory} as a run directory: {error.strerror}; choose another, or mend that"
            ) from error
        async with AsyncExitStack() as stack:
            log = await asyncio.to_thread(wal.Log.open, self.directory / "wal", epoch=self._epoch)
            if log.recovery.torn_bytes:
                cut, kept = log.recovery.torn_bytes, log.recovery.quarantine
                _log.warning("cut %d bytes of an unfinished write off the log, kept as %s", cut, kept)
            self.journal = Journal(wal.GroupCommit(log, wal.SyncPolicy.parse(self.config.log_sync)))
            stack.push_async_callback(self.journal.close)
            self.ledger = await asyncio.to_thread(Ledger.read, self.directory / "wal", self.tokenizer)
            self.sandboxes = Sandboxes(self.substrate, self.ledger, self.journal.append_record, self.config.networks)
            self.journal.on_fenced = self.sandboxes.leave  # they are its successor's
            self.runner = Runner(self.journal, self.ledger, self.engine, self.sandboxes, self._publish)
            self._resources = stack.pop_all()
        return self

    async def start(self) -> None:
        """Start engine and substrate, then take up every unfinished rollout of the log.

        Raises EngineError, dsec.errors.HostUnfitError.
        """
        self._resources.push_async_callback(self.engine.close)
        await self.engine.open()
        self._resources.push_async_callback(self._leave_substrate)
        await self.substrate.open()
        await self.sandboxes.adopt(self._open_rollouts())
        self._resources.push_async_callback(self._stop_rollouts)
        self._is_started = True
        for request_id in list(self.ledger.jobs):
            if request_id in self.ledger.cancelled:
                await self._finish_cancelled(request_id)
            self._start(request_id)

    def _open_rollouts(self) -> list[str]:
        return [
            rollout_id
            for rollout_id, state in self.ledger.rollouts.items()
            if not self.ledger.is_done(rollout_id) and state.opened.request_id not in self.ledger.cancelled
        ]

    async def __aexit__(self, *_: object) -> None:
        """Stop running rollouts where they are (the log keeps them), free everything."""
        await self._resources.aclose()

    def hand_over(self) -> None:
        """Have the end leave sandboxes, and what runs in them, to the next owner of the log; watches end now."""
        self._is_handed_over = True
        self.sandboxes.leave()
        self._send_away()

    def _send_away(self) -> None:
        self.watchers.break_off(UnreachableError(f"{self.directory} is being left by this process: ask again"))

    async def _leave_substrate(self) -> None:
        await (self.substrate.detach() if self._is_handed_over else self.substrate.close())

    async def submit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        """Make a job durable and start it (or have `start` do so); a job that the log holds is left as it is.

        Raises ConflictError if the same request id asked for something else, RequestError if a bound is exceeded.
        """
        await wal.settled(self._submit(job, tasks))  # a caller that goes away attaches again

    async def _submit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        async with self._admission:  # two submits of one id at once must not both find it new
            await self._admit(job, tasks)

    async def _admit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        if (known := self.ledger.jobs.get(job.request_id)) is not None:
            if known != job:
                differing = [name for name in Job.__struct_fields__ if getattr(job, name) != getattr(known, name)]
                raise ConflictError(
                    f"request {job.request_id!r} was submitted before with other contents: {', '.join(differing)}"
                )
            return
        if len(self.ledger.jobs) >= self.config.jobs_count_max:
            raise RequestError(f"the log holds {self.config.jobs_count_max} jobs: start a service on a new directory")
        if sum(group.size for group in job.groups) > self.config.rollouts_count_max:
            raise RequestError(f"a job may ask for at most {self.config.rollouts_count_max} rollouts")
        if job.limits.context_tokens_count_max > self.config.context_tokens_count_max:
            raise RequestError(
                f"context_tokens_count_max is {job.limits.context_tokens_count_max}, "
                f"this service allows {self.config.context_tokens_count_max}"
            )
        if taken := [group.group_id for group in job.groups if self.ledger.holds_group(group.group_id)]:
            raise RequestError(f"group ids in use by another job: {', '.join(taken[:5])}")
        tasks = list(tasks)
        await asyncio.to_thread(check_conversations, job, tasks, self.tokenizer)
        check_allowed(job, self.config.reward_callables)
        check_networks((task for task in tasks if isinstance(task, Task)), self.config.networks)
        known_prompts = self.ledger.tasks.keys() | self.ledger.conversations.keys()
        new = {task.digest: task for task in tasks if task.digest not in known_prompts}
        await asyncio.gather(*(self._record(_admitted(task)) for task in new.values()))
        await self._record(JobSubmitted(job))
        self._start(job.request_id)

    async def cancel(self, request_id: str) -> int:
        """End a job: running rollouts stop, unfinished ones finish as CANCELLED; returns how many did."""
        if request_id not in self.ledger.jobs:
            raise NotFoundError(f"no job {request_id!r} in {self.directory}")
        return await wal.settled(self._cancel(request_id))  # a caller that goes away does not leave it half done

    async def _cancel(self, request_id: str) -> int:
        async with self._admission:  # two cancels at once must not both find a rollout open
            self._cancelling.add(request_id)
            try:
                if request_id not in self.ledger.cancelled:
                    await self._record(JobCancelled(request_id))
                members = [rollout_id for rollout_id, _, _ in self.ledger.members(request_id)]
                await _stop([task for member in members if (task := self._running.get(member)) is not None])
                return await self._finish_cancelled(request_id)
            finally:
                self._cancelling.discard(request_id)

    async def _finish_cancelled(self, request_id: str) -> int:
        """End what a cancelled job left open or never began, then its watchers; how many rollouts that were."""
        unfinished = [m for m in self.ledger.members(request_id) if not self.ledger.is_done(m[0])]
        for start in range(0, len(unfinished), _CANCELS_IN_FLIGHT_MAX):
            batch = unfinished[start : start + _CANCELS_IN_FLIGHT_MAX]
            await asyncio.gather(*(self._finish_member(request_id, *member) for member in batch))
        self.watchers.close(request_id)
        return len(unfinished)

    async def _finish_member(self, request_id: str, rollout_id: str, group: Group, index: int) -> None:
        """A member that waited for its turn is opened first: a group is whole in the log, also when cancelled."""
        if rollout_id not in self.ledger.rollouts:
            await self._open(request_id, rollout_id, group, index)
        await self.sandboxes.drop(rollout_id)
        for ended in (*self.ledger.judges(rollout_id), rollout_id):
            await self._record(RolloutFinished(ended, FinishReason.CANCELLED))

    def is_ended(self, request_id: str) -> bool:
        """Whether every rollout of the job has ended: nothing is left to start for it."""
        return all(self.ledger.is_done(rollout_id) for rollout_id, _, _ in self.ledger.members(request_id))

    async def wait(self, request_id: str) -> None:
        """Return when no rollout of the job runs any more (ended, or stopped by an infrastructure failure).

        Raises what stopped the service (a poisoned log, a bug); rollouts then stand in the log.
        """
        tasks = [t for m, _, _ in self.ledger.members(request_id) if (t := self._running.get(m)) is not None]
        if tasks:
            everything = asyncio.create_task(asyncio.wait(tasks))
            try:
                await asyncio.wait({everything, self._failed}, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
            finally:
                everything.cancel()
        if self._failed.done():
            self._failed.result()

    async def note_work(self, request_id: str, wall_s: float) -> None:
        """Log how long this process worked on a job, before it stops."""
        await self._record(JobWorked(request_id, wall_s))

    async def failed(self) -> None:
        """Wait until something stops the whole service (a poisoned log, a bug), and raise it."""
        await asyncio.shield(self._failed)

    def watch(self, request_id: str) -> Watch:
        """Durable events of a job from now on, until none of its rollouts runs; close it, iterated or not.

        NotFoundError; iterating raises ResourceExhaustedError if the watcher is too slow.
        """
        if request_id not in self.ledger.jobs:
            raise NotFoundError(f"no job {request_id!r} in {self.directory}")
        is_ending = request_id in self._cancelling
        return self.watchers.watch(request_id, is_live=is_ending or self._running_of_job[request_id] > 0)

    @property
    def running_count(self) -> int:
        """Rollouts that are queued or running."""
        return len(self._running)

    def _start(self, request_id: str) -> None:
        if not self._is_started or request_id in self.ledger.cancelled:
            return
        for rollout_id, group, index in self.ledger.members(request_id):
            if not self.ledger.is_done(rollout_id):
                task = asyncio.create_task(self._run(request_id, rollout_id, group, index), name=rollout_id)
                self._running[rollout_id] = task
                self._running_of_job[request_id] += 1
                task.add_done_callback(partial(self._ended, request_id))

    async def _run(self, request_id: str, rollout_id: str, group: Group, index: int) -> None:
        async with self._slots:
            state = self.ledger.rollouts.get(rollout_id)
            if state is None:
                await self._open(request_id, rollout_id, group, index)
            elif state.opened.engine.weights_digest != self.engine.info.weights_digest:
                raise JournalError(f"{rollout_id} was begun with other weights; resume it with the same checkpoint")
            else:
                await self._record(RolloutResumed(rollout_id, state.attempt + 1, state.tokens_count, self.engine.info))
            await self.runner.run(self._rollout(request_id, rollout_id, group))

    def _rollout(self, request_id: str, rollout_id: str, group: Group) -> Rollout:
        task = self.ledger.tasks.get(group.task_digest)
        bounds = [self.ledger.jobs[request_id].limits.wall_clock_s, task.agent_timeout_s if task else 0.0]
        return Rollout(rollout_id, task, min((bound for bound in bounds if bound > 0), default=math.inf))

    async def _open(self, request_id: str, rollout_id: str, group: Group, index: int) -> None:
        task, job = self.ledger.tasks.get(group.task_digest), self.ledger.jobs[request_id]
        if task is not None:
            prompt = context.prompt(task.instruction, self.tokenizer, job.thinking)
        else:
            conversation = self.ledger.conversations[group.task_digest]
            prompt = context.conversation_prompt(conversation, self.tokenizer, job.thinking)
        digest, engine = self.tokenizer.digest, self.engine.info
        opened = RolloutOpened(
            rollout_id, request_id, group.group_id, index, prompt, digest, engine, has_environment=task is not None
        )
        await self._record(opened)

    async def _record(self, event: Event) -> None:
        await wal.settled(self._append(event))

    async def _append(self, event: Event) -> None:
        try:
            lsn = await self.journal.append(event)
        except (wal.StorageError, wal.PoisonedError, wal.FencedError) as error:
            self._fail(error)
            raise
        self.ledger.apply(event, lsn)
        self._publish(event)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._send_away()

    def _publish(self, event: Event) -> None:
        self._observe(event)
        if not isinstance(event, JobEvent):
            rollout_id = rollout_of(event)
            request_id, lsn = self.ledger.rollouts[rollout_id].opened.request_id, self.ledger.lsns[rollout_id][1]
            self.watchers.publish(request_id, event, lsn)

    def _ended(self, request_id: str, task: asyncio.Task[None]) -> None:
        self._running.pop(task.get_name(), None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
        self._running_of_job[request_id] -= 1
        if self._running_of_job[request_id] == 0 and request_id not in self.ledger.cancelled:
            self.watchers.close(request_id)

    async def _stop_rollouts(self) -> None:
        await _stop(list(self._running.values()))
        if self._failed.done():
            self._failed.exception()


def _admitted(task: Task | Conversation) -> TaskAdmitted | ConversationAdmitted:
    return TaskAdmitted(task) if isinstance(task, Task) else ConversationAdmitted(task)


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
