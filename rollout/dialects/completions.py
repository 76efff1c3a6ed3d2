"""OpenAI's `/v1/completions`, with vLLM's `return_token_ids`: text or ids in, text and ids out."""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

from pydantic import Field

from rollout.dialects.options import (
    Options,
    StreamOptions,
    finish_of,
    request_name,
    sampling_of,
    usage,
    with_tops,
)
from rollout.engine import TOP_LOGPROBS_MAX
from rollout.errors import RequestError
from rollout.generation import Ask, Drawn, drawn_ids, drawn_of, prompt_length
from rollout.jobs import check_length, make_conversation
from rollout.state import State
from toolcall_dsl import V4, Tokenizer
from toolcall_dsl.units import UnitsDecoder

TOKENS_DEFAULT = 16
PROMPTS_MAX = 1024


class CompletionRequest(Options):
    """The body; `prompt` is a text, token ids, or a list of either."""

    model: str | None = None
    prompt: str | list[Any]
    max_tokens: int | None = Field(default=TOKENS_DEFAULT, ge=1)
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    seed: int | None = None
    n: int = Field(default=1, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False
    request_id: str | None = None
    priority: int = 0


def ask_of(body: CompletionRequest, tokenizer: Tokenizer, context_tokens_max: int) -> Ask:
    """RequestError names what cannot be done.  A text gets a BOS before it, as vLLM does; ids stay as they are."""
    body.refuse()
    prompts = _prompts(body.prompt)
    if not 1 <= len(prompts) <= PROMPTS_MAX:
        raise RequestError(f"prompt: give 1 to {PROMPTS_MAX} prompts")
    for text in prompts:
        if isinstance(text, str):
            check_length(text, tokenizer, context_tokens_max)
    bos = tokenizer.control(V4.bos)
    ids = [[bos, *tokenizer.encode_plain(each)] if isinstance(each, str) else each for each in prompts]
    name, is_named = request_name(body.request_id, "cmpl")
    return Ask(
        request_id=name,
        prompts=tuple(make_conversation(f"prompt{number}", token_ids=each) for number, each in enumerate(ids)),
        count=body.n,
        sampling=sampling_of(name, body.temperature, body.top_p, body.top_k, body.seed),
        tokens_count_max=body.max_tokens or context_tokens_max,
        top_logprobs_count=body.logprobs or 0,
        priority=-body.priority,
        is_named=is_named,
    )


class Writer:
    """Answers to one request, whole or a piece at a time."""

    def __init__(self, body: CompletionRequest, ask: Ask, model: str, tokenizer: Tokenizer) -> None:
        self._body = body
        self._head = {"id": ask.request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._texts: dict[int, UnitsDecoder] = {}
        self._offsets: dict[int, int] = {}
        """How long the tokens of each choice are that were told."""
        self._eos = tokenizer.control(V4.eos)

    def whole(self, states: list[State]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, state in enumerate(states):
            made = self._choice(drawn_of(index, state), self._tokenizer.decode(self._spoken(drawn_ids(state))))
            made["finish_reason"] = finish_of(state)
            if self._body.return_token_ids:
                made["prompt_token_ids"] = list(state.token_ids[: prompt_length(state)])
            choices.append(made)
        return {**self._head, "choices": choices, "usage": usage(states)}

    def piece(self, drawn: Drawn) -> dict[str, Any]:
        """Some more tokens of a choice."""
        text = self._stream(drawn.index).decode("".join(map(self._tokenizer.units, self._spoken(drawn.token_ids))))
        return {**self._head, "choices": [self._choice(drawn, text)]}

    def end(self, index: int, state: State) -> dict[str, Any]:
        """The last piece of a choice."""
        text = self._stream(index).finish()
        return {**self._head, "choices": [{**self._choice(Drawn(index), text), "finish_reason": finish_of(state)}]}

    def counts(self, states: list[State]) -> dict[str, Any]:
        """The chunk after the last, if it was asked for."""
        return {**self._head, "choices": [], "usage": usage(states)}

    def _stream(self, index: int) -> UnitsDecoder:
        return self._texts.setdefault(index, UnitsDecoder(self._tokenizer.unit_map))

    def _spoken(self, token_ids: tuple[int, ...]) -> list[int]:
        return [token for token in token_ids if token != self._eos]

    def _choice(self, drawn: Drawn, text: str) -> dict[str, Any]:
        made: dict[str, Any] = {"index": drawn.index, "text": text, "logprobs": None, "finish_reason": None}
        if self._body.logprobs is not None:
            tokens = [self._tokenizer.decode([token]) for token in drawn.token_ids]
            *offsets, end = accumulate(map(len, tokens), initial=self._offsets.get(drawn.index, 0))
            self._offsets[drawn.index] = end
            made["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": list(drawn.logprobs),
                "top_logprobs": [
                    {self._tokenizer.decode([token]): value for token, value in (*tops, (drawn_id, logprob))}
                    for drawn_id, logprob, tops in with_tops(drawn)
                ],
                "text_offset": offsets,
            }
        if self._body.return_token_ids:
            made["token_ids"] = list(drawn.token_ids)
        return made


def _prompts(prompt: str | list[Any]) -> list[str] | list[list[int]]:
    """Checked by hand: a validator would complain of every one of a million."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and _are_ids(prompt):
        return [prompt]
    if not all(isinstance(each, str) for each in prompt) and not all(map(_are_ids, prompt)):
        raise RequestError("prompt: give a text, token ids, or a list of one of them")
    return prompt


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
