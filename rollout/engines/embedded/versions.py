"""Every version of the weights that is in memory, each with a batch of its own, and who goes through which.

New weights begin between two turns: requests move to the new version's batch, but for those of sessions
that pin theirs, which go on in the old one until the last of these sessions is released.  This is plain
synchronous code, driven by the thread of `stepping.py`.

Invariants:
1. At most `versions_max` models are open, and one more while the newest begins; the one that nobody
   needs is closed with the turn that shows it.
2. While `stands` holds, no turn draws a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from rollout.engine import PauseMode
from rollout.engines.embedded.batching import Batch, Limits
from rollout.engines.embedded.binding import Model, State
from rollout.engines.embedded.jobs import Job, Outcome, Scoring, Session
from rollout.engines.embedded.retained import RetainedStates
from rollout.engines.kept_state import TOKEN_BYTES, KeptState, NoStateError
from rollout.engines.state_cache import TOKENS_MIN
from rollout.errors import EngineError, PreemptedError

_PREEMPTED = "the request was preempted; everything drawn for it has been handed over"

_log = logging.getLogger(__name__)


class Versions:
    """The newest version and those that sessions pin; all share one store of retained states."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        policy_version: int = 0,
        evicted: Callable[[KeptState], object] = lambda _entry: None,
        wanted: Callable[[bytes, str], object] = lambda _tokens, _digest: None,
    ) -> None:
        """`evicted` is told of states that memory has no room for; `wanted` is asked to have one admitted."""
        self.limits = limits
        self.retained = RetainedStates(limits.state_bytes_max, self._evict)
        self.newest = Batch(model, limits, self.retained, policy_version)
        self._pins: dict[Batch, set[str]] = {}
        """Older versions, and the sessions that each is kept for."""
        self._sessions: dict[str, Session] = {}
        self._paused: PauseMode | None = None
        self._evicted, self._wanted = evicted, wanted
        self._awaiting: dict[bytes, list[Job]] = {}
        """Tokens of a state that was wanted, and who begins when it has come."""

    @property
    def jobs(self) -> Iterator[Job | Scoring]:
        """Everything that is not done."""
        for batch in self._batches():
            yield from batch.jobs

    @property
    def stands(self) -> bool:
        """Whether a turn would do nothing: there is no work, a pause forbids it, or it awaits its states."""
        may_go_on = self.jobs if self._paused is None else self._started if self._paused == "wait" else ()
        return all(job.awaits_state for job in may_go_on)

    @property
    def is_finishing(self) -> bool:
        """Whether a pause waits for what has been started."""
        return self._paused == "wait" and next(self._started, None) is not None

    @property
    def _started(self) -> Iterator[Job | Scoring]:
        for batch in self._batches():
            yield from batch.started

    def turn(self) -> list[Outcome]:
        """A turn of every version."""
        if self.stands:
            return []
        outcomes = []
        for batch in [*self._batches()]:
            outcomes += batch.turn(admits=self._paused is None)
        self._close_unneeded()
        return outcomes

    def add(self, job: Job | Scoring, stored: bytes = b"") -> None:
        """Queue a job with the version that is its own; a state of the tokens `stored` could be had for it."""
        if isinstance(job, Scoring):
            self.newest.add(job)
            return
        name = job.request.session
        job.session = self._sessions.setdefault(name, job.session)
        job.session.on_update = job.request.on_update
        if job.request.on_update != "pin":
            self._unpin(name)
        pinned = next((batch for batch, sessions in self._pins.items() if name in sessions), None)
        if pinned is None and stored:
            self._await(job, stored)
        (pinned or self.newest).add(job)

    def _await(self, job: Job, stored: bytes) -> None:
        """Have a job wait for a state, if that spares enough."""
        start, _ = self.newest.origin(job)
        if len(stored) // TOKEN_BYTES - (start.tokens_count if start else 0) < TOKENS_MIN:
            return
        job.awaits_state = True
        waiting = self._awaiting.setdefault(stored, [])
        waiting.append(job)
        if len(waiting) == 1:
            self._wanted(stored, self.newest.model.weights_digest)

    def admit(self, tokens: bytes, entry: KeptState | None) -> None:
        """What was wanted has come, or cannot be had: who waited for it begins."""
        if entry is not None:
            try:
                self._check(entry)
            except EngineError as error:
                _log.warning("a cached state is not used: %s; the context is computed again", error)
            else:
                self.retained.put(entry)
        for job in self._awaiting.pop(tokens, ()):
            job.awaits_state = False

    def kept(self) -> list[KeptState]:
        """The states of the newest weights that may serve others; what would go first comes first."""
        return [entry for entry in self.retained if entry.weights == (self.newest.model.weights_digest,)]

    def remove(self, job: Job | Scoring) -> None:
        """End a job, done or not; its state may be retained.  Unknown jobs are ignored."""
        for batch in self._batches():
            batch.remove(job)
        self._close_unneeded()

    def preempt(self, session: str | None = None) -> list[Outcome]:
        """End every job of a session, or every job; their states may be retained."""
        ended = [
            job for job in self.jobs if session is None or (isinstance(job, Job) and job.request.session == session)
        ]
        for job in ended:
            self.remove(job)
        return [Outcome(job, [], None, error=PreemptedError(_PREEMPTED)) for job in ended]

    def pause(self, mode: PauseMode) -> list[Outcome]:
        """Draw no more, or only what running jobs still want."""
        self._paused = mode
        return self.preempt() if mode == "abort" else []

    def resume(self) -> None:
        """Go on."""
        self._paused = None

    def release(self, session: str) -> None:
        """A session has ended, or will with its running jobs: what is kept of it is left to others, and to chance."""
        self.retained.release(session)
        if session in self._sessions:
            self._sessions.pop(session).is_released = True
        self._unpin(session)
        self._close_unneeded()

    def update(self, model: Model, policy_version: int) -> None:
        """Draw with these weights from the next turn on; the caller has checked that there is room."""
        old = self.newest
        self.newest = Batch(model, self.limits, self.retained, policy_version)
        self._pins[old] = self._pinned()
        for job in [*old.jobs]:
            if isinstance(job, Scoring) or job.request.on_update != "pin" or not job.session.drew_with:
                old.hand_over(job, self.newest)
        self._close_unneeded()

    def check_room(self) -> None:
        """EngineError if another version would be one too many."""
        if len(self._pins) + bool(self._pinned()) >= self.limits.versions_max:
            count = sum(map(len, self._pins.values())) + len(self._pinned())
            raise EngineError(
                f"{count} sessions pin older weights, and at most {self.limits.versions_max} versions fit in memory: "
                "release some of them first"
            )

    def keep(self, session: str) -> KeptState | None:
        """The state of a session as it is now."""
        for batch in self._batches():
            for job in batch.jobs:
                if isinstance(job, Job) and job.request.session == session and job.state is not None:
                    return batch.keep(job)
        return self.retained.own(session)

    def restore(self, session: str, entry: KeptState) -> int:
        """Retain a state of the newest weights that comes from outside; returns the tokens it covers.  NoStateError."""
        self._check(entry)
        self.retained.put(entry, session)
        if self.retained.own(session) is None:
            raise NoStateError("the engine has no room for it")
        restored = self._sessions.setdefault(session, Session())
        restored.drew_with, restored.is_restored = entry.weights[-1], True
        return entry.tokens_count

    def _check(self, entry: KeptState) -> None:
        """NoStateError unless the newest weights can go on from a state that comes from outside."""
        if entry.weights[-1] != self.newest.model.weights_digest:
            raise NoStateError("the weights have changed since")
        state = State(self.newest.model)
        try:
            state.unpack(entry.packed)
            position = state.position
        except EngineError as error:
            raise NoStateError(str(error)) from error
        finally:
            state.close()
        if position != entry.tokens_count:
            raise NoStateError(f"a packed state of {position} tokens, and not of {entry.tokens_count}")

    def close(self) -> None:
        """Free everything."""
        for batch in self._batches():
            batch.close()
            batch.model.close()

    def _evict(self, entry: KeptState) -> None:
        if entry.weights == (self.newest.model.weights_digest,):
            self._evicted(entry)

    def _batches(self) -> Iterator[Batch]:
        yield self.newest
        yield from self._pins

    def _pinned(self) -> set[str]:
        """Sessions that drew with the newest weights and want to go on with them."""
        elsewhere = {name for sessions in self._pins.values() for name in sessions}
        return {
            name
            for name, session in self._sessions.items()
            if session.on_update == "pin" and session.drew_with and name not in elsewhere
        }

    def _unpin(self, session: str) -> None:
        for sessions in self._pins.values():
            sessions.discard(session)

    def _close_unneeded(self) -> None:
        for batch in [batch for batch, sessions in self._pins.items() if not sessions and not any(batch.jobs)]:
            del self._pins[batch]
            batch.close()
            batch.model.close()
