"""The whole service as a fold: tasks, jobs, rollouts and sandbox trajectories, from one log.

A running service keeps the ledger up to date event by event; a resume, `dsec show`, the summary and
the export read the same log into the same ledger.  There is no other copy of any of this.

Invariants:
1. `apply` is called with durable events only, in log order for each rollout.
2. A ledger read back from the log equals the one that the writer held.

See: docs/architecture.md, "Ledger".
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsec.trajectory import (
    CommandFinished,
    CommandRefused,
    CommandReplayed,
    CommandStarted,
    CommandUnknown,
    SandboxCreated,
    Trajectory,
    TrajectoryRecord,
)
from rollout import journal, machine
from rollout.bench.tasks import Task
from rollout.engine import EngineInfo
from rollout.errors import JournalError, NotFoundError
from rollout.events import (
    ConversationAdmitted,
    Event,
    FinishReason,
    JobCancelled,
    JobEvent,
    JobSubmitted,
    JobWorked,
    PolicyUpdated,
    RolloutEvent,
    RolloutFinished,
    RolloutOpened,
    RolloutResumed,
    RolloutsAcknowledged,
    TaskAdmitted,
    rollout_of,
)
from rollout.request import Conversation, Group, Job, JudgeReward
from rollout.rewards.judge import judge_ids, judge_job
from rollout.state import Phase, State, start
from toolcall_dsl import Tokenizer
from wal.floor import FIRST_LSN
from wal.tokens import TokensAppended

_SHOWN_MAX = 200
"""Characters of an id that nobody checked."""


class Ledger:
    """Everything that a log says, in memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """An empty ledger; the tokenizer must be the one that the log was written with."""
        self.tokenizer = tokenizer
        self.tasks: dict[str, Task] = {}
        self.conversations: dict[str, Conversation] = {}
        self.jobs: dict[str, Job] = {}
        self.cancelled: dict[str, FinishReason] = {}
        """Jobs that nobody wants any longer: as what their rollouts end."""
        self.rollouts: dict[str, State] = {}
        self.trajectories: dict[str, Trajectory] = {}
        self.lsns: dict[str, tuple[int, int]] = {}
        """Of a rollout's first record, which opened it, and of its newest."""
        self.names: dict[int, str] = {}
        """By the lsn of what opened it, a rollout."""
        self.policy: PolicyUpdated | None = None
        self.weights: dict[int, str] = {}
        self.policy_lsn = 0
        self.prompt_lsns: dict[str, int] = {}
        """Of the newest record of each prompt."""
        self.acknowledged: set[str] = set()
        """Of jobs that are not acknowledged whole: those are forgotten."""
        self.used: dict[str, int] = {}
        """Request ids of forgotten jobs that the log may still speak of: up to which lsn."""
        self.is_cut = False
        """The log's beginning was let go of: of what had ended in it, records may be left."""
        self.tokens_regenerated: Counter[str] = Counter()
        self.worked_s = 0.0
        self.submitted_s: dict[str, float] = {}
        self._group_of: dict[str, tuple[Job, Group]] = {}
        self._logged_until: dict[str, int] = {}
        self._sampled: dict[str, hashlib._Hash] = {}
        self._unacknowledged: dict[str, int] = {}
        self._named: Counter[str] = Counter()
        self._unnamed: set[str] = set()

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer) -> Ledger:
        """Fold a log.  wal.CorruptError, JournalError (another tokenizer, unknown records), MachineError."""
        ledger = cls(tokenizer)
        for number, (record, value) in enumerate(journal.replay(directory)):
            ledger.is_cut |= number == 0 and record.lsn > FIRST_LSN
            ledger.apply(value, record.lsn)
        for job in ledger.jobs.values():
            ledger._check_prompts(job)
        return ledger

    def apply(self, event: Event | TrajectoryRecord, lsn: int) -> None:
        """Fold one durable event in."""
        if self.is_cut and self._is_left_over(event):
            return
        match event:
            case TokensAppended():  # the most there is
                self._count_sampled(event)
                self._step(event.request, event, lsn)
            case TaskAdmitted():
                self.tasks.setdefault(event.task.digest, event.task)
                self._admit(event.task.digest, lsn)
            case ConversationAdmitted():
                self.conversations.setdefault(event.conversation.digest, event.conversation)
                self._admit(event.conversation.digest, lsn)
            case PolicyUpdated():
                self.policy, self.policy_lsn = event, lsn
                self._learn(event.engine)
            case RolloutsAcknowledged():
                self._acknowledge(event.rollout_ids, lsn)
            case JobSubmitted():
                self._submit(event.job)
                self.submitted_s[event.job.request_id] = event.at_s
            case JobCancelled():
                self.cancelled.setdefault(event.request_id, event.reason)
            case JobWorked():
                self.worked_s += event.wall_s
            case (
                SandboxCreated()
                | CommandStarted()
                | CommandFinished()
                | CommandRefused()
                | CommandUnknown()
                | CommandReplayed()
            ):
                self.trajectory(event.session).apply(event, lsn)
                self.extend(event.session, lsn)
            case RolloutOpened():
                self._open(event)
                self.names[lsn] = event.rollout_id
                self._learn(event.engine)
                self.extend(event.rollout_id, lsn)
            case _:
                if isinstance(event, RolloutResumed) and event.engine is not None:
                    self._learn(event.engine)
                self._step(event.rollout_id, event, lsn)
                if isinstance(event, RolloutFinished):
                    self.trajectory(event.rollout_id).forget_contents()

    def _step(self, rollout_id: str, event: RolloutEvent, lsn: int) -> None:
        self.rollouts[rollout_id] = machine.step(self._state(rollout_id), event, self.tokenizer)
        self.extend(rollout_id, lsn)

    def trajectory(self, rollout_id: str) -> Trajectory:
        """The sandbox trajectory of a rollout; `apply` of its own records happens in place."""
        return self.trajectories.setdefault(rollout_id, Trajectory(rollout_id))

    def members(self, request_id: str) -> Iterator[tuple[str, Group, int]]:
        """Every rollout that a job asks for: its id, group and index, opened or not."""
        for group in self.jobs[request_id].groups:
            for index, rollout_id in enumerate(group.members):
                yield rollout_id, group, index

    def member(self, rollout_id: str) -> tuple[Job, Group, int]:
        """Whose member a rollout is, opened or not.  KeyError if no job asked for it (a judge's)."""
        group_id, _, index = rollout_id.rpartition(".")
        job, group = self._group_of[group_id]
        return job, group, int(index)

    def rollout(self, rollout_id: str) -> State:
        """What is durable of a rollout.  NotFoundError: it has not begun, or was acknowledged, or never was."""
        if (state := self.rollouts.get(rollout_id)) is None:
            raise NotFoundError(f"no rollout {rollout_id[:_SHOWN_MAX]!r}")
        return state

    def judges(self, rollout_id: str) -> list[str]:
        """The judges of a rollout that have not ended."""
        reward = self.rollouts[rollout_id].job.reward
        ids = judge_ids(rollout_id, reward) if isinstance(reward, JudgeReward) else ()
        return [judge_id for judge_id in ids if judge_id in self.rollouts and not self.is_done(judge_id)]

    def asks_for(self, rollout_id: str) -> bool:
        """Whether a job asked for the rollout."""
        group_id, _, index = rollout_id.rpartition(".")
        known = self._group_of.get(group_id)
        is_number = index.isascii() and index.isdecimal() and str(int(index)) == index
        return known is not None and is_number and int(index) < known[1].size

    def holds_group(self, group_id: str) -> bool:
        """True if a job of this log has the group."""
        return group_id in self._group_of

    def is_done(self, rollout_id: str) -> bool:
        """True once the rollout has ended (an infrastructure failure is not an end)."""
        state = self.rollouts.get(rollout_id)
        return state is not None and state.phase is Phase.DONE

    def is_ended(self, request_id: str) -> bool:
        """Whether every rollout of the job has ended: nothing is left to start for it."""
        return all(self.is_done(rollout_id) for rollout_id, _, _ in self.members(request_id))

    def missing_reasons(self, group: Group) -> dict[int, str]:
        """Why members of a group have no reward, by index: never a silent hole; `PENDING` while one may still come."""
        reasons = {}
        for index, member in enumerate(group.members):
            state = self.rollouts.get(member)
            if state is None:
                reasons[index] = "PENDING"
            elif state.judged is None:
                ended = state.finished.reason.value if state.finished else "PENDING"
                reasons[index] = state.failure.code if state.failure else ended
        return reasons

    def is_stale(self, state: State) -> bool:
        """Whether the rollout's oldest token is further behind the newest weights than its job allows."""
        lag_max = state.job.policy.max_lag
        if self.policy is None or lag_max is None or not state.versions or state.opened.judged_rollout_id:
            return False
        return self.policy.engine.policy_version - state.versions[0][1] > lag_max

    def extend(self, rollout_id: str, lsn: int) -> None:
        """Note that a record of the rollout stands at `lsn`."""
        first, last = self.lsns.get(rollout_id, (lsn, lsn))
        self.lsns[rollout_id] = min(first, lsn), max(last, lsn)

    def let_go(self, floor_lsn: int) -> None:
        """The log begins at `floor_lsn` now."""
        self.used = {request_id: lsn for request_id, lsn in self.used.items() if lsn >= floor_lsn}

    def _submit(self, job: Job) -> None:
        if not self.is_cut:  # else a prompt may have been logged again, further on
            self._check_prompts(job)
        for group in job.groups:
            self._group_of[group.group_id] = job, group
            self._named[group.task_digest] += 1
        self.jobs[job.request_id] = job
        self._unacknowledged[job.request_id] = sum(group.size for group in job.groups)
        for digest in self._unnamed:
            self._drop_prompt(digest)  # its job was never submitted
        self._unnamed.clear()

    def _check_prompts(self, job: Job) -> None:
        for group in job.groups:
            if group.task_digest not in self.tasks and group.task_digest not in self.conversations:
                raise JournalError(f"job {job.request_id}: its task {group.task} is not in the log")

    def _admit(self, digest: str, lsn: int) -> None:
        self.prompt_lsns[digest] = lsn
        if not self._named[digest]:
            self._unnamed.add(digest)

    def _drop_prompt(self, digest: str) -> None:
        if not self._named[digest]:
            del self._named[digest], self.prompt_lsns[digest]
            self.tasks.pop(digest, None)
            self.conversations.pop(digest, None)

    def _acknowledge(self, rollout_ids: Iterable[str], lsn: int) -> None:
        """A job of which all rollouts are acknowledged is forgotten, with what only it needed, but for its id."""
        for rollout_id in rollout_ids:
            if not self.asks_for(rollout_id):
                self.used[rollout_id.partition("/")[0]] = lsn  # its beginning was let go of
                continue
            if rollout_id in self.acknowledged:
                continue
            self.acknowledged.add(rollout_id)
            job, _, _ = self.member(rollout_id)
            self._unacknowledged[job.request_id] -= 1
            if not self._unacknowledged[job.request_id]:
                self._forget(job)
                self.used[job.request_id] = lsn

    def _forget(self, job: Job) -> None:
        for group in job.groups:
            for member in group.members:
                judges = judge_ids(member, job.reward) if isinstance(job.reward, JudgeReward) else ()
                for rollout_id in (member, *judges):
                    self._forget_rollout(rollout_id)
                self.acknowledged.discard(member)
            del self._group_of[group.group_id]
            self._named[group.task_digest] -= 1
            self._drop_prompt(group.task_digest)
        del self.jobs[job.request_id], self.submitted_s[job.request_id], self._unacknowledged[job.request_id]
        self.cancelled.pop(job.request_id, None)

    def _forget_rollout(self, rollout_id: str) -> None:
        self.rollouts.pop(rollout_id, None)
        self.trajectories.pop(rollout_id, None)
        self.names.pop(self.lsns.pop(rollout_id, (0, 0))[0], None)
        self._logged_until.pop(rollout_id, None)
        self._sampled.pop(rollout_id, None)
        self.tokens_regenerated.pop(rollout_id, None)

    def _is_left_over(self, event: Event | TrajectoryRecord) -> bool:
        """Whether a record belongs to a job whose beginning was dropped, which had been acknowledged whole."""
        if isinstance(event, JobCancelled):
            return event.request_id not in self.jobs
        if isinstance(event, JobEvent):
            return False
        if isinstance(event, RolloutOpened) and not event.judged_rollout_id:
            return event.group_id not in self._group_of
        if isinstance(event, RolloutOpened):
            return event.judged_rollout_id not in self.rollouts
        return (event.session if isinstance(event, TrajectoryRecord) else rollout_of(event)) not in self.rollouts

    def _open(self, event: RolloutOpened) -> None:
        if event.tokenizer_digest != self.tokenizer.digest:
            raise JournalError(
                f"{event.rollout_id} was written with tokenizer {event.tokenizer_digest[:12]}, "
                f"and this is {self.tokenizer.digest[:12]}: name the folder of that model's tokenizer.json "
                "(--tokenizer DIR, or DSEC_TOKENIZER)"
            )
        if event.judged_rollout_id:
            job = judge_job(self._state(event.judged_rollout_id).job, event.judged_rollout_id)
        else:
            job, _ = self._group_of[event.group_id]
        self.rollouts[event.rollout_id] = start(job, event)

    def _state(self, rollout_id: str) -> State:
        try:
            return self.rollouts[rollout_id]
        except KeyError:
            raise JournalError(f"an event of {rollout_id} stands before its rollout_opened") from None

    def sampled_digest(self, rollout_id: str) -> str:
        """sha256, in hex, over (position u32, id u32), little endian, of each token that the log says was sampled."""
        digest = self._sampled.get(rollout_id)
        return (digest or hashlib.sha256()).hexdigest()

    def _learn(self, engine: EngineInfo) -> None:
        self.weights[engine.policy_version] = engine.weights_digest

    def _count_sampled(self, event: TokensAppended) -> None:
        end = event.start + len(event.token_ids)
        if (again := self._logged_until.get(event.request, 0) - event.start) > 0:
            self.tokens_regenerated[event.request] += again
        self._logged_until[event.request] = end
        pairs = array("I", bytes(8 * len(event.token_ids)))
        pairs[::2], pairs[1::2] = array("I", range(event.start, end)), array("I", event.token_ids)
        if sys.byteorder == "big":
            pairs.byteswap()
        self._sampled.setdefault(event.request, hashlib.sha256()).update(pairs)
