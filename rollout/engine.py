"""The engine port: whatever turns token ids into token ids.

Tokens in, tokens out: text never crosses this port, so the ids that were sampled are the ids
that are logged and the ids that come back as context.

Invariants:
1. Given the same weights and build, a chunk depends only on the request (`token_ids`, `sampling`,
   `stream_key`), never on other requests, on batching, or on what the engine kept from before.
   The one exception says so: a request that goes on over a state of other weights (`kv` is "kept").
2. Sampling `k` tokens, then a request with those `k` appended, yields the rest unchanged.
3. All tokens of a chunk were drawn with the weights that its `policy_version` names.

See: docs/architecture.md, "Engine".
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from rollout.errors import RequestError

OnUpdate = Literal["keep", "cut", "pin"]
"""What new weights do to a session: it goes on over its KV as it is, over a KV computed again, or with the old ones."""
KvBreak = Literal["", "kept", "rebuilt", "restored"]
"""What a KV cache is made of that is not simply the one the tokens before were drawn with; "" where it is."""
PauseMode = Literal["keep", "wait", "abort"]
"""vLLM's words: running requests stand still and go on; are finished first; end with PreemptedError."""

STOP_IDS_MAX = 16
TOP_LOGPROBS_MAX = 32
SCORED_HIDDEN_BYTES_MAX = 256 << 20
TEMPERATURE_MIN = 1e-3
"""Below it the last bits of the logits decide, and nothing is left of a draw: 0 says that exactly."""


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
    later: the engine may keep its state until `release(session)`.  `on_update` holds until the
    session's next request.  Of requests that wait in the engine those of a higher `priority` go first.
    The last four ask for more about each token.
    """

    session: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    stream_key: int
    tokens_count_max: int
    stop_ids: frozenset[int]
    on_update: OnUpdate = "keep"
    priority: int = 0
    top_logprobs_count: int = 0
    returns_mask: bool = False
    returns_routes: bool = False
    returns_hidden: bool = False

    @property
    def cuts(self) -> bool:
        """Whether some tokens may have no chance at all."""
        return self.sampling.temperature > 0 and (self.sampling.top_k > 0 or self.sampling.top_p < 1)


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of a model: of the layers `layer_ids` each token goes through `top_k` in each.

    Layers that are routed by a hash of the token are among them.
    """

    layer_ids: tuple[int, ...]
    experts_count: int
    top_k: int

    @property
    def width(self) -> int:
        """Bytes of an expert id."""
        return 1 if self.experts_count <= 1 << 8 else 2

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return len(self.layer_ids) * self.top_k * self.width


class Routes(msgspec.Struct, frozen=True):
    """The experts that the tokens from position `start` of the context on went through, as the engine's Routing has it.

    Row after row, layer after layer; ids of `width` bytes, little endian.
    """

    start: int
    expert_ids: bytes


class TopLogprobs(msgspec.Struct, frozen=True):
    """The likeliest tokens at one position, likeliest first (equal ones by id), and their logprobs."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """At least one new token; `logprobs` under the processed distribution (after temperature and cuts).

    `finish` is set on the last chunk: "stop" (a stop id was drawn) or "length".
    `cached_tokens_count`, on the first chunk (or on the last, if it is told at the end): tokens of the prompt that
    were not computed for it.
    `kv`, on the first chunk after a break: the state was kept from before a change of weights, or
    computed again because of one, or taken from a file by `restore`.
    `top_logprobs`, if asked for: for each token the likeliest of the distribution that it was drawn
    from, fewer than asked for where a cut kept fewer.  `masks`, if asked for and the request cuts:
    for each token the ids that top-k and top-p kept, ascending.

    A token's own row of `routes` exists once it was read, which draws the next one: rows end with the token before the
    chunk's last, and begin before the chunk: at the first token that was computed for it.  `hidden`: the last layer's
    output behind the final norm, from which each token was drawn; `hidden_dim` bf16 each, little endian.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"] | None = None
    policy_version: int = 0
    cached_tokens_count: int = 0
    kv: KvBreak = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    masks: tuple[tuple[int, ...], ...] = ()
    routes: Routes | None = None
    hidden: bytes = b""


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """Teacher forcing: the f32 logprob of every token but the first, at temperature 1 and without cuts.

    Equal, bit for bit, to what `sample` reports for these tokens at temperature 1 without cuts and
    with these weights.  `top_logprobs` and `hidden`, if asked for, are as long as `logprobs`; a row of `hidden` is
    what `sample` tells of a token: what its logits are the head's product with, `hidden_dim` bf16.
    """

    logprobs: tuple[float, ...]
    policy_version: int
    top_logprobs: tuple[TopLogprobs, ...] = ()
    hidden: tuple[bytes, ...] = ()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded with every token: who drew it, with which weights (docs/formats/trajectory.md) and which build.

    `policy_version` is the trainer's number for the weights.  `routing` None: it tells no routes; `hidden_dim` 0: no
    hidden states.
    """

    name: str
    build: str
    weights_digest: str
    vocab_count: int
    context_tokens_max: int
    policy_version: int = 0
    routing: Routing | None = None
    hidden_dim: int = 0


Announce = Callable[[EngineInfo], Awaitable[object]]
"""What is to be done between a change of weights being certain and its first token."""


class Engine(Protocol):
    """One running engine.  RequestError: the call can never work; EngineError: it may, later."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the open engine and of the weights that new sessions get."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the weights that draw, where this host sees it."""
        ...

    @property
    def is_paused(self) -> bool:
        """True from `pause` to `resume`: silence is no failure."""
        ...

    @property
    def failure(self) -> str:
        """Why nothing can be drawn now; nothing while it can be, or could but for a pause."""
        ...

    async def open(self) -> None:
        """Load weights; ready when it returns.  EngineError."""
        ...

    def sample(self, request: SampleRequest) -> AsyncGenerator[Sampled, None]:
        """Stream the continuation; closing the iterator early stops it.

        While the engine is paused a new request waits.  RequestError, EngineError; PreemptedError
        after `preempt` or `pause("abort")`, once everything that was drawn has been handed over.
        """
        ...

    async def score(
        self, token_ids: Sequence[int], *, top_logprobs_count: int = 0, returns_hidden: bool = False
    ) -> Scored:
        """Logprobs of given tokens with the newest weights; waits while the engine is paused.

        RequestError, EngineError; PreemptedError after `pause("abort")`.
        """
        ...

    async def preempt(self, session: str) -> None:
        """End the session's requests with PreemptedError at the next token boundary; its state is kept for `save`."""
        ...

    async def release(self, session: str) -> None:
        """A session, known or not, has ended: what was kept for it may go, or serve others that begin alike."""
        ...

    async def pause(self, mode: PauseMode) -> None:
        """Draw no more tokens; returns once that is so ("wait": once every running request has finished).

        Idempotent; a later call changes the mode.  `save`, `restore`, `update` and `release` work as always.
        """
        ...

    async def resume(self) -> None:
        """Go on after `pause`; a no-op without one."""
        ...

    async def update(self, checkpoint: Path, policy_version: int, announce: Announce | None = None) -> EngineInfo:
        """Change the weights between two tokens; returns the new `info`.

        `policy_version` must grow; repeating the last update is a no-op.  Sessions of "keep" and
        "cut" go on with the new weights, those of "pin" with theirs until they are released.
        `announce` is awaited with the new info when the weights are ready and before they draw: what
        must be durable first is appended there, and what it raises stops the change.
        EngineError, and nothing changed: the checkpoint is broken or of another shape, or sessions
        still pin as many versions as the engine can hold.
        """
        ...

    async def save(self, session: str, path: Path) -> int:
        """Write the session's state; returns how many tokens of its context it covers (0: nothing was kept).

        The file appears whole or not at all.  After the stream ended (or was preempted) it covers
        only tokens that were handed over.  EngineError if it cannot be written.
        """
        ...

    async def restore(self, session: str, path: Path) -> int:
        """Take back what `save` wrote, in this process or another; returns the tokens that need not be computed.

        0 if the file is missing, damaged, of another build or of other weights: the session then starts
        from its tokens, with the same result.
        """
        ...

    async def close(self) -> None:
        """Stop; running requests end with EngineError."""
        ...


def check_request(request: SampleRequest, info: EngineInfo) -> None:
    """RequestError, which names the field, for a request that no state of such an engine can ever carry out."""
    check_tokens(request.token_ids, info)
    sampling, room = request.sampling, info.context_tokens_max
    if len(request.token_ids) >= room:
        raise RequestError(f"token_ids: {len(request.token_ids)} tokens leave no room in a context of {room}")
    if request.tokens_count_max < 1:
        raise RequestError("tokens_count_max must be at least 1")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise RequestError("temperature must be finite and not negative")
    if 0 < sampling.temperature < TEMPERATURE_MIN:
        raise RequestError(f"temperature is {sampling.temperature:g}: use 0 for greedy, or at least 0.001")
    if not 0 < sampling.top_p <= 1 or not 0 <= sampling.top_k < 1 << 32:
        raise RequestError("top_p must be above 0 and at most 1, top_k not negative and below 2**32")
    if len(request.stop_ids) > STOP_IDS_MAX or not all(0 <= id_ < info.vocab_count for id_ in request.stop_ids):
        raise RequestError(f"stop_ids: at most {STOP_IDS_MAX} ids of the vocabulary")
    check_top_logprobs(request.top_logprobs_count)
    if request.returns_routes and info.routing is None:
        raise RequestError(f"returns_routes: engine {info.name} tells no routes")
    if request.returns_hidden and not info.hidden_dim:
        raise RequestError(f"returns_hidden: engine {info.name} tells no hidden states")


def check_tokens(token_ids: Sequence[int], info: EngineInfo) -> None:
    """RequestError unless these are one to `info.context_tokens_max` ids of the vocabulary."""
    if not token_ids:
        raise RequestError("token_ids is empty: a context holds at least the BOS token")
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_count:
        raise RequestError(f"token_ids: ids must be 0 to {info.vocab_count - 1}")
    if len(token_ids) > info.context_tokens_max:
        raise RequestError(f"token_ids: {len(token_ids)} tokens, and a context holds {info.context_tokens_max}")


def check_score(
    token_ids: Sequence[int], info: EngineInfo, top_logprobs_count: int, *, returns_hidden: bool = False
) -> None:
    """RequestError, which names the field, for what such an engine can never score."""
    check_tokens(token_ids, info)
    check_top_logprobs(top_logprobs_count)
    if returns_hidden and not info.hidden_dim:
        raise RequestError(f"returns_hidden: engine {info.name} tells no hidden states")
    if returns_hidden and (size := 2 * info.hidden_dim * (len(token_ids) - 1)) > SCORED_HIDDEN_BYTES_MAX:
        bound = f"one answer holds at most {SCORED_HIDDEN_BYTES_MAX}"
        raise RequestError(f"returns_hidden: the states of {len(token_ids)} tokens are {size} bytes, and {bound}")


def check_top_logprobs(count: int) -> None:
    """RequestError for a count that is out of bounds."""
    if not 0 <= count <= TOP_LOGPROBS_MAX:
        raise RequestError(f"top_logprobs_count must be 0 to {TOP_LOGPROBS_MAX}")


def check_version(info: EngineInfo, policy_version: int) -> None:
    """RequestError unless the version may follow that of `info`."""
    if policy_version <= info.policy_version:
        raise RequestError(
            f"policy_version is {policy_version}: it must grow, and the engine is at {info.policy_version}"
        )
