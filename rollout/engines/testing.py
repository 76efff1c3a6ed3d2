"""An engine that breaks its port in one way: what guards everything above from engines is tested with it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Literal

import msgspec

from rollout.engine import Sampled, SampleRequest, TopLogprobs
from rollout.testing import Reply, ScriptedEngine
from toolcall_dsl import Tokenizer

EngineFault = Literal[
    "empty",
    "too many",
    "nan",
    "unknown id",
    "no logprobs",
    "early finish",
    "early end",
    "hang",
    "nan top",
    "future weights",
]


class MisbehavingEngine(ScriptedEngine):
    """Breaks the port in one way with the chunk after `chunks_count` good ones; of one session, or of all."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str, int], Reply],
        fault: EngineFault | None,
        chunks_count: int = 1,
        session: str | None = None,
    ) -> None:
        super().__init__(tokenizer, script)
        self.fault = fault
        """None: it behaves."""
        self._chunks_count = chunks_count
        self._session = session

    async def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """As the script says, up to the fault."""
        good_count = 0
        async with aclosing(super().sample(request)) as chunks:
            async for chunk in chunks:
                if good_count < self._chunks_count or self._session not in (None, request.session):
                    yield chunk
                elif self.fault == "early end":
                    return
                elif self.fault == "hang":
                    await asyncio.Event().wait()
                else:
                    yield _broken(chunk, self.fault, request.tokens_count_max, self.info.vocab_count)
                good_count += 1


def _broken(chunk: Sampled, fault: EngineFault | None, tokens_count_max: int, vocab_count: int) -> Sampled:
    ids, logprobs = chunk.token_ids, chunk.logprobs
    change = msgspec.structs.replace
    match fault:
        case "empty":
            return change(chunk, token_ids=(), logprobs=())
        case "too many":
            return change(chunk, token_ids=ids * tokens_count_max, logprobs=logprobs * tokens_count_max)
        case "nan":
            return change(chunk, logprobs=(math.nan,) * len(ids))
        case "unknown id":
            return change(chunk, token_ids=(vocab_count,) * len(ids))
        case "no logprobs":
            return change(chunk, logprobs=())
        case "early finish":
            return change(chunk, finish="length")
        case "nan top":
            return change(chunk, top_logprobs=(TopLogprobs(ids[:1], (math.nan,)),) * len(ids))
        case "future weights":
            return change(chunk, policy_version=chunk.policy_version + 1)
    return chunk
