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
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import wal
from dsec.errors import StateError
from dsec.sandbox import Substrate
from rollout.activity import Activity
from rollout.bench.tasks import Task
from rollout.config import RolloutConfig
from rollout.endings import Endings
from rollout.engine import Engine
from rollout.engines.kv_files import KvFiles
from rollout.environment.sandboxes import Sandboxes
from rollout.errors import NotFoundError, RequestError
from rollout.events import (
    ConversationAdmitted,
    Event,
    FinishReason,
    JobCancelled,
    JobEvent,
    JobSubmitted,
    RolloutFinished,
    TaskAdmitted,
    rollout_of,
)
from rollout.export.exporter import Exporter
from rollout.journal import Journal
from rollout.ledger import Ledger
from rollout.members import Members
from rollout.policy import Awaiting, catch_up, load_policy
from rollout.request import Conversation, Job
from rollout.retention import LogRetention
from rollout.runner import Runner
from rollout.scheduling.admission import capacity_of, check_engine, check_new, check_same, claims_of, rules_of
from rollout.scheduling.claims import Claim
from rollout.scheduling.dispatch import Callbacks, Dispatcher, Order
from rollout.scheduling.scheduler import Scheduler
from rollout.watchers import Watch, Watchers
from toolcall_dsl import Tokenizer

_log = logging.getLogger(__name__)


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
        self._scheduler = Scheduler(capacity_of(config), rules_of(config))
        self._activity = Activity(self._at_rest)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resources = AsyncExitStack()
        self.is_started = False
        self.admission = asyncio.Lock()
        """Held while jobs and prompts come or go, not while rollouts end: sandboxes may take their time."""
        self._epoch = epoch
        self._observe = observe
        self._is_handed_over = False
        self.exporter: Exporter | None = None

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
            commit = wal.GroupCommit(log, wal.SyncPolicy.parse(self.config.log_sync))
            self.journal = Journal(commit, self._fold, self._log_failed)
            stack.push_async_callback(self.journal.close)
            self.ledger = await asyncio.to_thread(Ledger.read, self.directory / "wal", self.tokenizer)
            self.retention = LogRetention(self)
            stack.push_async_callback(self.retention.close)
            self.sandboxes = Sandboxes(self.substrate, self.ledger, self.journal.append_record, self.config.networks)
            self.kv_files = KvFiles(self.directory / "kv", self.engine)
            self.members = Members(self.ledger, self.engine, self.sandboxes, self.kv_files, self._record)
            self.endings = Endings(self.ledger, self.finish, self._fail)
            callbacks = Callbacks(run=self._run, interrupt=self.engine.preempt, rests=self._rest, failed=self._fail)
            self.dispatcher = Dispatcher(self._scheduler, callbacks)
            self.awaiting = Awaiting(self.ledger, self.engine, self.dispatcher, self._rest)
            self.runner = Runner(
                self.journal,
                self.ledger,
                self.engine,
                self.sandboxes,
                self.kv_files,
                self.dispatcher.slot,
                self.config.engine_silence_s,
                self.members.go_on,
            )
            self._resources = stack.pop_all()
        return self

    async def start(self) -> None:
        """Start engine and substrate, then take up every unfinished rollout of the log.

        Raises EngineError, dsec.errors.HostUnfitError, RequestError (a rollout is too large for what this service has),
        ResultsError and ShardError (shards that cannot be written or gone on with).
        """
        if self.config.exports_shards:
            exporter = Exporter(self.directory, self.ledger, self._epoch)
            self.exporter = await self._resources.enter_async_context(exporter)
        self._resources.push_async_callback(self.engine.close)
        await self.engine.open()
        check_engine(self.config, self.engine.info, self.tokenizer)
        open_rollouts = self._open_rollouts()
        await load_policy(self, open_rollouts)
        self._resources.push_async_callback(self._leave_substrate)
        await self.substrate.open()
        await self.sandboxes.adopt(open_rollouts)
        await asyncio.to_thread(self.kv_files.keep, open_rollouts)
        self._resources.push_async_callback(self._stop_rollouts)
        self.is_started = True
        for job in list(self.ledger.jobs.values()):
            if job.ends_with_caller or job.request_id in self.ledger.cancelled:
                reason = self.ledger.cancelled.get(job.request_id, FinishReason.CANCELLED)
                await self.finish(job.request_id, self._members_of(job.request_id), reason)
            else:
                self._enqueue(job)
            if job.ends_with_caller:
                self.retention.let_go(job.request_id)
        await catch_up(self)  # a kill may have come between an update and the ends that follow it
        self.dispatcher.open()

    def _open_rollouts(self) -> list[str]:
        return [
            rollout_id
            for rollout_id, state in self.ledger.rollouts.items()
            if not self.ledger.is_done(rollout_id) and state.opened.request_id not in self.ledger.cancelled
        ]

    async def __aexit__(self, *_: object) -> None:
        """Stop running rollouts where they are (the log keeps them), free everything."""
        await self._resources.aclose()

    async def hand_over(self, cause: str = "") -> None:
        """Leave sandboxes to the log's next owner; with a `cause`, preempt every rollout first.  wal.WalError."""
        self._is_handed_over = True
        self.sandboxes.leave()
        self.watchers.send_away()  # a job that is preempted here has not come to rest
        if cause:
            await self.preempt(cause=cause)

    async def _leave_substrate(self) -> None:
        await (self.substrate.detach() if self._is_handed_over else self.substrate.close())

    async def submit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        """Make a job durable and start it (or have `start` do so); a job that the log holds is left as it is.

        Raises ConflictError if the same request id asked for something else, RequestError if a bound is exceeded,
        ResourceExhaustedError if too much waits already.
        """
        await wal.settled(self._submit(job, tasks))  # a caller that goes away attaches again

    async def _submit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        async with self.admission:  # two submits of one id at once must not both find it new
            await self._admit(job, tasks)

    async def _admit(self, job: Job, tasks: Iterable[Task | Conversation]) -> None:
        if (known := self.ledger.jobs.get(job.request_id)) is not None:
            check_same(job, known)
            return
        tasks = list(tasks)
        await asyncio.to_thread(check_new, job, tasks, self.ledger, self.config, self.engine)
        environments = self.ledger.tasks.keys() | {task.digest for task in tasks if isinstance(task, Task)}
        self._scheduler.check(claims_of(job, environments, lambda _member: True))
        known_prompts = self.ledger.tasks.keys() | self.ledger.conversations.keys()
        new = {task.digest: task for task in tasks if task.digest not in known_prompts}
        await asyncio.gather(*(self._record(_admitted(task)) for task in new.values()))
        await self._record(JobSubmitted(job, time.time()))
        if self.is_started:
            self._enqueue(job)

    async def cancel(self, request_id: str) -> int:
        """End a job: running rollouts stop, unfinished ones finish as CANCELLED; returns how many did."""
        return await self.finish(request_id, self._members_of(request_id), FinishReason.CANCELLED)

    async def finish(self, request_id: str, rollout_ids: list[str], reason: FinishReason) -> int:
        """End rollouts, all of a job if it is cancelled; a caller that goes away does not leave it half done."""
        return await wal.settled(self._finish_whole(request_id, rollout_ids, reason))

    async def _finish_whole(self, request_id: str, rollout_ids: list[str], reason: FinishReason) -> int:
        async with self._activity.ending(request_id):  # two ends at once must not both find a rollout open
            async with self.admission:
                if request_id not in self.ledger.jobs:
                    return 0  # it ended meanwhile, and was acknowledged
                ends_job = reason in {FinishReason.CANCELLED, FinishReason.DEADLINE}
                if ends_job and request_id not in self.ledger.cancelled:
                    await self._record(JobCancelled(request_id, reason))
            self.awaiting.forget(rollout_ids)
            async with self.dispatcher.ending(rollout_ids):
                return await self.members.finish(rollout_ids, reason)

    async def preempt(
        self, rollout_ids: Iterable[str] | None = None, *, request_id: str = "", cause: str = "asked"
    ) -> list[str]:
        """Stop these rollouts, those of a job, or all, until `resume`; the stops are durable. Returns whom it stopped.

        Sampling stops at a token, a wait for tools at once; sandboxes sleep; a caller may go away.  NotFoundError.
        """
        return await self.awaiting.preempt(self._wanted(rollout_ids, request_id), cause)

    def resume(self, rollout_ids: Iterable[str] | None = None, *, request_id: str = "") -> list[str]:
        """Let rollouts that were preempted, or that the service failed, wait for their turn; whom this set going.

        NotFoundError; StateError: the job was cancelled.
        """
        wanted = self._wanted(rollout_ids, request_id)
        if request_id in self.ledger.cancelled:
            raise StateError(f"job {request_id!r} was cancelled: submit it anew")
        failed = {
            rollout_id
            for rollout_id in wanted
            if not self.dispatcher.knows(rollout_id) and not self.ledger.is_done(rollout_id)
        }
        for job in {self.ledger.member(rollout_id)[0].request_id: None for rollout_id in failed}:
            self._queue(claims_of(self.ledger.jobs[job], self.ledger.tasks, failed.__contains__))
        resumed = [*failed, *self.awaiting.resume(wanted)]
        for rollout_id in resumed:
            self._wake(rollout_id)
        return resumed

    def _wanted(self, rollout_ids: Iterable[str] | None, request_id: str) -> list[str]:
        """Members of jobs that were not cancelled.  NotFoundError."""
        if rollout_ids is None and not request_id:
            jobs = self.ledger.jobs.keys() - self.ledger.cancelled
            return [member for job in jobs for member in self._members_of(job)]
        if rollout_ids is None:
            return self._members_of(request_id)
        wanted = list(rollout_ids)
        for rollout_id in wanted:
            if not self.ledger.asks_for(rollout_id):
                raise NotFoundError(f"no rollout {rollout_id!r} in {self.directory}")
        return wanted

    def _members_of(self, request_id: str) -> list[str]:
        if request_id not in self.ledger.jobs:
            raise NotFoundError(f"no job {request_id!r} in {self.directory}")
        return [rollout_id for rollout_id, _, _ in self.ledger.members(request_id)]

    def is_live(self, request_id: str) -> bool:
        """Whether a rollout of the job runs, waits to, or is being ended: what does still looks at the job."""
        return self._activity.is_live(request_id)

    async def wait(self, request_id: str) -> None:
        """Return when no rollout of the job runs or waits to (ended, preempted, or failed by the infrastructure).

        Raises what stopped the service (a poisoned log, a bug); rollouts then stand in the log.
        """
        if self.is_live(request_id):
            resting = asyncio.ensure_future(self._activity.rest(request_id))
            try:
                await asyncio.wait({resting, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                resting.cancel()
        if self._failed.done():
            self._failed.result()

    async def note(self, event: JobEvent) -> None:
        """Log what happened to jobs, or to the engine."""
        await self._record(event)

    async def failed(self) -> None:
        """Wait until something stops the whole service (a poisoned log, a bug), and raise it."""
        await asyncio.shield(self._failed)

    def watch(self, request_id: str) -> Watch:
        """Durable events of a job from now on, until none of its rollouts runs; close it, iterated or not.

        NotFoundError; iterating raises ResourceExhaustedError if the watcher is too slow.
        """
        if request_id not in self.ledger.jobs:
            raise NotFoundError(f"no job {request_id!r} in {self.directory}")
        return self.watchers.watch(request_id, is_live=self.is_live(request_id))

    @property
    def running_count(self) -> int:
        """Rollouts that are queued or running."""
        return self._activity.rollouts_count

    def _enqueue(self, job: Job) -> None:
        """Have what is left of a job run; a group that no longer fits whole (it did) goes on one by one."""
        claims = claims_of(job, self.ledger.tasks, lambda member: not self.ledger.is_done(member))
        self._queue(part for claim in claims for part in self._scheduler.fitting(claim))
        self.endings.watch(job)

    def _queue(self, claims: Iterable[Claim]) -> None:
        queued = list(claims)
        for claim in queued:
            for member in claim.members:
                self._wake(member)
        self.awaiting.enqueue(queued)

    async def _run(self, rollout_id: str, order: Order) -> None:
        rollout = await self.members.take_up(rollout_id, order)
        if rollout is not None:
            try:
                await self.runner.run(rollout)
            except asyncio.CancelledError:
                self.members.cut_off(rollout)
                raise

    def _wake(self, rollout_id: str) -> None:
        self._activity.begin(self.ledger.member(rollout_id)[0].request_id, rollout_id)

    def _rest(self, rollout_id: str) -> None:
        self._activity.end(self.ledger.member(rollout_id)[0].request_id, rollout_id)

    def _at_rest(self, request_id: str) -> None:
        self.watchers.close(request_id)
        if (job := self.ledger.jobs.get(request_id)) is not None:  # else its end came behind its acknowledgement
            self.endings.rest(job)

    async def _record(self, event: Event) -> None:
        await self.journal.append(event)

    def _fold(self, event: Event, lsn: int) -> None:
        self.ledger.apply(event, lsn)
        self._publish(event, lsn)

    def _log_failed(self, error: wal.WalError) -> None:
        if isinstance(getattr(error, "cause", error), wal.FencedError):
            self.sandboxes.leave()  # they are its successor's
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self.watchers.send_away()

    def _publish(self, event: Event, lsn: int) -> None:
        self._observe(event)
        if not isinstance(event, JobEvent):
            request_id = self.ledger.rollouts[rollout_of(event)].opened.request_id
            self.watchers.publish(request_id, event, lsn)
            if isinstance(event, RolloutFinished):
                self.endings.note(event)
                if self.exporter is not None:
                    self.exporter.observe(event)

    async def _stop_rollouts(self) -> None:
        self.watchers.send_away()
        await self.endings.close()
        await self.dispatcher.close()
        await self.sandboxes.close()
        if self._failed.done():
            self._failed.exception()


def _admitted(task: Task | Conversation) -> TaskAdmitted | ConversationAdmitted:
    return TaskAdmitted(task) if isinstance(task, Task) else ConversationAdmitted(task)
