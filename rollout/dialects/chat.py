"""OpenAI's `/v1/chat/completions`: tools, streaming, `reasoning_content`, logprobs; V4's own language underneath.

Messages are encoded as the official encoder does, reasoning of earlier turns included where it stays (with tools);
what is sampled is read by the incremental parser, so a stream carries reasoning, text and arguments as they come.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from pydantic import Field

from rollout.dialects.options import (
    Options,
    StreamOptions,
    finish_of,
    request_name,
    sampling_of,
    thinking_of,
    usage,
    with_tops,
)
from rollout.engine import TOP_LOGPROBS_MAX
from rollout.errors import RequestError
from rollout.generation import Ask, Drawn, drawn_ids, drawn_of, prompt_length
from rollout.jobs import make_conversation
from rollout.state import State
from toolcall_dsl import (
    ArgumentsText,
    CallStarted,
    ContentText,
    ReasoningText,
    StreamParser,
    Tokenizer,
    TurnEvent,
    TurnFailed,
    parse,
)

_ASKING = ("user", "developer", "tool")


class ChatRequest(Options):
    """The body."""

    model: str | None = None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    seed: int | None = None
    n: int | None = Field(default=1, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS_MAX)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    request_id: str | None = None
    priority: int = 0


def ask_of(body: ChatRequest, context_tokens_max: int) -> Ask:
    """RequestError names what cannot be done."""
    body.refuse()
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs: ask for logprobs, too")
    if body.tool_choice not in (None, "auto", "none"):
        raise RequestError("tool_choice: this model is not forced to call; say auto or none")
    name, is_named = request_name(body.request_id, "chatcmpl")
    try:
        messages = msgspec.json.encode(_messages(body)).decode()
    except UnicodeEncodeError as error:
        raise RequestError(f"messages: {error.object[error.start : error.end]!r} is half a character") from error
    return Ask(
        request_id=name,
        prompts=(make_conversation("chat", messages_json=messages),),
        count=body.n or 1,
        thinking=thinking_of(body.reasoning_effort, body.chat_template_kwargs),
        sampling=sampling_of(name, body.temperature, body.top_p, body.top_k, body.seed),
        tokens_count_max=body.max_completion_tokens or body.max_tokens or context_tokens_max,
        top_logprobs_count=body.top_logprobs or 0,
        priority=-body.priority,
        is_named=is_named,
    )


def _messages(body: ChatRequest) -> list[dict[str, Any]]:
    """OpenAI's messages as the encoder takes them: tools are declared by the first system message."""
    _check(body.messages)
    said = list(body.messages)
    if body.tools and body.tool_choice != "none":
        if said[0].get("role") != "system":
            said.insert(0, {"role": "system", "content": ""})
        said[0] = {**said[0], "tools": body.tools}
    return said


def _check(messages: Sequence[dict[str, Any]]) -> None:
    """Somebody asks, in text, and every call has one result: else the model would read them wrongly.  RequestError."""
    if not messages:
        raise RequestError("messages: give at least one")
    last = messages[-1].get("role")
    if last not in _ASKING:
        raise RequestError(f"messages: the last is of {str(last)[:80]!r}, must be of {', '.join(_ASKING)}")
    waiting: list[object] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if unread := [kind for kind in kinds if kind != "text"]:
            raise RequestError(f"messages[{at}].content: a part of type {str(unread[0])[:80]!r} cannot be read")
        if message.get("role") == "tool":
            if message.get("tool_call_id") not in waiting:
                raise RequestError(f"messages[{at}].tool_call_id: no call before it has this id and no result yet")
            waiting.remove(message.get("tool_call_id"))
        elif waiting:
            raise RequestError(
                f"messages[{at}]: before it, a tool message must answer the call {str(waiting[0])[:80]!r}"
            )
        calls = message.get("tool_calls") if message.get("role") == "assistant" else None
        waiting += [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


class Writer:
    """Answers to one request, whole or a piece at a time."""

    def __init__(self, body: ChatRequest, ask: Ask, model: str, tokenizer: Tokenizer) -> None:
        self._body, self._ask, self._tokenizer = body, ask, tokenizer
        self._head = {"id": ask.request_id, "created": int(time.time()), "model": model}
        self._parsers: dict[int, StreamParser] = {}

    def whole(self, states: list[State]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, state) for index, state in enumerate(states)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(states)}

    def piece(self, drawn: Drawn) -> dict[str, Any]:
        """Some more tokens of a choice: what they say, if they complete anything."""
        index, is_first = drawn.index, drawn.index not in self._parsers
        parser = self._parser(index)
        parser.feed(drawn.token_ids)
        delta = self._delta(index, _events(parser))
        return self._chunk(drawn, {"role": "assistant", **delta} if is_first else delta)

    def end(self, index: int, state: State) -> dict[str, Any]:
        """The last piece of a choice."""
        parser = self._parser(index)
        parser.finish()
        chunk = self._chunk(Drawn(index), self._delta(index, _events(parser)))
        chunk["choices"][0]["finish_reason"] = finish_of(state, has_calls=True)
        return chunk

    def counts(self, states: list[State]) -> dict[str, Any]:
        """The chunk after the last, if it was asked for."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(states)}

    def _parser(self, index: int) -> StreamParser:
        thinking = self._ask.thinking != "none"
        fresh = StreamParser(self._tokenizer, thinking=thinking, policy=self._ask.parse_policy)
        return self._parsers.setdefault(index, fresh)

    def _choice(self, index: int, state: State) -> dict[str, Any]:
        ids = drawn_ids(state)
        thinking, policy = self._ask.thinking != "none", self._ask.parse_policy
        parsed = state.turns[0].parsed if state.turns else parse(ids, self._tokenizer, thinking=thinking, policy=policy)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content or None, "refusal": None}
        message["reasoning_content"] = parsed.reasoning or None
        if parsed.calls:
            message["tool_calls"] = [
                _call(self._call_id(index, n), call.name, msgspec.json.encode(call.arguments).decode())
                for n, call in enumerate(parsed.calls)
            ]
        made: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
        made["finish_reason"] = finish_of(state, has_calls=True)
        if parsed.error is not None:
            made["parse_error"] = parsed.error.message
        return self._with_tokens(made, drawn_of(index, state), list(state.token_ids[: prompt_length(state)]))

    def _chunk(self, drawn: Drawn, delta: dict[str, Any]) -> dict[str, Any]:
        made = {"index": drawn.index, "delta": delta, "finish_reason": None, "logprobs": None}
        choices = [self._with_tokens(made, drawn, None)]
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _with_tokens(self, choice: dict[str, Any], drawn: Drawn, prompt: list[int] | None) -> dict[str, Any]:
        if self._body.logprobs:
            content = [
                {**self._token(token_id, logprob), "top_logprobs": [self._token(*top) for top in tops]}
                for token_id, logprob, tops in with_tops(drawn)
            ]
            choice["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_token_ids:
            choice["token_ids"] = list(drawn.token_ids)
            if prompt is not None:
                choice["prompt_token_ids"] = prompt
        return choice

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token_id])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _delta(self, index: int, events: Iterator[TurnEvent]) -> dict[str, Any]:
        """What the events add to a message."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case ReasoningText(text=text):
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + text
                case ContentText(text=text):
                    delta["content"] = delta.get("content", "") + text
                case CallStarted(index=number, name=name):
                    calls[number] = {"index": number, **_call(self._call_id(index, number), name, "")}
                case ArgumentsText(index=number, json_text=text):
                    call = calls.setdefault(number, {"index": number, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
                case TurnFailed(error=error):
                    delta["parse_error"] = error.message
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _call_id(self, index: int, number: int) -> str:
        return f"call_{self._ask.request_id}_{index}_{number}"


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _events(parser: StreamParser) -> Iterator[TurnEvent]:
    while (event := parser.next_event()) is not None:
        yield event
