"""The embedded engine behind the port: an asyncio face on one stepping thread.

The thread owns the model and the batch; the event loop only posts jobs to it and gets tokens back
through `call_soon_threadsafe`, one call a turn for all requests.  The C code releases the
interpreter lock, so the loop runs while the model steps.  A consumer that lags gets its tokens
merged into one chunk: nothing queues beyond what the request asked for.

Invariants: 1 and 2 of `rollout/engine.py`, bit for bit (see `batching.py` and `v4.h`).
See: docs/architecture.md, "Engine".
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from rollout.engine import EngineInfo, Sampled, SampleRequest, check_request
from rollout.engines.embedded.batching import Batch, Job, Limits, Outcome
from rollout.engines.embedded.binding import BATCH_TOKENS_MAX, Model
from rollout.engines.embedded.checkpoint import load_checkpoint
from rollout.engines.embedded.library import build_digest
from rollout.errors import EngineError, RequestError

CLOSED = "the engine is closed; open it before sampling"


class _Mailbox:
    """Where the loop keeps what arrived for one request until its consumer takes it."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.outcome: Outcome | None = None
        self.error: EngineError | None = None

    def put(self, outcome: Outcome) -> None:
        self.token_ids += (drawn.token_id for drawn in outcome.drawn)
        self.logprobs += (drawn.logprob for drawn in outcome.drawn)
        self.outcome = outcome
        self.arrived.set()

    def fail(self, error: EngineError) -> None:
        self.error = error
        self.arrived.set()

    async def take(self) -> Sampled:
        """Everything that arrived since the last call, at least one token; after that, a failure's EngineError."""
        await self.arrived.wait()
        if self.error is not None and not self.token_ids:
            raise self.error
        if self.error is None:
            self.arrived.clear()
        finish = self.outcome.finish if self.outcome else None
        chunk = Sampled(token_ids=tuple(self.token_ids), logprobs=tuple(self.logprobs), finish=finish)
        self.token_ids.clear()
        self.logprobs.clear()
        return chunk


class EmbeddedEngine:
    """A DeepSeek-V4 checkpoint decoded in this process (implements `rollout.engine.Engine`).

    `checkpoint` is a folder as described in `checkpoint/README.md`; by default the one that ships
    with the package.  All methods belong to the event loop that called `open`.  A context holds
    at most `info.context_tokens_max` tokens: a longer prompt is a RequestError, and an output that
    fills it ends with "length".  `seed` and `stream_key` count modulo 2**64.
    """

    def __init__(self, checkpoint: Path | None = None, limits: Limits | None = None) -> None:
        self._folder = checkpoint
        self._limits = limits or Limits()
        if not 1 <= self._limits.prefill_tokens_max <= BATCH_TOKENS_MAX:
            raise RequestError(f"prefill_tokens_max must be 1 to {BATCH_TOKENS_MAX}")
        if not 1 <= self._limits.running_max <= BATCH_TOKENS_MAX or self._limits.rounds_max < 1:
            raise RequestError(f"running_max must be 1 to {BATCH_TOKENS_MAX} and rounds_max at least 1")
        self._info: EngineInfo | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: list[Callable[[Batch], None]] = []
        self._work = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._mailboxes: dict[Job, _Mailbox] = {}

    @property
    def info(self) -> EngineInfo:
        """Facts of the open engine.  EngineError before `open`."""
        if self._info is None:
            raise EngineError(CLOSED)
        return self._info

    async def open(self) -> None:
        """Check and load the checkpoint (about 0.2 s), start the thread.  EngineError names what is wrong."""
        if self._thread is not None:
            raise EngineError("the engine is already open")
        self._loop = asyncio.get_running_loop()
        batch = await asyncio.to_thread(self._load)
        self._closing, self._failure = False, None
        self._thread = threading.Thread(target=self._run, args=(batch,), name="embedded-engine", daemon=True)
        self._thread.start()

    def _load(self) -> Batch:
        checkpoint = load_checkpoint(self._folder)
        model = Model(checkpoint)
        self._info = EngineInfo(
            name="embedded",
            build=build_digest(),
            weights_digest=checkpoint.weights_digest,
            vocab_count=checkpoint.dimensions.vocab_count,
            context_tokens_max=checkpoint.dimensions.context_tokens_max,
        )
        return Batch(model, self._limits, checkpoint.fork_token_id)

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Stream the continuation; closing the iterator early stops it between two turns.

        RequestError for a request that can never run; EngineError when the engine is closed, its
        queue is full, it closes while the request runs, or its thread failed (then it names the
        failure, also to later callers, until the engine is closed).
        """
        check_request(request, self.info)
        if self._thread is None or self._closing:
            raise self._end(CLOSED)
        if len(self._mailboxes) >= self._limits.running_max + self._limits.queue_max:
            raise EngineError(f"the engine's queue is full ({len(self._mailboxes)} requests); try again later")
        job, mailbox = Job(request), _Mailbox()
        self._mailboxes[job] = mailbox
        self._post(lambda batch: batch.add(job))
        try:
            finish = None
            while finish is None:
                chunk = await mailbox.take()
                finish = chunk.finish
                yield chunk
        finally:
            del self._mailboxes[job]
            self._post(lambda batch: batch.remove(job))

    async def release(self, session: str) -> None:
        """Forget what was kept for a session; unknown sessions are ignored."""
        self._post(lambda batch: batch.release(session))

    async def close(self) -> None:
        """Stop the thread and free everything; running requests end with EngineError.  Idempotent."""
        thread = self._thread
        if thread is None:
            return
        with self._work:
            self._closing = True
            self._work.notify()
        await asyncio.to_thread(thread.join)
        self._thread = self._failure = None
        self._info = None

    def _post(self, command: Callable[[Batch], None]) -> None:
        with self._work:
            if not self._closing:
                self._posted.append(command)
                self._work.notify()

    def _run(self, batch: Batch) -> None:
        """The stepping thread.  However it ends, every waiting consumer is told."""
        try:
            try:
                while self._obey(batch):
                    outcomes = batch.turn()
                    if outcomes:
                        self._call_loop(self._deliver, outcomes)
            finally:
                batch.close()
                batch.model.close()
        except BaseException as error:  # nobody is above a thread: the callers are told, now and later
            self._failure = error
        finally:
            with self._work:
                self._closing = True
                self._posted.clear()
            self._call_loop(self._fail_all)

    def _end(self, otherwise: str) -> EngineError:
        """Why nothing can be sampled: the thread's failure, or else `otherwise`."""
        if self._failure is None:
            return EngineError(otherwise)
        error = EngineError(f"the engine's thread failed: {self._failure!r}; close the engine and open it again")
        error.__cause__ = self._failure
        return error

    def _obey(self, batch: Batch) -> bool:
        """Carry out what the loop posted; wait for something to do.  False when closing."""
        with self._work:
            while not (self._posted or self._closing or any(batch.jobs)):
                self._work.wait()
            commands, self._posted = self._posted, []
            if self._closing:
                return False
        for command in commands:
            command(batch)
        return True

    def _call_loop(self, function: Callable[..., None], *arguments: object) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():  # the loop ended without closing the engine: nobody is left to tell
            self._closing = True
            return
        loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            mailbox = self._mailboxes.get(outcome.job)
            if mailbox is not None:
                mailbox.put(outcome)

    def _fail_all(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.fail(self._end("the engine closed while the request ran; its logged tokens are kept"))
