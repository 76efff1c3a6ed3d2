"""What an engine says, checked before anybody believes it.

An engine is a peer: another process, other people's code, a kernel that overflowed.  A chunk that cannot
be right is an EngineError and none of it is handed on, so nothing of it is ever logged; what came before
stays.  Silence is an error too, once it has lasted too long and nobody paused the engine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from operator import lt

from rollout.engine import Engine, EngineInfo, Routes, Sampled, SampleRequest, TopLogprobs
from rollout.engines.waits import T, Wait
from rollout.errors import EngineError
from wal.errors import RecordInvalidError
from wal.token_routes import RoutesRecorded, encode_routes

_F32_MAX = (2 - 2**-23) * 2.0**127
_LOOKS_COUNT = 16
"""How often who waits looks whether the engine is paused, before he loses patience."""


async def guarded(engine: Engine, request: SampleRequest, silence_s_max: float) -> AsyncGenerator[Sampled, None]:
    """`engine.sample(request)` up to the chunk that finishes it; EngineError as soon as it breaks the port."""
    info, count = engine.info, 0
    with closing(Patience(engine, silence_s_max)) as patience:
        async with aclosing(engine.sample(request)) as chunks:
            while True:
                if (chunk := await patience.next(chunks)) is None:
                    raise EngineError(f"engine {info.name}: the stream ended before the answer did")
                if problem := _problem(chunk, request, engine.info, count):
                    raise EngineError(f"engine {info.name}, {count} tokens into its answer: {problem}")
                yield chunk
                if chunk.finish:
                    return
                count += len(chunk.token_ids)


def _problem(chunk: Sampled, request: SampleRequest, info: EngineInfo, count: int) -> str:
    """What is wrong with a chunk that follows `count` tokens, or nothing."""
    ids, logprobs, total = chunk.token_ids, chunk.logprobs, count + len(chunk.token_ids)
    room = min(request.tokens_count_max, info.context_tokens_max - len(request.token_ids))
    has_stop = not request.stop_ids.isdisjoint(ids)
    rules = (
        (len(ids) > 0, "a chunk without tokens"),
        (len(ids) == len(logprobs), "not one logprob for each token"),
        (total <= room, "more tokens than were asked for"),
        (not ids or _are_known(ids, info), "a token id that the vocabulary does not have"),
        (not logprobs or _are_logprobs(logprobs), "a logprob that is none"),
        (not has_stop or request.stop_ids.isdisjoint(ids[:-1]), "tokens after a stop id"),
        ((chunk.finish == "stop") == has_stop, "its end is not as its last token says"),
        ((chunk.finish is not None) == (has_stop or total == room), "an end too early, or none"),
        (0 <= chunk.policy_version <= info.policy_version, "a version of the weights that it was never given"),
        (0 <= chunk.cached_tokens_count <= len(request.token_ids), "more cached tokens than the prompt has"),
    )
    if problem := next((problem for holds, problem in rules if not holds), ""):
        return problem
    wants_more = request.top_logprobs_count or request.returns_routes or request.returns_hidden
    if wants_more or chunk.top_logprobs or chunk.masks or chunk.routes is not None or chunk.hidden:
        return _more_problem(chunk, request, info, len(request.token_ids) + total - 1)
    return ""


def _more_problem(chunk: Sampled, request: SampleRequest, info: EngineInfo, end: int) -> str:
    """What is wrong with what a chunk tells beside its tokens, which end behind position `end`, or nothing."""
    ids = chunk.token_ids
    rules = (
        (len(chunk.top_logprobs) == (len(ids) if request.top_logprobs_count else 0), "not the likeliest of each token"),
        (all(_is_told(top, info) for top in chunk.top_logprobs), "a likeliest token that is none"),
        (len(chunk.masks) in (0, len(ids)), "not one mask for each token"),
        (all(_are_known(mask, info) for mask in chunk.masks), "a mask of ids that the vocabulary does not have"),
        (
            all(token in mask and _ascends(mask) for token, mask in zip(ids, chunk.masks, strict=False)),
            "a mask without the token that was drawn, or in disorder",
        ),
        (
            len(chunk.hidden) == (2 * info.hidden_dim * len(ids) if request.returns_hidden else 0),
            "not one hidden state each",
        ),
        ((chunk.routes is not None) == request.returns_routes, "routes that were not asked for, or none"),
    )
    if problem := next((problem for holds, problem in rules if not holds), ""):
        return problem
    return _routes_problem(chunk.routes, info, end) if chunk.routes else ""


def _is_told(top: TopLogprobs, info: EngineInfo) -> bool:
    ids, logprobs = top.token_ids, top.logprobs
    return len(set(ids)) == len(ids) == len(logprobs) and _are_known(ids, info) and _are_logprobs(logprobs)


def _are_logprobs(values: tuple[float, ...]) -> bool:
    """Numbers that an f32 holds, and none above 0."""
    return math.isfinite(sum(values)) and max(values) <= 0 and min(values) >= -_F32_MAX


def _ascends(token_ids: tuple[int, ...]) -> bool:
    return all(map(lt, token_ids, token_ids[1:]))


def _are_known(token_ids: tuple[int, ...], info: EngineInfo) -> bool:
    """They are some, and the vocabulary has them."""
    return bool(token_ids) and min(token_ids) >= 0 and max(token_ids) < info.vocab_count


def _routes_problem(routes: Routes, info: EngineInfo, end: int) -> str:
    """What is wrong with the routes of the tokens before position `end`, or nothing."""
    routing = info.routing
    if routing is None or not routes.expert_ids or len(routes.expert_ids) % routing.row_bytes:
        return "routes that are no whole rows"
    rows_count = len(routes.expert_ids) // routing.row_bytes
    if routes.start < 0 or routes.start + rows_count != end:
        return f"routes of tokens {routes.start} to {routes.start + rows_count}, not up to {end}"
    try:
        encode_routes(
            RoutesRecorded(
                who=info.name,
                start=routes.start,
                router_version=info.policy_version,
                rows_count=rows_count,
                experts_count=routing.experts_count,
                layers_count=len(routing.layer_ids),
                top_k=routing.top_k,
                width=routing.width,
                validity=((1 << rows_count) - 1).to_bytes((rows_count + 7) // 8, "little"),
                expert_ids=routes.expert_ids,
            )
        )
    except RecordInvalidError as error:
        return str(error)
    return ""


class Patience:
    """Waits for what an engine says, and gives up what lasts too long; a pause of the engine does not count.

    One timer for all of them, which looks at the newest wait now and then: this runs for every chunk.  A pause between
    two looks is not seen, and counts.
    """

    def __init__(self, engine: Engine, silence_s_max: float, wait: Wait | None = None) -> None:
        """`wait` is one that others may break off, too."""
        self._engine = engine
        self._silence_s_max = silence_s_max
        self._loop = asyncio.get_running_loop()
        self._wait = wait or Wait()
        self._is_over = False
        self._since = 0.0
        self._timer = self._loop.call_later(silence_s_max / _LOOKS_COUNT, self._look)

    async def next(self, chunks: AsyncGenerator[T, None]) -> T | None:
        """The next one; None if there is none, or others broke the wait off.  EngineError: it lasted too long."""
        self._since = self._loop.time()
        chunk = await self._wait.next(chunks)
        if chunk is None and self._is_over:
            raise EngineError(f"engine {self._engine.info.name}: silent for {self._silence_s_max:g} s")
        return chunk

    def close(self) -> None:
        """Nobody waits any more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if not self._wait.is_on or self._engine.is_paused:
            self._since = now
        if self._wait.is_on and self._since + self._silence_s_max <= now:
            self._is_over = True
            self._wait.break_off()
        else:
            end = self._since + self._silence_s_max
            self._timer = self._loop.call_at(min(end, now + self._silence_s_max / _LOOKS_COUNT), self._look)
