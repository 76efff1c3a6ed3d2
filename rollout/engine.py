"""The engine port: whatever turns token ids into token ids.

Tokens in, tokens out: text never crosses this port, so the ids that were sampled are the ids
that are logged and the ids that come back as context.

Invariants:
1. Given the same weights and build, a chunk depends only on the request (`token_ids`, `sampling`,
   `stream_key`), never on other requests, on batching, or on what the engine kept from before.
2. Sampling `k` tokens, then a request with those `k` appended, yields the rest unchanged.

See: docs/architecture.md, "Engine".
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are drawn.  `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Continue `token_ids` (u32 ids, the whole context, BOS included).

    Draws one token at a time until one of `stop_ids` was drawn (it is part of the output) or
    `tokens_count_max` tokens were.  Noise is a pure function of (`sampling.seed`, `stream_key`,
    position of the token in the context).  `session` names a context that will be continued
    later: the engine may keep its state until `release(session)`.
    """

    session: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    stream_key: int
    tokens_count_max: int
    stop_ids: frozenset[int]


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """At least one new token; `logprobs` under the processed distribution (after temperature and cuts).

    `finish` is set on the last chunk: "stop" (a stop id was drawn) or "length".
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"] | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded with every token: who drew it, with which weights (sha256) and which build."""

    name: str
    build: str
    weights_digest: str
    vocab_count: int
    context_tokens_max: int


class Engine(Protocol):
    """One running engine."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the open engine."""
        ...

    async def open(self) -> None:
        """Load weights; ready when it returns.  EngineError."""
        ...

    def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Stream the continuation; closing the iterator early stops it.  EngineError."""
        ...

    async def release(self, session: str) -> None:
        """Forget what was kept for a session; unknown sessions are ignored."""
        ...

    async def close(self) -> None:
        """Stop; running requests end with EngineError."""
        ...
