"""Continuous batching: which tokens of which requests go through one model next.

A turn is at most one prefill step (chunks of several requests, up to a budget of tokens) and one
draw (every request that waits for its next token, all together, for some rounds; who ends leaves the
rest of them to the others, since a chunk costs whoever logs it more than its tokens do).  So a
long prompt delays the others by one chunk, not by its length; tokens to score go through in chunks
of their own.  This is plain synchronous code; a turn returns what it drew and who is done.

Of requests that wait, for a place or for a prefill, those of a higher priority go first, then the oldest.

A request starts from the longest retained state that fits.  While another request still prefills
tokens it could share, it waits: a group of samples of one prompt pays for the prompt once.  States are
left behind where contexts part: at the end of the constant prefix, before the header of the reply (where
a Quick Instruction stands), at the end of a prompt that has none, where a request leaves what others went
through, and at its end.

Invariants: 1 and 2 of `rollout/engine.py`, because the model's arithmetic does not depend on what
shares a step (v4.h) and a retained state equals a recomputed one; where it does not, because other
weights computed it, only its own session goes on from it, and is told.
"""

from __future__ import annotations

import contextlib
from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Literal

import msgspec

from rollout.engine import KvBreak
from rollout.engines.embedded.binding import Chunk, Drawn, Model, NoRoomError, State, Stream
from rollout.engines.embedded.jobs import Job, Outcome, Scoring
from rollout.engines.embedded.library import build_digest
from rollout.engines.embedded.prefix_tree import shared_count
from rollout.engines.embedded.retained import RetainedStates
from rollout.engines.kept_state import KeptState
from rollout.errors import EngineError

MASK_BYTES_MAX = 16 << 20
"""Room for the masks of a turn, each as long as the vocabulary; one round of them is drawn however long."""
ID_BYTES = 4


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the engine.

    `running_max` requests step together (each holds about 1 MB), `queue_max` more may wait.
    `prefill_tokens_max` tokens a turn (at most 128) go to prompts; `rounds_max` tokens a request
    are drawn and told in one turn unless a prompt or a scoring waits.  `state_bytes_max` bounds what is kept between
    requests; 0 keeps nothing.  `cache_bytes_max` bounds the files of a cache directory.  `versions_max` versions of the
    weights are in memory at once, and `sessions_max` sessions are remembered until they are released.
    `threads_count` threads (1 to 16, but no more than there are usable processors) step together; it changes no token.
    """

    threads_count: int = 2
    running_max: int = 32
    queue_max: int = 1024
    prefill_tokens_max: int = 64
    rounds_max: int = 16
    state_bytes_max: int = 256 << 20
    cache_bytes_max: int = 1 << 30
    versions_max: int = 4
    sessions_max: int = 1 << 16


class Batch:
    """All requests that one version of the weights draws for: waiting, prefilling and decoding."""

    def __init__(self, model: Model, limits: Limits, retained: RetainedStates, policy_version: int = 0) -> None:
        self.model = model
        self.limits = limits
        self.retained = retained
        self.policy_version = policy_version
        self._weights = (model.weights_digest,)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._scorings: deque[Scoring] = deque()
        self._idle_states: list[State] = []

    @property
    def jobs(self) -> Iterator[Job | Scoring]:
        """Everything that is not done."""
        yield from self._running
        yield from self._waiting
        yield from self._scorings

    @property
    def started(self) -> Iterator[Job | Scoring]:
        """What has been started and is not done."""
        yield from self._running
        if self._scorings and self._scorings[0].state:
            yield self._scorings[0]

    def add(self, job: Job | Scoring) -> None:
        """Queue a job."""
        if isinstance(job, Scoring):
            self._scorings.append(job)
        else:
            insort(self._waiting, job, key=_urgency)

    def remove(self, job: Job | Scoring) -> None:
        """End a job, done or not; its state may be retained.  Unknown jobs are ignored."""
        if isinstance(job, Scoring):
            if job in self._scorings:
                self._scorings.remove(job)
                self._discard(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        elif job in self._running:
            self._running.remove(job)
            self._retain(job, "" if job.session.is_released else job.request.session)
            self._discard(job)

    def hand_over(self, job: Job | Scoring, to: Batch) -> None:
        """Let a job go on with the weights of another batch, between two tokens.

        What draws for the first time, is cut, or is scored begins again; what is kept goes on over its state.
        """
        if isinstance(job, Scoring):
            self._scorings.remove(job)
            self._discard(job)
            job.told.clear()
            to.add(job)
            return
        if job in self._waiting:
            self._waiting.remove(job)
            to.add(job)
            return
        self._running.remove(job)
        insort(to._running, job, key=_urgency)
        is_same = job.weights[-1:] == to._weights
        if job.state is None or not (is_same or (job.session.drew_with and job.request.on_update == "keep")):
            self._discard(job)
            return
        job.state.model = to.model
        if not is_same:
            job.weights, job.kv = (*job.weights, *to._weights), "kept"

    def close(self) -> None:
        """Free every state; the model must still be open."""
        for job in self.jobs:
            self._discard(job)
        for state in self._idle_states:
            state.close()
        self._running.clear()
        self._waiting.clear()
        self._scorings.clear()
        self._idle_states.clear()

    def turn(self, *, admits: bool = True) -> list[Outcome]:
        """One prefill step, some rounds of draws and one chunk to score, whichever there is work for.

        Without `admits` only what has been started goes on.
        """
        while admits and self._waiting and len(self._running) < self.limits.running_max:
            insort(self._running, self._waiting.popleft(), key=_urgency)
        outcomes = self._start_jobs()
        self._prefill()
        outcomes += self._decode()
        if self._scorings and (admits or self._scorings[0].state):
            outcomes += self._score(self._scorings[0])
        for outcome in outcomes:
            if outcome.finish or outcome.error:
                self.remove(outcome.job)
        return outcomes

    def _start_jobs(self) -> list[Outcome]:
        """Give a state to every running job that cannot share what another one is computing."""
        budget = self.limits.prefill_tokens_max
        for job in self._running:
            if budget <= 0:
                break
            if job.state is not None or job.awaits_state:
                budget -= job.pending_count - 1 if job.prefills else 0
                continue
            entry, known_count = self.origin(job)
            if self._is_shared(job, entry):
                continue
            try:
                job.state = self._take_state()
            except EngineError as error:
                return self._without_state(job, error)
            job.weights = self._weights
            job.routes_start = entry.tokens_count if entry else 0
            job.plan_places(self.model.fork_token_id, self.model.header_token_id, job.routes_start, known_count)
            if entry:
                job.state.unpack(entry.packed)
                job.weights = entry.weights if entry.weights[-1:] == self._weights else (*entry.weights, *self._weights)
            if job.drawn_count == 0:
                job.cached_count = job.state.position
            job.kv = self._kv(job, entry)
            budget -= job.pending_count - 1
        return []

    def origin(self, job: Job) -> tuple[KeptState | None, int]:
        """The retained state to start a job from, and how many of its tokens others went through.

        That is the longest, or its session's own over a change of weights.
        """
        tokens, own = job.tokens.tobytes(), self.retained.own(job.request.session)
        if own and own.weights != self._weights:
            may_go_on = own.weights[-1:] == self._weights or job.request.on_update == "keep"
            if may_go_on and len(own.tokens) < len(tokens) and tokens.startswith(own.tokens):
                return own, 0
        if job.request.returns_routes:  # of what others computed nobody would tell it
            is_ours = own is not None and own.weights == self._weights and len(own.tokens) < len(tokens)
            return (own if own and is_ours and tokens.startswith(own.tokens) else None), 0
        return self.retained.longest_prefix(tokens, self.model.weights_digest)

    def _is_shared(self, job: Job, entry: KeptState | None) -> bool:
        """Whether another job is about to leave behind more of the same than the entry has, by these weights alone."""
        is_alone = job.request.returns_routes or not self.retained.bytes_max
        if is_alone or (entry and entry.weights != self._weights):
            return False
        start, tokens = entry.tokens_count if entry else 0, job.tokens.tobytes()
        return any(
            other.leaves(start, min(shared_count(tokens, other.tokens.tobytes()), len(job.tokens) - 1))
            for other in self._running
            if other.prefills and other.weights == self._weights
        )

    def _kv(self, job: Job, entry: KeptState | None) -> KvBreak:
        """What is to be said of a state that was just made from an entry."""
        session = job.session
        if session.drew_with not in ("", self.model.weights_digest):
            return "kept" if len(job.weights) > 1 else "rebuilt"
        is_own = entry is not None and entry is self.retained.own(job.request.session)
        return "restored" if session.is_restored and is_own else ""

    def _prefill(self) -> None:
        budget = self.limits.prefill_tokens_max
        chunks: list[tuple[Job, Chunk]] = []
        for job in self._running:
            if budget <= 0 or job.state is None or job.pending_count <= 1:
                continue
            begin = job.state.position
            end = min(len(job.tokens) - 1, begin + budget, *(place for place in job.places if place > begin))
            routes = bytearray((end - begin) * self.model.routing.row_bytes if job.request.returns_routes else 0)
            chunks.append((job, Chunk(job.state, job.tokens[begin:end], routes=routes)))
            budget -= end - begin
        if not chunks:
            return
        self.model.step([chunk for _, chunk in chunks])
        for job, chunk in chunks:
            job.routes += chunk.routes
            if chunk.state.position in job.places:
                self._retain(job)

    def _decode(self) -> list[Outcome]:
        """The next tokens of all that can be drawn for; one that ends leaves the rounds to the others."""
        jobs = [job for job in self._running if job.state is not None and job.pending_count == 1]
        if not jobs:
            return []
        busy = self._scorings or len(jobs) < len(self._running)  # those that wait for a place get one when a job ends
        rounds_max = 1 if busy else self._rounds_max(jobs)
        try:
            told = self.model.decode([_stream(job, min(rounds_max, self._left(job))) for job in jobs])
        except NoRoomError as error:  # the others go on with the next turn
            return [Outcome(max(jobs, key=_demand), [], None, error=error)]
        outcomes = []
        for job, drawn in zip(jobs, told, strict=True):
            job.tokens.extend(token.token_id for token in drawn)
            finish: Literal["stop", "length"] | None = None
            if job.tokens[-1] in job.request.stop_ids:
                finish = "stop"
            elif self._left(job) == 0:
                finish = "length"
            outcomes.append(self._outcome(job, drawn, finish))
        return outcomes

    def _rounds_max(self, jobs: list[Job]) -> int:
        """Of one turn; fewer where masks would fill the memory."""
        round_bytes = ID_BYTES * self.model.dimensions.vocab_count * sum(job.wants_mask for job in jobs)
        return max(1, min(self.limits.rounds_max, MASK_BYTES_MAX // max(1, round_bytes)))

    def _outcome(self, job: Job, drawn: list[Drawn], finish: Literal["stop", "length"] | None) -> Outcome:
        routes = job.take_routes(drawn, self.model.routing.row_bytes) if job.request.returns_routes else None
        outcome = Outcome(job, drawn, finish, self.policy_version, job.kv, job.cached_count, routes)
        job.kv, job.cached_count = "", 0
        job.session.drew_with, job.session.is_restored = self.model.weights_digest, False
        return outcome

    def _score(self, job: Scoring) -> list[Outcome]:
        """The next chunk of the tokens to score."""
        try:
            job.state = job.state or self._take_state()
        except EngineError as error:
            return self._without_state(job, error)
        begin = job.state.position
        end = min(begin + self.limits.prefill_tokens_max + 1, len(job.token_ids))
        token_ids = job.token_ids[begin:end]
        try:
            job.told += self.model.score(job.state, token_ids, job.top_count, wants_hidden=job.wants_hidden)
        except NoRoomError as error:
            return [Outcome(job, [], None, error=error)]
        return [Outcome(job, job.told, "length", self.policy_version)] if end == len(job.token_ids) else []

    def _left(self, job: Job) -> int:
        """Tokens a job may still draw: what it asked for, or until the context is full."""
        context_left = self.model.dimensions.context_tokens_max - len(job.tokens)
        return min(job.request.tokens_count_max - job.drawn_count, context_left)

    def keep(self, job: Job) -> KeptState | None:
        """A running job's state as it is now, if it has taken in anything, and all that is asked for of it was told."""
        if job.state is None or job.state.position == 0 or job.routes:
            return None
        return KeptState(build_digest(), job.weights, job.taken_tokens, job.state.pack())

    def _retain(self, job: Job, session: str = "") -> None:
        """Leave a job's state to all who begin alike, and to a session as its newest if one is named."""
        if job.state is None or job.state.position == 0 or not self.retained.bytes_max:
            return
        if (session and job.routes) or (not session and len(job.weights) > 1):
            return  # what was not told must be computed again; nobody else may go on over two versions
        if not self.retained.claim(job.taken_tokens, job.weights, session):
            with contextlib.suppress(EngineError):  # memory is full: what is not kept is computed again
                self.retained.put(KeptState(build_digest(), job.weights, job.taken_tokens, job.state.pack()), session)

    def _without_state(self, job: Job | Scoring, error: EngineError) -> list[Outcome]:
        """Memory has no room for a job's state: it waits for that of another, or fails alone if there is none."""
        return [] if any(each.state for each in self.jobs) else [Outcome(job, [], None, error=error)]

    def _take_state(self) -> State:
        state = self._idle_states.pop() if self._idle_states else State(self.model)
        state.reset()
        return state

    def _discard(self, job: Job | Scoring) -> None:
        if job.state is not None:
            self._idle_states.append(job.state)
            job.state = None
        if isinstance(job, Job):
            job.routes.clear()


def _stream(job: Job, rounds_max: int) -> Stream:
    assert job.state is not None  # noqa: S101 - only those that have one are drawn for
    return Stream(
        job.state,
        job.tokens[-1],
        job.request.sampling,
        job.request.stream_key,
        job.stop_ids,
        rounds_max,
        job.request.top_logprobs_count,
        job.wants_mask,
        job.request.returns_routes,
        job.request.returns_hidden,
    )


def _demand(job: Job) -> tuple[bool, bool, int, bool]:
    """Who takes most memory for what it wants to be told is the largest."""
    request = job.request
    return job.wants_mask, request.returns_hidden, request.top_logprobs_count, request.returns_routes


def _urgency(job: Job) -> int:
    return -job.request.priority
