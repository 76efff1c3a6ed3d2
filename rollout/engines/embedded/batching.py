"""Continuous batching: which tokens of which requests go through the model next.

A turn is at most one prefill step (chunks of several requests, up to a budget of tokens) and one
decode call (every request that waits for its next token, all together, for a few rounds).  So a
long prompt delays the others by one chunk, not by its length.  This is plain synchronous code,
driven by the thread in `engine.py`; a turn returns what it drew and who is done.

A request starts from the longest retained state that fits.  While another request still prefills
tokens it could share, it waits: a group of samples of one prompt pays for the prompt once.

Invariants: 1 and 2 of `rollout/engine.py`, because the model's arithmetic does not depend on what
shares a step (v4.h) and a retained state equals a recomputed one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from typing import Literal

import msgspec

from rollout.engine import SampleRequest
from rollout.engines.embedded.binding import Chunk, Drawn, Model, State, Stream
from rollout.engines.embedded.retained import TOKEN_BYTES, Retained, RetainedStates


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the engine.

    `running_max` requests step together (each holds about 1 MB), `queue_max` more may wait.
    `prefill_tokens_max` tokens a turn (at most 128) go to prompts; `rounds_max` tokens a request
    are drawn in one call when nobody waits.  `state_bytes_max` bounds what is kept between
    requests; 0 keeps nothing.
    """

    running_max: int = 32
    queue_max: int = 1024
    prefill_tokens_max: int = 64
    rounds_max: int = 4
    state_bytes_max: int = 256 << 20


class Job:
    """One request on its way: its tokens so far, and its state once it has started."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.tokens = array("I", request.token_ids)
        self.stop_ids = tuple(request.stop_ids)
        self.state: State | None = None
        self.keeps_state = True

    @property
    def pending_count(self) -> int:
        """Tokens that the state has not taken in; 1 when the next one can be drawn."""
        return len(self.tokens) - (self.state.position if self.state else 0)

    @property
    def drawn_count(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.request.token_ids)

    @property
    def prefills(self) -> bool:
        """Whether it holds a state that has not yet taken in all but the last token."""
        return self.state is not None and self.pending_count > 1


class Outcome(msgspec.Struct, frozen=True):
    """Tokens that one turn drew for a job; `finish` on the last."""

    job: Job
    drawn: list[Drawn]
    finish: Literal["stop", "length"] | None


class Batch:
    """All requests of one model: waiting, prefilling and decoding."""

    def __init__(self, model: Model, limits: Limits, fork_token_id: int | None) -> None:
        self.model = model
        self.limits = limits
        self.retained = RetainedStates(limits.state_bytes_max)
        self._fork_token_id = fork_token_id
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._idle_states: list[State] = []

    @property
    def jobs(self) -> Iterator[Job]:
        """Every job that is not done."""
        yield from self._running
        yield from self._waiting

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(job)

    def remove(self, job: Job) -> None:
        """End a job, done or not; its state may be retained.  Unknown jobs are ignored."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif job in self._running:
            self._running.remove(job)
            self._give_back(job)

    def release(self, session: str) -> None:
        """Forget what is kept for a session, now and when its running jobs end."""
        self.retained.drop(session)
        for job in self.jobs:
            if job.request.session == session:
                job.keeps_state = False

    def close(self) -> None:
        """Free every state; the model must still be open."""
        for job in self._running:
            if job.state is not None:
                self._idle_states.append(job.state)
        for state in self._idle_states:
            state.close()
        self._running.clear()
        self._waiting.clear()
        self._idle_states.clear()

    def turn(self) -> list[Outcome]:
        """One prefill step and one decode call, whichever there is work for."""
        while self._waiting and len(self._running) < self.limits.running_max:
            self._running.append(self._waiting.popleft())
        self._start_jobs()
        self._prefill()
        outcomes = self._decode()
        for outcome in outcomes:
            if outcome.finish:
                self.remove(outcome.job)
        return outcomes

    def _start_jobs(self) -> None:
        """Give a state to every running job that cannot share what another one is computing."""
        budget = self.limits.prefill_tokens_max - sum(job.pending_count - 1 for job in self._running if job.prefills)
        for job in self._running:
            if budget <= 0:
                return
            if job.state is not None:
                continue
            tokens = job.tokens.tobytes()
            entry = self.retained.longest_prefix(tokens)
            shared = tokens[: (entry.tokens_count if entry else 0) * TOKEN_BYTES + TOKEN_BYTES]
            if any(other.tokens.tobytes().startswith(shared) for other in self._running if other.prefills):
                continue
            job.state = self._idle_states.pop() if self._idle_states else State(self.model)
            if entry:
                job.state.unpack(entry.packed)
            else:
                job.state.reset()
            budget -= job.pending_count - 1

    def _prefill(self) -> None:
        budget = self.limits.prefill_tokens_max
        chunks: list[tuple[Job, Chunk]] = []
        for job in self._running:
            if budget <= 0 or job.state is None or job.pending_count <= 1:
                continue
            begin = job.state.position
            end = min(len(job.tokens) - 1, begin + budget)
            fork = self._fork_index(job)
            if begin < fork < end:
                end = fork
            chunks.append((job, Chunk(job.state, job.tokens[begin:end])))
            budget -= end - begin
        if not chunks:
            return
        self.model.step([chunk for _, chunk in chunks])
        for job, chunk in chunks:
            position = chunk.state.position
            if position == self._fork_index(job):
                self._retain(job.tokens[:position].tobytes(), job)
            if job.pending_count == 1 and job.keeps_state:
                self._retain(job.request.session, job)

    def _fork_index(self, job: Job) -> int:
        """Where the constant prefix of the prompt ends (before the first user turn), or -1."""
        prompt = job.request.token_ids
        return prompt.index(self._fork_token_id) if self._fork_token_id in prompt else -1

    def _decode(self) -> list[Outcome]:
        jobs = [job for job in self._running if job.state is not None and job.pending_count == 1]
        if not jobs:
            return []
        busy = self._waiting or len(jobs) < len(self._running)
        rounds_max = min(1 if busy else self.limits.rounds_max, *(self._left(job) for job in jobs))
        streams = [
            Stream(job.state, job.tokens[-1], job.request.sampling, job.request.stream_key, job.stop_ids)
            for job in jobs
            if job.state is not None
        ]
        outcomes = []
        for job, drawn in zip(jobs, self.model.decode(streams, rounds_max), strict=True):
            job.tokens.extend(token.token_id for token in drawn)
            finish: Literal["stop", "length"] | None = None
            if drawn[-1].token_id in job.request.stop_ids:
                finish = "stop"
            elif self._left(job) == 0:
                finish = "length"
            outcomes.append(Outcome(job, drawn, finish))
        return outcomes

    def _left(self, job: Job) -> int:
        """Tokens a job may still draw: what it asked for, or until the context is full."""
        context_left = self.model.dimensions.context_tokens_max - len(job.tokens)
        return min(job.request.tokens_count_max - job.drawn_count, context_left)

    def _retain(self, owner: str | bytes, job: Job) -> None:
        if job.state is None or job.state.position == 0 or self.retained.bytes_max == 0:
            return
        self.retained.put(owner, Retained(job.tokens[: job.state.position].tobytes(), job.state.pack()))

    def _give_back(self, job: Job) -> None:
        if job.state is None:
            return
        if job.keeps_state:
            self._retain(job.request.session, job)
        self._idle_states.append(job.state)
        job.state = None
