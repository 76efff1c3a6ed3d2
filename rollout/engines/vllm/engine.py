"""vLLM over HTTP as an engine: one request for what is left of an answer, however often it is cut.

A stream that is cut (by a preemption, a pause, new weights) ends at the server with all that it sent; what comes after
is another request, of the prompt and what was drawn.  So each HTTP request draws with one version of the weights, which
is known when it begins and checked against what the server says when it ends.

Invariants:
1. No request is open at the server while its weights change.
2. Nothing is handed over between `pause("keep")` and `resume`.
3. A prefix cache is used by requests of the same weights only: their digest is the salt.

See: docs/adr/0027-engines-over-http.md; docs/architecture.md, "Engine".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, closing
from pathlib import Path

import msgspec

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
from rollout.engines.guard import Patience
from rollout.engines.vllm import wire
from rollout.engines.vllm.change import Change
from rollout.engines.vllm.connection import CALL_S_MAX, Connection
from rollout.engines.vllm.facts import Facts, read_facts, read_label, unusable
from rollout.engines.vllm.pauses import Pause
from rollout.engines.vllm.sessions import Sessions
from rollout.engines.vllm.stream import (
    Run,
    check_label,
    check_ours,
    cut,
    finish_of,
    joined,
    question,
    read_chunks,
    score_question,
    vouch,
)
from rollout.engines.vllm.weights import check_fits, read_weights
from rollout.errors import EngineError, PreemptedError, RequestError, RolloutError

SCORE_S_MAX = 600.0
"""How long a server may take for a score; a pause does not count."""
CUT_S_MAX = CALL_S_MAX
"""How long a request may have been sent without being answered, before new weights are given up for it."""


class VllmEngine:
    """An Engine over one server; see the port for what its methods promise."""

    def __init__(self, url: str, *, key: str = "") -> None:
        """RequestError for a URL that cannot be one."""
        self._connection = Connection(url, key)
        self._facts: Facts | None = None
        self._failure: RolloutError | None = None
        """Why an open engine cannot draw any more."""
        self._pause = Pause(self._connection)
        self._updates = asyncio.Lock()
        self._is_updating = False
        self._runs: set[Run] = set()
        self._sessions = Sessions()
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._connection.url

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the weights that draw, where this host sees it."""
        return self._known.folder

    @property
    def info(self) -> EngineInfo:
        """See Engine."""
        return self._known.info

    @property
    def is_paused(self) -> bool:
        """See Engine; also while weights change; not while a pause waits for answers, whose silence is a failure."""
        return self._is_updating or (self._pause.mode is not None and not self._is_finishing)

    @property
    def failure(self) -> str:
        """See Engine."""
        return str(self._failure or ("" if self._connection.is_open else f"{self.url}: the engine is closed"))

    @property
    def _known(self) -> Facts:
        if self._facts is None:
            raise EngineError(f"{self.url}: the engine was never open")
        return self._facts

    async def open(self) -> None:
        """Ask the server for its facts, and have it draw one token.  EngineError.

        A pause that somebody left ends when this engine is opened first, and from then on none but its own.  One that
        `close` kept lasts, and nothing is drawn.
        """
        if self._connection.is_open:
            raise EngineError(f"{self.url}: the engine is already open")
        await self._connection.open()
        try:
            await read_label(self._connection)  # the pause of one whose weights change is not ours to end
            await self._pause.find(is_first=self._facts is None)
            self._facts = await read_facts(self._connection, self._facts if self._pause.mode else None)
        except BaseException as error:
            await self._connection.close()
            if isinstance(error, RolloutError):
                raise unusable(self.url, error) from error
            raise
        self._failure = None

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """See Engine."""
        self._check()
        check_request(request, self.info)
        self._known.check(request)
        run = Run(request.session)
        run.is_running = self._pause.mode is None
        self._runs.add(run)
        room = min(request.tokens_count_max, self.info.context_tokens_max - len(request.token_ids))
        drawn: list[int] = []
        try:
            while True:
                await self._until(lambda: self._may_draw(run) or run.is_preempted)
                self._check(run)
                run.is_running, run.is_cut = True, False
                rest = msgspec.structs.replace(request, token_ids=request.token_ids + tuple(drawn))
                kv = self._sessions.enter(request, self.info.weights_digest)
                told_count = len(rest.token_ids) - 1 if drawn else 0
                async with aclosing(self._request(run, rest, room - len(drawn), told_count)) as chunks:
                    while (chunk := await run.wait.next(chunks)) is not None:
                        await self._until(lambda: self._pause.mode != "keep" or run.is_preempted)
                        self._check()
                        drawn += chunk.token_ids
                        finish = finish_of(chunk, request.stop_ids, room - len(drawn))
                        cached_count = 0 if told_count else chunk.cached_tokens_count  # else, of what was drawn, too
                        yield msgspec.structs.replace(chunk, kv=kv, finish=finish, cached_tokens_count=cached_count)
                        kv = ""
                        if finish:
                            return
                if run.wait.is_broken:  # by its end the server would have said who drew
                    await self.vouch()
        finally:
            self._runs.discard(run)
            self._changed.set()

    async def _request(
        self, run: Run, request: SampleRequest, count: int, told_count: int
    ) -> AsyncGenerator[Sampled, None]:
        """What one HTTP request draws: with the weights of now, and to its end or until it is cut.

        With routes it is a part of the answer, in one chunk: they come with its last token.  Those of the first
        `told_count` tokens are left out.
        """
        facts = self._known
        parts: list[Sampled] = []
        is_checked = False
        body, line_bytes_max = question(request, count, told_count, facts)
        run.begin(body["request_id"])
        try:
            headers = self._sessions.headers(request, facts.ranks_count)
            async with self._connection.stream(wire.GENERATE, body, line_bytes_max, headers) as payloads:
                if run.is_preempted or run.is_cut:
                    run.abort(self._connection)
                async for chunk in read_chunks(payloads, run, request, told_count, facts):
                    if not is_checked:
                        await self._check_label(facts.info, run)
                        is_checked = True
                    if not request.returns_routes:
                        yield chunk
                    else:
                        parts.append(chunk)
        except (EngineError, RequestError) as error:
            self._check()  # a closed engine says that it is
            raise type(error)(f"{self.url}: {error}") from error
        finally:
            run.end()
            self._changed.set()
        if parts and parts[-1].routes is not None:
            yield joined(parts)

    async def _check_label(self, info: EngineInfo, run: Run | None = None) -> None:
        """EngineError if others change the weights, or did: what waited for that was drawn with the new ones."""
        try:
            check_label(await read_label(self._connection), info)
        except EngineError:
            if not (self._is_updating or (run is not None and run.is_cut)):  # else we do, after this was drawn
                raise

    async def vouch(self, within_s: float = CALL_S_MAX) -> None:
        """See PoolEngine."""
        if self._facts is not None:  # else it drew nothing
            await vouch(self._connection, self.info, within_s)

    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """See Engine; a context that is full cannot be scored, since the server draws a token behind it."""
        self._check()
        check_score(token_ids, self.info, top_logprobs_count, returns_hidden=returns_hidden)
        if len(token_ids) == self.info.context_tokens_max:
            raise RequestError(f"token_ids: vLLM scores at most {len(token_ids) - 1} tokens of this context")
        run = Run(None)
        self._runs.add(run)
        try:
            with closing(Patience(self, SCORE_S_MAX, run.wait)) as patience:
                while True:
                    await self._until(lambda: self._may_draw() or run.is_preempted)
                    self._check(run)
                    if len(token_ids) == 1:
                        return Scored(logprobs=(), policy_version=self.info.policy_version)
                    run.is_cut = False
                    async with aclosing(self._score(run, token_ids, top_logprobs_count)) as answers:
                        scored = await patience.next(answers)
                    if scored is not None:
                        await self._until(lambda: self._pause.mode != "keep" or run.is_preempted)
                        self._check()
                        return scored
        finally:
            self._runs.discard(run)
            self._changed.set()

    async def _score(self, run: Run, token_ids: Sequence[int], tops_count: int) -> AsyncGenerator[Scored, None]:
        """What one HTTP request says; nothing if it was aborted for us."""
        info = self.info
        body, bytes_max = score_question(token_ids, tops_count, info)
        run.begin(body["request_id"])
        run.is_running = True
        try:
            told = await self._connection.post(wire.GENERATE, body, call_s_max=None, bytes_max=bytes_max)
            if wire.is_aborted(told):
                check_ours(run)
                return
            await self._check_label(info, run)
            scored = wire.scored_of(told, token_ids, tops_count, info)
        except (EngineError, RequestError) as error:
            self._check()
            raise type(error)(f"{self.url}: {error}") from error
        finally:
            run.end()
            run.is_running = False
            self._changed.set()
        yield scored

    async def preempt(self, session: str) -> None:
        """See Engine."""
        self._interrupt(run for run in self._runs if run.session == session)

    def _interrupt(self, runs: Iterable[Run]) -> None:
        for run in runs:
            run.is_preempted = True
            run.abort(self._connection)
        self._changed.set()

    async def release(self, session: str) -> None:
        """See Engine."""
        self._sessions.release(session)

    async def pause(self, mode: PauseMode) -> None:
        """See Engine; it holds for all who use the server."""
        self._check()
        before, number = self._pause.mode, self._pause.ask(mode)
        self._changed.set()
        if mode == "abort":
            self._interrupt(self._runs)
        try:
            if mode == "wait":
                if before == "keep" and not self._is_updating:
                    await self._pause.end()
                await self._until(lambda: not self._is_finishing)
            if self._pause.mode == mode:
                await self._pause.begin(mode)
        except BaseException:
            self._pause.take_back(number, before)
            self._changed.set()
            raise

    async def resume(self) -> None:
        """See Engine."""
        is_paused = self._pause.mode is not None or self._pause.holds_server
        self._pause.ask(None)
        self._changed.set()
        if is_paused and not self._is_updating and self._failure is None:  # else it has no weights
            await self._pause.end()

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """See Engine: nothing is drawn while the server loads.

        Weights that a trainer put there itself, and labelled with this version, are taken as they are.
        EngineError, and nothing changed; but a server that fails while it loads draws no more until it starts again.
        """
        async with self._updates:
            self._check()
            info = self.info
            new = await asyncio.to_thread(read_weights, checkpoint)
            if (policy_version, new.digest) == (info.policy_version, info.weights_digest):
                return info
            check_version(info, policy_version)
            if count := self._sessions.pinned_count:
                raise EngineError(f"{count} sessions pin the weights, and vLLM holds one version: release them first")
            old = await asyncio.to_thread(self._known.weights)
            if old is not None:
                check_fits(checkpoint, new, old)
            changed = msgspec.structs.replace(info, policy_version=policy_version, weights_digest=new.digest)
            self._is_updating = True
            try:
                await self._change(Change(self._connection, self._pause, self._known, changed, checkpoint), announce)
            finally:
                may_draw = self._pause.mode is None or self._is_finishing
                if may_draw and self._pause.holds_server and self._failure is None:
                    with contextlib.suppress(RolloutError):
                        await self._pause.end()
                self._is_updating = False
                self._changed.set()
        return self.info

    async def _change(self, change: Change, announce: Announce | None) -> None:
        """Who raises finds the old weights there, or a failed engine."""
        await change.begin()
        try:
            await self._cut()
            self._facts = await change.carry_out(announce)
        except BaseException as error:
            self._failure = await change.take_back(error)
            raise

    async def _cut(self) -> None:
        """End every request at the server; those that it did not know yet have ended when this returns."""
        with cut(self._runs, self._connection):
            await self._pause.begin("abort")
            try:
                async with asyncio.timeout(CUT_S_MAX):
                    await self._until(lambda: all(run.has_begun or not run.request_id for run in self._runs))
            except TimeoutError:
                raise EngineError(f"{self.url}: it neither answers a request nor ends it") from None
        self._check()

    async def save(self, session: str, path: Path) -> int:
        """0: vLLM gives no state away; what it has of a prefix it keeps while there is room, or in its KV offload."""
        return 0

    async def restore(self, session: str, path: Path) -> int:
        """0, as `save`."""
        return 0

    async def close(self, *, keeps_pause: bool = False) -> None:
        """See PoolEngine: streams break, which ends their requests at the server; a pause of ours ends, too."""
        if not keeps_pause:
            await self._pause.leave()
        self._sessions.clear()
        await self._connection.close()
        self._changed.set()

    def _may_draw(self, run: Run | None = None) -> bool:
        finishes = self._pause.mode == "wait" and run is not None and run.is_running
        return (self._pause.mode is None or finishes) and not self._is_updating

    @property
    def _is_finishing(self) -> bool:
        """A pause waits for answers that were begun."""
        return self._pause.mode == "wait" and any(run.is_running for run in self._runs)

    def _check(self, run: Run | None = None) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._connection.is_open:
            raise EngineError(f"{self.url}: the engine is closed")
        if run is not None and run.is_preempted:
            raise PreemptedError("the request was preempted")

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait for a change that makes it hold, or for the end of the engine."""
        while not holds() and self._connection.is_open and self._failure is None:
            self._changed.clear()
            await self._changed.wait()
