"""What goes through a batch: sessions, the requests of one, tokens to score, and what a turn tells of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from rollout.engine import KvBreak, OnUpdate, Routes, SampleRequest
from rollout.engines.embedded.binding import Drawn, State
from rollout.errors import EngineError

BRANCH_TOKENS_MIN = 32
"""A state is left behind where contexts part if it spares at least so many tokens (5 ms), since it may cost 1 MB."""


class Session:
    """What is remembered of a session from its first request until it is released."""

    def __init__(self) -> None:
        self.drew_with = ""
        """Digest of the weights that drew its last token, or that its restored state is of."""
        self.on_update: OnUpdate = "keep"
        self.is_restored = False
        """Its kept state came from a file, and nothing was drawn from it yet."""
        self.is_released = False


class Job:
    """One request on its way: its tokens so far, and its state once it has started.

    `weights` are the digests that computed the state, newest last; `kv` is told with the next tokens.
    """

    def __init__(self, request: SampleRequest, session: Session | None = None) -> None:
        self.request = request
        self.session = session or Session()
        self.tokens = array("I", request.token_ids)
        self.stop_ids = tuple(request.stop_ids)
        self.state: State | None = None
        self.weights: tuple[str, ...] = ()
        self.kv: KvBreak = ""
        self.cached_count = 0
        self.awaits_state = False
        """A state that it could start from is being read."""
        self.places: set[int] = set()
        """Where in its prompt it leaves a state behind."""
        self.routes = bytearray()
        """Of the tokens that the state took in and nobody was told of."""
        self.routes_start = 0

    @property
    def pending_count(self) -> int:
        """Tokens that the state has not taken in; 1 when the next one can be drawn."""
        return len(self.tokens) - (self.state.position if self.state else 0)

    @property
    def drawn_count(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.request.token_ids)

    @property
    def prefills(self) -> bool:
        """Whether it holds a state that has not yet taken in all but the last token."""
        return self.state is not None and self.pending_count > 1

    @property
    def taken_tokens(self) -> bytes:
        """Those that its state has taken in."""
        return self.tokens[: self.state.position if self.state else 0].tobytes()

    def plan_places(self, fork_token_id: int | None, header_token_id: int | None, start: int, known_count: int) -> None:
        """It starts with `start` tokens computed, of `known_count` that others went through.

        `fork_token_id` ends the constant prefix of a prompt, `header_token_id` begins the header of each reply.
        """
        prompt = self.request.token_ids
        self.places = {prompt.index(fork_token_id)} if fork_token_id in prompt else set()
        if header_token_id in prompt:
            self.places.add(len(prompt) - 1 - prompt[::-1].index(header_token_id))
        self._part_at(len(prompt) - 1, start)
        self._part_at(known_count, start)

    def leaves(self, start: int, shared_count: int) -> bool:
        """Whether it will leave behind more than `start` tokens, for one that begins with `shared_count` of its own."""
        self._part_at(min(shared_count, len(self.tokens) - 1), start)
        position = self.state.position if self.state else 0
        return any(max(start, position) < place <= shared_count for place in self.places)

    def _part_at(self, place: int, start: int) -> None:
        """Leave a state behind there, too, if that spares enough for one that has `start` tokens."""
        nearest = max((each for each in self.places if each <= place), default=0)
        if place - max(start, nearest) >= BRANCH_TOKENS_MIN:
            self.places.add(place)

    def take_routes(self, drawn: list[Drawn], row_bytes: int) -> Routes:
        """What nobody was told of yet, of the tokens that were read for these draws, too."""
        taken = Routes(self.routes_start, bytes(self.routes) + b"".join(token.routes for token in drawn))
        self.routes_start += len(taken.expert_ids) // row_bytes
        self.routes.clear()
        return taken

    @property
    def wants_mask(self) -> bool:
        """Whether the ids that top-k and top-p keep are asked for, and they cut at all."""
        sampling = self.request.sampling
        return self.request.returns_mask and sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)


class Scoring:
    """Tokens to score: how likely each but the first is, found out chunk by chunk."""

    def __init__(self, token_ids: Sequence[int], top_count: int, *, wants_hidden: bool = False) -> None:
        self.token_ids = tuple(token_ids)
        self.top_count = top_count
        self.wants_hidden = wants_hidden
        self.state: State | None = None
        self.awaits_state = False
        self.told: list[Drawn] = []


class Outcome(msgspec.Struct, frozen=True):
    """Tokens that one turn drew for a job (for a scoring: all at its end); `finish` on the last.

    With `error` it has ended, and tells no token.
    """

    job: Job | Scoring
    drawn: list[Drawn]
    finish: Literal["stop", "length"] | None
    policy_version: int = 0
    kv: KvBreak = ""
    cached_count: int = 0
    routes: Routes | None = None
    error: EngineError | None = None
