"""One HTTP request to vLLM, from what it asks to its end.

The last chunk is held back until what stands behind it has been read: how much of the prompt was cached.  What the
server says with it, which weights drew and what experts the tokens went through, is checked before it is handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, Literal

import msgspec

from rollout.engine import EngineInfo, Sampled, SampleRequest
from rollout.engines.vllm import wire
from rollout.engines.vllm.connection import Connection
from rollout.engines.vllm.facts import Facts, read_label
from rollout.engines.vllm.weights import parse_label
from rollout.engines.waits import Wait
from rollout.errors import EngineError, ForeignWeightsError, RolloutError

ROUTED_TOKENS_MAX = 256
"""Tokens of an answer whose routes come at once: the server tells them with a request's last token only."""
VOUCH_S_MAX = 1.0
ABORT_EVERY_S = 0.5
ABORTED_S_MAX = 5.0
"""How long a server may take to end a request that was preempted, before its connection is broken for it."""
_PROMPT_ROW_BYTES = 128


class Run:
    """An answer that is being drawn, or a score, by one HTTP request after the other."""

    def __init__(self, session: str | None) -> None:
        self.session = session
        """None of what is scored."""
        self.request_id = ""
        """Of the request that is open at the server; "" if none is."""
        self.has_begun = False
        """The server has answered it: it knows it for sure."""
        self.is_running = False
        """It came before the pause, or some request was begun for it: a pause that waits lets the answer finish.

        A score while its request is open.
        """
        self.is_preempted = False
        self.is_cut = False
        """The open request is to end; the answer goes on."""
        self.is_awaited = False
        """New weights wait until the server has ended the open request, which nobody may leave before."""
        self.wait = Wait()
        """For the chunks of the open request."""
        self._aborting: asyncio.Task[None] | None = None
        self._ending: asyncio.TimerHandle | None = None

    def begin(self, request_id: str) -> None:
        """A request is sent."""
        self.request_id, self.has_begun = request_id, False

    def abort(self, connection: Connection) -> None:
        """Have the server end the open request, of which it may not know yet."""
        if self.request_id and self._aborting is None:
            self._aborting = asyncio.create_task(_keep_aborting(connection, wire.ID_PREFIX + self.request_id))
            self._ending = asyncio.get_running_loop().call_later(ABORTED_S_MAX, self._look)

    def _look(self) -> None:
        """Leave a request that does not end, unless new weights wait for its end."""
        self._ending = asyncio.get_running_loop().call_later(ABORTED_S_MAX, self._look)
        if self.is_preempted and not self.is_awaited:
            self.wait.break_off()

    def end(self) -> None:
        """The request is no longer open."""
        self.request_id = ""
        if self._aborting is not None and self._ending is not None:
            self._aborting.cancel()
            self._ending.cancel()
            self._aborting = self._ending = None


@contextlib.contextmanager
def cut(runs: set[Run], connection: Connection) -> Iterator[None]:
    """Have the server end what is open for them, and wait for that inside; the answers go on later."""
    for run in runs:
        run.is_cut = run.is_awaited = True
        run.abort(connection)
    try:
        yield
    finally:
        for run in runs:
            run.is_awaited = False


async def _keep_aborting(connection: Connection, name: str) -> None:
    while True:
        with contextlib.suppress(RolloutError):  # a server that is gone ends the stream
            await connection.post(wire.ABORT, {"request_ids": [name]})
        await asyncio.sleep(ABORT_EVERY_S)


def question(request: SampleRequest, count: int, told_count: int, facts: Facts) -> tuple[dict[str, Any], int]:
    """The body that asks for `count` tokens, and how long a line of the answer may be.

    With routes it asks for a part of them, and for no routes of the first `told_count` tokens.
    """
    line_bytes_max = wire.LINE_BYTES_MAX
    if request.returns_routes and facts.info.routing is not None:
        count = min(count, ROUTED_TOKENS_MAX)
        line_bytes_max += (len(request.token_ids) + count) * facts.info.routing.row_bytes * 4 * 3
    digest = facts.info.weights_digest
    body = wire.body_of(request, uuid.uuid4().hex, count, digest, has_priorities=facts.has_priorities)
    if told_count and request.returns_routes:
        body["sampling_params"]["routed_experts_prompt_start"] = told_count
    return body, line_bytes_max


def score_question(token_ids: Sequence[int], tops_count: int, info: EngineInfo) -> tuple[dict[str, Any], int]:
    """The body that asks for a score, and how long the answer may be."""
    bytes_max = wire.LINE_BYTES_MAX + len(token_ids) * (tops_count + 1) * _PROMPT_ROW_BYTES
    return wire.score_body(token_ids, uuid.uuid4().hex, info.weights_digest, tops_count), bytes_max


async def read_chunks(
    payloads: AsyncGenerator[bytes, None], run: Run, request: SampleRequest, told_count: int, facts: Facts
) -> AsyncGenerator[Sampled, None]:
    """The chunks of a stream, with the routes from token `told_count` on at its end.  EngineError."""
    tokens_count = len(request.token_ids)
    last: Sampled | None = None
    has_ended = False
    async for payload in payloads:
        if payload == b"[DONE]":
            continue  # to the end of the body: then the connection serves another request
        event = wire.event_of(payload)
        run.has_begun = True
        if event.usage and event.usage.prompt_tokens_details and last is not None:
            cached_count = event.usage.prompt_tokens_details.cached_tokens or 0
            last = msgspec.structs.replace(last, cached_tokens_count=min(cached_count, len(request.token_ids)))
        for choice in event.choices:
            if has_ended:
                raise EngineError("tokens behind the end of an answer")
            chunk = wire.sampled_of(choice, request.top_logprobs_count, facts.info.policy_version)
            if not (request.returns_mask and request.cuts):
                chunk = msgspec.structs.replace(chunk, masks=())
            tokens_count += len(chunk.token_ids)
            if choice.finish_reason is None:
                if chunk.token_ids:
                    yield chunk
                continue
            has_ended = True
            _check_end(run, choice, facts.info)
            if request.returns_routes and facts.info.routing is not None and choice.finish_reason != "abort":
                routes = wire.routes_of(choice.routed_experts or "", told_count, tokens_count - 1, facts.info.routing)
                chunk = msgspec.structs.replace(chunk, routes=routes)
            last = chunk
    if last is None:
        raise EngineError("the stream ended before the answer did")
    if last.token_ids or last.finish:
        yield last


def _check_end(run: Run, choice: wire.Choice, info: EngineInfo) -> None:
    """EngineError if a request ended as nobody here wanted, or was drawn by other weights than those known."""
    for each in choice.weight_versions or ():
        check_label(each.version, info)
    if choice.finish_reason not in {"stop", "length", "abort"}:
        raise EngineError(f"a request ended by {choice.finish_reason!r}"[:200])
    if choice.finish_reason == "abort":
        check_ours(run)


def check_ours(run: Run) -> None:
    """EngineError if a request was aborted at the server, and not for us."""
    if not (run.is_preempted or run.is_cut):
        raise EngineError("somebody else aborted the request at the server")


def check_label(text: str, info: EngineInfo) -> None:
    """ForeignWeightsError unless weights that are labelled so are those that are known."""
    label = parse_label(text)
    if label.policy_version != info.policy_version or label.weights_digest not in {"", info.weights_digest}:
        raise ForeignWeightsError(
            f"its weights were changed to {text[:200]!r} behind this service, which knows version "
            f"{info.policy_version}: change them by UpdatePolicy"
        )


async def vouch(connection: Connection, info: EngineInfo, within_s: float) -> None:
    """ForeignWeightsError if the server has newer weights, for which nobody cut what it drew; it may say nothing.

    UpdatePolicy, by whichever worker, cuts all requests first, and labels with a digest.  An older label is that of a
    server that was started again, and broke all streams.
    """
    try:
        async with asyncio.timeout(min(within_s, VOUCH_S_MAX)):
            text = await read_label(connection)
    except (RolloutError, TimeoutError):
        return
    label = parse_label(text)
    if label.policy_version > info.policy_version and not label.weights_digest:
        check_label(text, info)


def finish_of(chunk: Sampled, stop_ids: frozenset[int], left_count: int) -> Literal["stop", "length"] | None:
    """How an answer ends with a chunk: a request's own end is none if there is more to draw."""
    if chunk.finish == "stop" or not stop_ids.isdisjoint(chunk.token_ids):
        return "stop"
    return None if left_count > 0 else "length"


def joined(parts: list[Sampled]) -> Sampled:
    """One chunk of all of them; what comes at the end is of the last."""
    return msgspec.structs.replace(
        parts[-1],
        token_ids=tuple(i for part in parts for i in part.token_ids),
        logprobs=tuple(p for part in parts for p in part.logprobs),
        top_logprobs=tuple(top for part in parts for top in part.top_logprobs),
        masks=tuple(mask for part in parts for mask in part.masks),
    )
