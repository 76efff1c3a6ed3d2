"""Where the event loop keeps what was drawn for one request until its consumer takes it.

A consumer that lags gets its tokens merged: nothing queues beyond what the request asked for.  A chunk
ends where the weights or the making of the KV cache change.
"""

from __future__ import annotations

import asyncio
from collections import deque

from rollout.engine import Routes, Sampled
from rollout.engines.embedded.jobs import Outcome
from rollout.errors import EngineError


class Mailbox:
    """One producer, one consumer, both in the event loop."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._runs: deque[list[Outcome]] = deque()
        self._error: EngineError | None = None

    def put(self, outcome: Outcome) -> None:
        """Add what a turn told."""
        if outcome.error is not None:
            self.fail(outcome.error)
            return
        if self._runs and self._runs[-1][-1].policy_version == outcome.policy_version and not outcome.kv:
            self._runs[-1].append(outcome)
        else:
            self._runs.append([outcome])
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """Nothing more comes."""
        self._error = error
        self._arrived.set()

    async def take(self) -> Sampled:
        """What arrived since the last call, at least one token; after all of it, a failure's EngineError."""
        await self._arrived.wait()
        if not self._runs and self._error is not None:
            raise self._error
        chunk = _merged(self._runs.popleft())
        if not self._runs and self._error is None:
            self._arrived.clear()
        return chunk


def _merged(run: list[Outcome]) -> Sampled:
    first, last = run[0], run[-1]
    drawn = first.drawn if first is last else [token for outcome in run for token in outcome.drawn]
    return Sampled(
        token_ids=tuple([token.token_id for token in drawn]),
        logprobs=tuple([token.logprob for token in drawn]),
        finish=last.finish,
        policy_version=first.policy_version,
        cached_tokens_count=first.cached_count,
        kv=first.kv,
        top_logprobs=tuple([token.top for token in drawn if token.top is not None]),
        masks=tuple([token.mask for token in drawn if token.mask is not None]),
        routes=first.routes
        and Routes(first.routes.start, b"".join(each.routes.expert_ids for each in run if each.routes)),
        hidden=b"".join(token.hidden for token in drawn) if drawn[0].hidden else b"",
    )
