"""What lets go of the log: acknowledged jobs, prompts that no job names any more, weights that others followed.

A job holds the log from its submission on, until all its rollouts are acknowledged; then the ledger forgets it, here
and in every later reading.  A prompt that many jobs name, one after the other, and the weights in use would hold the
log for ever: when they are the oldest that does, they are logged once more.

Invariants:
1. What a restart needs to go on is never dropped: every unacknowledged job is in the log whole.

See: docs/formats/wal_retention.md, "Records that others depend on"; docs/formats/events.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import wal
from dsec.errors import DsecError, StateError
from rollout import journal
from rollout.errors import RolloutError
from rollout.events import ConversationAdmitted, JobSubmitted, PolicyUpdated, RolloutsAcknowledged, TaskAdmitted
from rollout.ledger import Ledger
from wal.reader import Record
from wal.retention import Retention, RetentionReport

if TYPE_CHECKING:
    from rollout.service import RolloutService

SHOWN_MAX = 5
_log = logging.getLogger(__name__)


class LogHolders:
    """`wal.requests.Requests` of a rollout log: who needs it, as `what/name@lsn`.

    A name is let go of once the ledger, which has folded everything up to `known_lsn`, holds it no longer.
    """

    def __init__(self, ledger: Ledger) -> None:
        """`ledger` is the service's; this is used in another thread."""
        self._ledger = ledger
        self._held: set[str] = set()
        self.known_lsn = 0

    def requests_of(self, record: Record) -> Iterable[str]:
        """See Requests."""
        if record.kind != journal.KIND:
            return ()
        match journal.decode(record.kind, record.payload):
            case JobSubmitted(job=job):
                self._held.add(f"job/{job.request_id}@{record.lsn}")
            case TaskAdmitted(task=prompt) | ConversationAdmitted(conversation=prompt):
                self._held.add(f"prompt/{prompt.digest}@{record.lsn}")
            case PolicyUpdated():
                self._held.add(f"policy/@{record.lsn}")
            case RolloutsAcknowledged():
                pass
            case _:
                return ()
        touched = tuple(self._held)
        self._held = {name for name in touched if not self.is_released(name)}
        return touched

    def is_released(self, request: str) -> bool:
        """See Requests."""
        what, _, rest = request.partition("/")
        name, _, text = rest.rpartition("@")
        lsn = int(text)
        if lsn > self.known_lsn:
            return False
        if what == "job":
            return name not in self._ledger.jobs
        newest = self._ledger.policy_lsn if what == "policy" else self._ledger.prompt_lsns.get(name, 0)
        return newest != lsn


class LogRetention:
    """Acknowledgements of one service, and the passes over its log that follow them."""

    def __init__(self, service: RolloutService) -> None:
        """The service's ledger is that of its whole log."""
        self._service = service
        self._holders = LogHolders(service.ledger)
        self._retention = Retention(service.directory / "wal", self._holders)
        self._pass: asyncio.Task[None] | None = None
        self._leaving: list[str] = []
        self._letting_go: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Finish what was begun."""
        if self._letting_go is not None:
            await asyncio.wait([self._letting_go])  # which may begin a pass
        if self._pass is not None:
            await asyncio.wait([self._pass])

    async def acknowledge(self, rollout_ids: Iterable[str]) -> int:
        """Make durable that these records are not needed any more; how many were new.

        Ids that the log does not know (any more) are ignored.  StateError names rollouts that have not ended.
        """
        ledger = self._service.ledger
        known = [each for each in dict.fromkeys(rollout_ids) if ledger.asks_for(each)]
        if unfinished := [each for each in known if not ledger.is_done(each)]:
            raise StateError(f"not ended yet: {', '.join(unfinished[:SHOWN_MAX])} ({len(unfinished)} in all)")
        while new := self._new(known):
            for request_id in self._ending(new):
                await self._service.wait(request_id)
            if self._service.exporter is not None:
                await self._service.exporter.taken_all()
            async with self._service.admission:  # a job that is let in meanwhile may name the prompt that goes
                if (still := self._new(new)) and not self._ending(still):
                    await self._service.note(RolloutsAcknowledged(tuple(still)))
                    self.look_after()
                    return len(still)
        return 0

    def _new(self, rollout_ids: Iterable[str]) -> list[str]:
        ledger = self._service.ledger
        return [each for each in rollout_ids if ledger.asks_for(each) and each not in ledger.acknowledged]

    def _ending(self, rollout_ids: Iterable[str]) -> list[str]:
        """Jobs whose rollouts, these among them, have all ended, and at which something still looks."""
        ledger = self._service.ledger
        jobs = {ledger.member(each)[0].request_id: None for each in rollout_ids}
        return [each for each in jobs if self._service.is_live(each) and ledger.is_ended(each)]

    def let_go(self, request_id: str) -> None:
        """Acknowledge an ended job soon, in one record with others; what is left at a crash, the next start does."""
        self._leaving.append(request_id)
        if self._letting_go is None or self._letting_go.done():
            self._letting_go = asyncio.create_task(self._let_go())

    async def _let_go(self) -> None:
        while self._leaving:
            request_ids, self._leaving = self._leaving, []
            service = self._service
            ended = [each for each in request_ids if each in service.ledger.jobs and service.ledger.is_ended(each)]
            try:
                await self.acknowledge([member for each in ended for member, _, _ in service.ledger.members(each)])
            except (wal.WalError, DsecError, RolloutError) as error:
                _log.warning("%d generations stay in the log until the next start: %s", len(request_ids), error)

    def look_after(self) -> None:
        """Begin a pass over the log, unless one is under way."""
        if self.is_idle():
            self._pass = asyncio.create_task(self._look_after())
            self._pass.add_done_callback(_tell)

    def is_idle(self) -> bool:
        """Whether no pass is under way."""
        return self._pass is None or self._pass.done()

    async def _look_after(self) -> None:
        self._holders.known_lsn = self._service.journal.last_lsn
        report = await asyncio.to_thread(self._run_pass)
        self._service.ledger.let_go(report.floor_lsn)
        async with self._service.admission:  # a prompt that goes meanwhile must not come back
            await self._renew(report)

    def _run_pass(self) -> RetentionReport:
        self._retention.catch_up()
        return self._retention.run_pass()

    async def _renew(self, report: RetentionReport) -> None:
        """Log the oldest holder anew if it is no job: a later pass lets its old record go."""
        ledger = self._service.ledger
        what, _, rest = report.holders[0].name.partition("/") if report.holders else ("", "", "")
        digest = rest.rpartition("@")[0]
        if what == "policy" and ledger.policy is not None:
            await self._service.note(ledger.policy)
        elif what == "prompt" and digest in ledger.tasks:
            await self._service.note(TaskAdmitted(ledger.tasks[digest]))
        elif what == "prompt" and digest in ledger.conversations:
            await self._service.note(ConversationAdmitted(ledger.conversations[digest]))


def _tell(done: asyncio.Task[None]) -> None:
    """Say why a pass failed; the next acknowledgement begins another."""
    if not done.cancelled() and (error := done.exception()) is not None:
        is_known = isinstance(error, wal.WalError | RolloutError | OSError)
        _log.warning("the log keeps what could go: %s", error, exc_info=None if is_known else error)
