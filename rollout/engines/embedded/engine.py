"""The embedded engine behind the port: an asyncio face on one stepping thread.

Invariants: those of `rollout/engine.py`, bit for bit (see `batching.py` and `v4.h`).
See: docs/architecture.md, "Engine".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec

import wal
from rollout.engine import (
    Announce,
    EngineInfo,
    PauseMode,
    Sampled,
    SampleRequest,
    Scored,
    check_request,
    check_score,
    check_version,
)
from rollout.engines.embedded.batching import Limits
from rollout.engines.embedded.binding import BATCH_TOKENS_MAX, THREADS_MAX, Model
from rollout.engines.embedded.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, load_checkpoint
from rollout.engines.embedded.config import differences
from rollout.engines.embedded.disk_tier import DiskTier
from rollout.engines.embedded.jobs import Job, Outcome, Scoring
from rollout.engines.embedded.library import build_digest
from rollout.engines.embedded.mailbox import Mailbox
from rollout.engines.embedded.stepping import CLOSED, SteppingThread
from rollout.engines.embedded.versions import Versions
from rollout.engines.kept_state import KeptState, NoStateError, read_state, write_state
from rollout.engines.state_cache import StateCache
from rollout.errors import EngineError, RequestError

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """A DeepSeek-V4 checkpoint decoded in this process (implements `rollout.engine.Engine`).

    `checkpoint` is a folder as described in `checkpoint/README.md`; by default the one that ships
    with the package.  All methods belong to the event loop that called `open`.  A context holds
    at most `info.context_tokens_max` tokens: a longer prompt is a RequestError, and an output that
    fills it ends with "length".  `seed` and `stream_key` count modulo 2**64.

    `cache` is a directory for states that memory has no room for, and for those that are left when the engine
    closes; the next engine on it, of the same build and weights, goes on from them.  Without one there are none.
    """

    def __init__(
        self,
        checkpoint: Path | None = None,
        limits: Limits | None = None,
        policy_version: int = 0,
        *,
        cache: Path | None = None,
    ) -> None:
        self._folder = checkpoint
        self.cache = cache
        self._tier: DiskTier | None = None
        self._policy_version = policy_version
        self._limits = limits or Limits()
        if not 1 <= self._limits.prefill_tokens_max <= BATCH_TOKENS_MAX:
            raise RequestError(f"prefill_tokens_max must be 1 to {BATCH_TOKENS_MAX}")
        if not 1 <= self._limits.running_max <= BATCH_TOKENS_MAX or self._limits.rounds_max < 1:
            raise RequestError(f"running_max must be 1 to {BATCH_TOKENS_MAX} and rounds_max at least 1")
        if not 1 <= self._limits.threads_count <= THREADS_MAX:
            raise RequestError(f"threads_count must be 1 to {THREADS_MAX}")
        if self._limits.versions_max < 1 or self._limits.sessions_max < 1:
            raise RequestError("versions_max and sessions_max must be at least 1")
        self._info: EngineInfo | None = None
        self._thread: SteppingThread | None = None
        self._is_paused = False
        self._mailboxes: dict[Job | Scoring, Mailbox] = {}
        self._sessions: set[str] = set()
        self._updating, self._turning = asyncio.Lock(), asyncio.Lock()
        """Held by who changes its weights, and by who opens or closes it."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the open engine and of its newest weights.  EngineError before `open`."""
        if self._info is None:
            raise EngineError(CLOSED)
        return self._info

    @property
    def checkpoint(self) -> Path:
        """See Engine."""
        return self._folder or DEFAULT_CHECKPOINT

    @property
    def is_paused(self) -> bool:
        """See Engine."""
        return self._is_paused

    @property
    def failure(self) -> str:
        """See Engine."""
        return CLOSED if self._thread is None else str(self._thread.error or "")

    async def open(self) -> None:
        """Check and load the checkpoint (about 0.2 s), start the thread.  EngineError names what is wrong.

        Nothing is left open if that fails, or if the caller is cancelled meanwhile.
        """
        async with self._turning:
            if self._thread is not None:
                raise EngineError("the engine is already open")
            try:
                await wal.settled(self._open())
            except BaseException:
                await self._close()
                raise

    async def _open(self) -> None:
        if self.cache is not None:
            tier = DiskTier(StateCache(self.cache, self._limits.cache_bytes_max, build_digest()))
            await tier.open()
            self._tier = tier
        versions = await asyncio.to_thread(self._load)
        self._thread = SteppingThread(versions, self._deliver, self._fail_all)
        if self._tier is not None:
            self._tier.thread = self._thread

    def _load(self) -> Versions:
        checkpoint = load_checkpoint(self._folder)
        model = self._open_model(checkpoint)
        self._shape = (checkpoint.dimensions, checkpoint.vocabulary_digest)
        self._info = EngineInfo(
            name="embedded",
            build=build_digest(),
            weights_digest=checkpoint.weights_digest,
            vocab_count=checkpoint.dimensions.vocab_count,
            context_tokens_max=checkpoint.dimensions.context_tokens_max,
            policy_version=self._policy_version,
            routing=model.routing,
            hidden_dim=checkpoint.dimensions.hidden_dim,
        )
        tier = (self._tier.evicted, self._tier.wanted) if self._tier else ()
        return Versions(model, self._limits, self._policy_version, *tier)

    def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Stream the continuation; closing the iterator early stops it between two turns.

        RequestError for a request that can never run; EngineError when the engine is closed, its
        queue is full, it closes while the request runs, or its thread failed (then it names the
        failure, also to later callers, until the engine is closed); PreemptedError as the port says.
        """
        check_request(request, self.info)
        if len(self._sessions) >= self._limits.sessions_max and request.session not in self._sessions:
            raise EngineError(f"{len(self._sessions)} sessions are open; release those that have ended")
        self._sessions.add(request.session)
        return self._stream(Job(request))

    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """See Engine."""
        check_score(token_ids, self.info, top_logprobs_count, returns_hidden=returns_hidden)
        if len(token_ids) == 1:
            return Scored(logprobs=(), policy_version=self.info.policy_version)
        async with aclosing(
            self._stream(Scoring(token_ids, top_logprobs_count, wants_hidden=returns_hidden))
        ) as chunks:
            told = await anext(chunks)
        row_bytes = 2 * self.info.hidden_dim
        return Scored(
            logprobs=told.logprobs,
            policy_version=told.policy_version,
            top_logprobs=told.top_logprobs,
            hidden=tuple(told.hidden[at : at + row_bytes] for at in range(0, len(told.hidden), row_bytes)),
        )

    async def _stream(self, job: Job | Scoring) -> AsyncGenerator[Sampled, None]:
        """Everything that is told of a job, up to its end."""
        thread = self._open_thread()
        if len(self._mailboxes) >= self._limits.running_max + self._limits.queue_max:
            raise EngineError(f"the engine's queue is full ({len(self._mailboxes)} requests); try again later")
        mailbox = self._mailboxes[job] = Mailbox()
        stored = self._stored(job)
        thread.post(lambda versions: versions.add(job, stored))
        try:
            finish = None
            while finish is None:
                chunk = await mailbox.take()
                finish = chunk.finish
                yield chunk
        finally:
            del self._mailboxes[job]
            thread.post(lambda versions: versions.remove(job))

    def _stored(self, job: Job | Scoring) -> bytes:
        """The tokens of the longest state on disk that could serve a job."""
        if self._tier is None or isinstance(job, Scoring) or job.request.returns_routes:
            return b""  # of the routes of what others computed nobody would tell
        return self._tier.stored(job.tokens.tobytes(), self.info.weights_digest)

    async def preempt(self, session: str) -> None:
        """See Engine."""
        await self._open_thread().tell(lambda versions: versions.preempt(session))

    async def release(self, session: str) -> None:
        """See Engine."""
        self._sessions.discard(session)
        if self._thread is not None:
            self._thread.post(lambda versions: versions.release(session))

    async def pause(self, mode: PauseMode) -> None:
        """See Engine."""
        thread = self._open_thread()
        self._is_paused = True
        await thread.tell(lambda versions: versions.pause(mode))
        if mode == "wait":
            await thread.stood_still()

    async def resume(self) -> None:
        """See Engine."""
        self._is_paused = False
        self._open_thread().post(Versions.resume)

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """Load the weights beside those that draw, then change between two turns; see Engine.

        A caller that is cancelled meanwhile does not stop the change.
        """
        return await wal.settled(self._update(checkpoint, policy_version, announce))

    async def _update(self, checkpoint: Path, policy_version: int, announce: Announce | None) -> EngineInfo:
        async with self._updating:
            thread, info = self._open_thread(), self.info
            is_repeated = policy_version == info.policy_version and checkpoint == self._folder
            if is_repeated:
                return info
            check_version(info, policy_version)
            await thread.call(Versions.check_room)
            model = await asyncio.to_thread(self._load_alike, checkpoint)
            changed = msgspec.structs.replace(info, weights_digest=model.weights_digest, policy_version=policy_version)
            try:
                await thread.call(Versions.check_room)
                if announce is not None:
                    await announce(changed)
                await thread.call(lambda versions: versions.update(model, policy_version))
                self._info = changed
            finally:
                if self._info is not changed:
                    model.close()
            self._folder, self._policy_version = checkpoint, policy_version
            return changed

    def _load_alike(self, folder: Path) -> Model:
        """A model whose tokens and states mean the same as those of the model that draws."""
        checkpoint = load_checkpoint(folder)
        dimensions, vocabulary_digest = self._shape
        other = differences(checkpoint.dimensions, dimensions)
        if checkpoint.vocabulary_digest != vocabulary_digest:
            other.append("the ids of tokenizer.json")
        if other:
            raise EngineError(f"{folder}: another model ({'; '.join(other)}); open another engine for it")
        return self._open_model(checkpoint)

    def _open_model(self, checkpoint: Checkpoint) -> Model:
        return Model(checkpoint, min(self._limits.threads_count, len(os.sched_getaffinity(0))))

    async def save(self, session: str, path: Path) -> int:
        """See Engine."""
        kept = await self._open_thread().call(lambda versions: versions.keep(session))
        if kept is None:
            return 0
        await asyncio.to_thread(write_state, path, kept)
        return kept.tokens_count

    async def restore(self, session: str, path: Path) -> int:
        """See Engine."""
        thread, info = self._open_thread(), self.info
        try:
            entry = await asyncio.to_thread(read_state, path, info.build, info.weights_digest)
            tokens_count = await thread.call(lambda versions: versions.restore(session, entry))
        except NoStateError as error:
            _log.warning("%s: not restored: %s; the context is computed again", path, error)
            return 0
        self._sessions.add(session)
        return tokens_count

    async def close(self) -> None:
        """Stop the thread and free everything; running requests end with EngineError.  Idempotent."""
        async with self._turning:
            await self._close()

    async def _close(self) -> None:
        kept: list[KeptState] = []
        if self._thread is not None:
            if self._tier is not None and self._thread.error is None:
                with contextlib.suppress(EngineError):  # it failed just now
                    kept = await self._thread.call(Versions.kept)
            await self._thread.stop()
        self._thread = self._info = None
        if self._tier is not None:
            await self._tier.close(kept)
            self._tier = None
        self._is_paused = False
        self._sessions.clear()

    def _open_thread(self) -> SteppingThread:
        if self._thread is None:
            raise EngineError(CLOSED)
        if (error := self._thread.error) is not None:
            raise error
        return self._thread

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            mailbox = self._mailboxes.get(outcome.job)
            if mailbox is not None:
                mailbox.put(outcome)

    def _fail_all(self) -> None:
        for mailbox in self._mailboxes.values():
            closed = EngineError("the engine closed while the request ran; its logged tokens are kept")
            mailbox.fail((self._thread and self._thread.failure) or closed)
