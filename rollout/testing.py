"""A double for tests of everything above the engine: a model that says what a script tells it.  And what checks one.

The double draws its tokens one by one like a real engine and obeys the invariants of
`rollout.engine`, so that resuming it in mid-turn continues the same reply.

See: rollout/conformance/, what `check_engine` runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from rollout import context
from rollout.conformance.check import Subject
from rollout.conformance.suite import check_engine
from rollout.engine import (
    Announce,
    EngineInfo,
    KvBreak,
    OnUpdate,
    PauseMode,
    Routes,
    Routing,
    Sampled,
    SampleRequest,
    Scored,
    TopLogprobs,
    check_request,
    check_score,
    check_version,
)
from rollout.engines.kept_state import KeptState, NoStateError, read_state, write_state
from rollout.errors import EngineError, PreemptedError
from rollout.events import RolloutOpened
from rollout.request import AgentKind, Group, Job, Limits
from toolcall_dsl import V4, Segment, Tokenizer, encode

__all__ = [
    "ENGINE",
    "Reply",
    "ScriptedEngine",
    "Subject",
    "answer_ids",
    "check_engine",
    "hidden_row",
    "job_of_one",
    "opened",
    "reply_ids",
    "routes_row",
]

ENGINE = EngineInfo(
    name="scripted",
    build="1",
    weights_digest="0" * 64,
    vocab_count=1 << 17,
    context_tokens_max=1 << 20,
    routing=Routing(layer_ids=(0, 3), experts_count=5, top_k=2),
    hidden_dim=4,
)


def job_of_one(agent: AgentKind = "model", limits: Limits | None = None, size: int = 1) -> Job:
    """A job with one group, `t`, of a task of that name with digest `d`."""
    group = Group(group_id="t", task="t", task_digest="d", size=size)
    return Job(request_id="run", groups=(group,), agent=agent, limits=limits or Limits())


def opened(tokenizer: Tokenizer, job: Job, instruction: str = "Remove the file a.txt.") -> RolloutOpened:
    """The first event of the rollout `t.0` of such a job."""
    prompt = context.prompt(instruction, tokenizer, job.thinking)
    return RolloutOpened("t.0", job.request_id, "t", 0, prompt, tokenizer.digest, ENGINE)


@dataclass(frozen=True)
class Reply:
    """What the scripted model says in one turn."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, Mapping[str, object]]] = ()


def reply_ids(reply: Reply, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a reply as a model samples them, after the assistant header, EOS included."""
    calls = [{"type": "function", "function": {"name": n, "arguments": dict(a)}} for n, a in reply.calls]
    asked = context.messages("x")
    said = {"role": "assistant", "reasoning_content": reply.reasoning, "content": reply.content, "tool_calls": calls}
    prefix = encode(asked, tokenizer, thinking=True)
    whole = encode([*asked, said], tokenizer, thinking=True)
    return _ids(whole)[len(_ids(prefix)) :]


def answer_ids(reply: Reply, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a reply to a Quick Instruction: its content, EOS included."""
    return (*tokenizer.encode_plain(reply.content), tokenizer.control(V4.eos))


class _Session:
    """What the double keeps of a session: the tokens that its state has taken in, and who drew last."""

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] = ()
        self.weights: tuple[str, ...] = ()
        self.info: EngineInfo | None = None
        self.on_update: OnUpdate = "keep"
        self.is_held = False
        """The weights that drew last stay loaded for it."""
        self.is_restored = False


class ScriptedEngine:
    """An Engine whose replies come from `script(session, turn)`; `turn` counts finished turns of the context.

    Weights change what is recorded, never what is said.  A checkpoint is a folder with one file, `weights`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str, int], Reply],
        chunk_tokens_count: int = 1,
        versions_max: int = 4,
    ) -> None:
        """Replies are asked for when their first token is drawn, and handed over a chunk at a time."""
        self._chunk_tokens_count = chunk_tokens_count
        self._versions_max = versions_max
        self._tokenizer = tokenizer
        self._script = script
        self._eos = tokenizer.control(V4.eos)
        self._is_open = False
        self._info = ENGINE
        self._paused: PauseMode | None = None
        self._sessions: dict[str, _Session] = {}
        self._running: dict[object, str] = {}
        self._drawing: set[object] = set()
        self._changed = asyncio.Event()
        self.checkpoint: Path | None = None
        self.drawn_count = 0
        """Tokens drawn in the life of this object."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the double."""
        return self._info

    @property
    def is_paused(self) -> bool:
        """See Engine."""
        return self._paused is not None

    @property
    def failure(self) -> str:
        """See Engine."""
        return "" if self._is_open else "the engine is closed"

    async def open(self) -> None:
        """Ready at once."""
        self._is_open = True

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Continue the scripted reply from where the context ends."""
        self._check()
        check_request(request, self._info)
        running = object()
        self._running[running] = request.session
        try:
            await self._until(lambda: self._paused is None or running not in self._running)
            self._check(running)
            self._drawing.add(running)
            session = self._sessions.setdefault(request.session, _Session())
            session.on_update = request.on_update
            rest, seen = self._rest(request), request.token_ids
            read_count = cached_count = _cached_count(session, request)
            for begin in range(0, len(rest), self._chunk_tokens_count):
                await asyncio.sleep(0)
                await self._until(lambda: self._paused != "keep" or running not in self._running)
                self._check(running)
                chunk = rest[begin : begin + self._chunk_tokens_count]
                self.drawn_count += len(chunk)
                info, kv = self._draw(session, request, seen)
                seen += chunk
                read_count = 0 if kv == "rebuilt" else read_count
                session.tokens = seen[:-1]
                finish: Literal["stop", "length"] | None = None
                if begin + len(chunk) == len(rest):
                    finish = "stop" if chunk[-1] in request.stop_ids else "length"
                yield Sampled(
                    token_ids=chunk,
                    logprobs=(-0.5,) * len(chunk),
                    finish=finish,
                    policy_version=info.policy_version,
                    cached_tokens_count=0 if begin or kv == "rebuilt" else cached_count,
                    kv=kv,
                    top_logprobs=_tops(chunk, request.top_logprobs_count),
                    masks=tuple((token,) for token in chunk) if request.returns_mask and request.cuts else (),
                    routes=_routes(read_count, seen) if request.returns_routes else None,
                    hidden=b"".join(map(hidden_row, chunk)) if request.returns_hidden else b"",
                )
                read_count = len(seen) - 1
        finally:
            self._running.pop(running, None)
            self._drawing.discard(running)
            self._changed.set()

    def _rest(self, request: SampleRequest) -> tuple[int, ...]:
        openers = dict.fromkeys(map(self._tokenizer.control, V4.tasks.values()), 1)
        openers[self._tokenizer.control(V4.assistant)] = 2  # with the token behind it, which opens or closes thinking
        begun = [(i + openers[token], openers[token]) for i, token in enumerate(request.token_ids) if token in openers]
        turn = sum(token == self._eos for token in request.token_ids)
        start, length = max(begun, default=(len(request.token_ids), 2))
        room = min(request.tokens_count_max, self._info.context_tokens_max - len(request.token_ids))
        reply = self._script(request.session, turn)
        is_reply = length == 2  # else the answer to a Quick Instruction, which nobody thinks about
        ids = reply_ids(reply, self._tokenizer) if is_reply else answer_ids(reply, self._tokenizer)
        rest = ids[len(request.token_ids) - start :][:room]
        stops = [index for index, token_id in enumerate(rest) if token_id in request.stop_ids]
        return rest[: stops[0] + 1] if stops else rest

    def _draw(self, session: _Session, request: SampleRequest, seen: tuple[int, ...]) -> tuple[EngineInfo, KvBreak]:
        """Whose weights draw the next chunk of a session, and what its state is made of."""
        session.is_held &= request.on_update == "pin"
        last = session.info or self._info
        new = last if session.is_held else self._info
        fits = bool(session.tokens) and seen[: len(session.tokens)] == session.tokens
        kv: KvBreak = "restored" if session.is_restored and fits else ""
        if new.weights_digest != last.weights_digest:
            kv = "kept" if fits and request.on_update == "keep" else "rebuilt"
        session.weights = session.weights if fits and kv != "rebuilt" else ()
        if new.weights_digest not in session.weights:
            session.weights += (new.weights_digest,)
        session.info, session.is_restored = new, False
        return new, kv

    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """Every token is as likely as any that the double draws."""
        self._check()
        check_score(token_ids, self._info, top_logprobs_count, returns_hidden=returns_hidden)
        await self._until(lambda: self._paused is None)
        self._check()
        tops = _tops(tuple(token_ids[1:]), top_logprobs_count)
        count, version = len(token_ids) - 1, self._info.policy_version
        hidden = tuple(map(hidden_row, token_ids[1:])) if returns_hidden else ()
        return Scored(logprobs=(-0.5,) * count, policy_version=version, top_logprobs=tops, hidden=hidden)

    async def preempt(self, session: str) -> None:
        """See Engine."""
        self._running = {running: name for running, name in self._running.items() if name != session}
        self._changed.set()

    async def release(self, session: str) -> None:
        """See Engine."""
        self._sessions.pop(session, None)

    async def pause(self, mode: PauseMode) -> None:
        """See Engine."""
        self._paused = mode
        if mode == "abort":
            self._running.clear()
        self._changed.set()
        if mode == "wait":
            await self._until(lambda: self._paused != "wait" or not self._drawing)

    async def resume(self) -> None:
        """See Engine."""
        self._paused = None
        self._changed.set()

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """See Engine."""
        self._check()
        try:
            digest = hashlib.sha256((checkpoint / "weights").read_bytes()).hexdigest()
        except OSError as error:
            raise EngineError(f"{checkpoint}: no checkpoint: {error}") from error
        new = msgspec.structs.replace(self._info, weights_digest=digest, policy_version=policy_version)
        if new == self._info:
            return new
        check_version(self._info, policy_version)
        pinned = [session for session in self._sessions.values() if session.on_update == "pin" and session.info]
        if len({session.info for session in pinned}) >= self._versions_max:
            raise EngineError(
                f"{len(pinned)} sessions pin all the {self._versions_max} versions that fit; release some"
            )
        if announce is not None:
            await announce(new)
        for session in self._sessions.values():
            session.is_held = session.on_update == "pin" and session.info is not None
        self._info, self.checkpoint = new, checkpoint
        return new

    async def save(self, session: str, path: Path) -> int:
        """See Engine."""
        kept = self._sessions.get(session, _Session())
        if not kept.tokens:
            return 0
        tokens = array("I", kept.tokens).tobytes()
        write_state(path, KeptState(self._info.build, kept.weights, tokens, bytearray()))
        return len(kept.tokens)

    async def restore(self, session: str, path: Path) -> int:
        """See Engine."""
        try:
            state = read_state(path, self._info.build, self._info.weights_digest)
        except NoStateError as error:
            logging.getLogger(__name__).warning("%s: not restored: %s", path, error)
            return 0
        kept = self._sessions[session] = _Session()
        kept.tokens, kept.weights = tuple(array("I", state.tokens)), state.weights
        kept.info, kept.is_restored = self._info, True
        return state.tokens_count

    async def close(self) -> None:
        """Later samples fail, and running ones."""
        self._is_open = False
        self._paused = None
        self._sessions.clear()
        self._changed.set()

    def _check(self, running: object = None) -> None:
        if not self._is_open:
            raise EngineError("the scripted engine is closed")
        if running is not None and running not in self._running:
            raise PreemptedError("the request was preempted")

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()


def _cached_count(session: _Session, request: SampleRequest) -> int:
    """Tokens of the context that the session's state has taken in."""
    taken = session.tokens
    return min(len(taken), len(request.token_ids) - 1) if request.token_ids[: len(taken)] == taken else 0


def routes_row(token_id: int) -> bytes:
    """The experts that the double sends a token through: 2 of 5 in each of its two layers."""
    return bytes((token_id + layer + nth) % 5 for layer in (0, 3) for nth in (0, 1))


def hidden_row(token_id: int) -> bytes:
    """The hidden state that the double draws a token from."""
    return array("H", [token_id & 0x7F7F, token_id >> 14, 0, 1]).tobytes()


def _routes(read_count: int, seen: tuple[int, ...]) -> Routes:
    """Of what was read since, the tokens of the prompt that were not kept among it."""
    return Routes(read_count, b"".join(map(routes_row, seen[read_count:-1])))


def _tops(token_ids: tuple[int, ...], count: int) -> tuple[TopLogprobs, ...]:
    return tuple(TopLogprobs((token,), (-0.5,)) for token in token_ids) if count else ()


def _ids(segments: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in segments for token in segment.token_ids)
