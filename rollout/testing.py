"""Doubles for tests of everything above the engine: a model that says what a script tells it.

The double draws its tokens one by one like a real engine and obeys both invariants of
`rollout.engine`, so that resuming it in mid-turn continues the same reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rollout import context
from rollout.engine import EngineInfo, Sampled, SampleRequest
from rollout.errors import EngineError
from rollout.events import AgentKind, Group, Job, Limits, RolloutOpened
from toolcall_dsl import V4, Segment, Tokenizer, encode

ENGINE = EngineInfo(
    name="scripted", build="1", weights_digest="0" * 64, vocab_count=1 << 17, context_tokens_max=1 << 20
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


class ScriptedEngine:
    """An Engine whose replies come from `script(session, turn)`; `turn` counts finished turns of the context."""

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str, int], Reply], chunk_tokens_count: int = 1) -> None:
        """Replies are asked for when their first token is drawn, and handed over a chunk at a time."""
        self._chunk_tokens_count = chunk_tokens_count
        self._tokenizer = tokenizer
        self._script = script
        self._eos = tokenizer.control(V4.eos)
        self._is_open = False
        self.drawn_count = 0
        """Tokens drawn in the life of this object."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the double."""
        return ENGINE

    async def open(self) -> None:
        """Ready at once."""
        self._is_open = True

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Continue the scripted reply from where the context ends."""
        if not self._is_open:
            raise EngineError("the scripted engine is closed")
        header = self._tokenizer.control(V4.assistant)
        last_header = max(i for i, token in enumerate(request.token_ids) if token == header)
        turn = sum(token == self._eos for token in request.token_ids)
        done = len(request.token_ids) - last_header - 2
        rest = reply_ids(self._script(request.session, turn), self._tokenizer)[done:][: request.tokens_count_max]
        for begin in range(0, len(rest), self._chunk_tokens_count):
            await asyncio.sleep(0)
            chunk = rest[begin : begin + self._chunk_tokens_count]
            self.drawn_count += len(chunk)
            finish: Literal["stop", "length"] | None = None
            if begin + len(chunk) == len(rest):
                finish = "stop" if chunk[-1] in request.stop_ids else "length"
            yield Sampled(token_ids=chunk, logprobs=(-0.5,) * len(chunk), finish=finish)

    async def release(self, session: str) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Later samples fail."""
        self._is_open = False


def _ids(segments: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in segments for token in segment.token_ids)
