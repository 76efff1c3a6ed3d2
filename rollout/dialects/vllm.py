"""vLLM's tokens-in, tokens-out route, `/inference/v1/generate`, and its way to give up requests by their names.

Fields and their meaning are vLLM's (0.33, entrypoints/serve/disagg); ids are never decoded on the way.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from rollout.dialects.options import (
    Options,
    StreamOptions,
    TokenIds,
    Tops,
    finish_of,
    request_name,
    sampling_of,
    usage,
    with_tops,
)
from rollout.engine import TOP_LOGPROBS_MAX
from rollout.errors import RequestError
from rollout.generation import Ask, Drawn, drawn_of, prompt_length
from rollout.jobs import make_conversation
from rollout.record import version_runs
from rollout.state import State

TOKENS_DEFAULT = 16
NAMES_MAX = 1024


class SamplingParams(Options):
    """vLLM's sampling parameters, as far as they mean something here."""

    n: int = Field(default=1, ge=1)
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    seed: int | None = None
    max_tokens: int | None = Field(default=TOKENS_DEFAULT, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)


class GenerateRequest(Options):
    """The body of `/inference/v1/generate`."""

    request_id: str | None = None
    token_ids: TokenIds
    sampling_params: SamplingParams
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    cache_salt: str | None = None


class RequestIds(BaseModel):
    """The body of `/inference/v1/abort_requests`, and of `ack_requests`, which vLLM does not need."""

    request_ids: list[str] = Field(max_length=NAMES_MAX)


def ask_of(body: GenerateRequest, context_tokens_max: int) -> Ask:
    """RequestError names what cannot be done."""
    params = body.sampling_params
    body.refuse()
    params.refuse()
    if not body.token_ids:
        raise RequestError("token_ids: give at least one")
    name, is_named = request_name(body.request_id, "gen")
    return Ask(
        request_id=name,
        prompts=(make_conversation("prompt", token_ids=body.token_ids),),
        count=params.n,
        sampling=sampling_of(name, params.temperature, params.top_p, params.top_k, params.seed),
        tokens_count_max=params.max_tokens or context_tokens_max,
        top_logprobs_count=params.logprobs or 0,
        priority=-body.priority,  # there, lower goes first
        is_named=is_named,
    )


class Writer:
    """Answers to one request, whole or a piece at a time."""

    def __init__(self, body: GenerateRequest, ask: Ask) -> None:
        self._body, self._head = body, {"request_id": ask.request_id}

    def whole(self, states: list[State]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._end(drawn_of(index, state), state) for index, state in enumerate(states)]
        return {**self._head, "choices": choices, "prompt_logprobs": None, "usage": usage(states)}

    def piece(self, drawn: Drawn) -> dict[str, Any]:
        """Some more tokens of a choice."""
        return {**self._head, "choices": [self._choice(drawn)]}

    def end(self, index: int, state: State) -> dict[str, Any]:
        """The last piece of a choice."""
        return {**self._head, "choices": [self._end(Drawn(index), state)]}

    def counts(self, states: list[State]) -> dict[str, Any]:
        """The chunk after the last, if it was asked for."""
        return {**self._head, "choices": [], "usage": usage(states)}

    def _choice(self, drawn: Drawn) -> dict[str, Any]:
        made: dict[str, Any] = {"index": drawn.index, "token_ids": list(drawn.token_ids), "logprobs": None}
        made["finish_reason"] = None
        if self._body.sampling_params.logprobs is not None:
            made["logprobs"] = {"content": [_content(*each) for each in with_tops(drawn)]}
        return made

    def _end(self, drawn: Drawn, state: State) -> dict[str, Any]:
        """A choice with why it ended, and which versions of the weights drew which of its tokens."""
        made, base = self._choice(drawn), prompt_length(state)
        made["finish_reason"] = finish_of(state)
        made["weight_versions"] = [
            {"start": run.start - base, "length": run.length, "version": run.version}
            for run in version_runs(state, state.spans, {version: "" for _, version in state.versions})
        ]
        return made


def _content(token_id: int, logprob: float, tops: Tops) -> dict[str, Any]:
    return {**_token(token_id, logprob), "top_logprobs": [_token(*top) for top in tops]}


def _token(token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": f"token_id:{token_id}", "token_id": token_id, "logprob": logprob, "bytes": None}
