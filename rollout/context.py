"""The model's view of a task: system message, tools, instruction, and the spans of what it saw.

The wording and the order of the tools are what the embedded checkpoint was taught
(rollout/engines/embedded/checkpoint/README.md); the encoding is the official one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from rollout.events import PromptSegment
from rollout.request import Conversation, Thinking
from toolcall_dsl import Segment, SpanKind, Tokenizer, encode, encode_results

SYSTEM = "You are a coding agent in a Linux sandbox."

TOOLS: tuple[dict[str, object], ...] = (
    {
        "name": "bash",
        "description": "Run a shell command in the sandbox",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
    {
        "name": "edit",
        "description": "Replace text in a file",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}},
            "required": ["path", "old", "new"],
        },
    },
)


class Span(msgspec.Struct, frozen=True):
    """A run of tokens of one kind; `turn` counts model turns from 0 (the prompt belongs to turn 0)."""

    start: int
    length: int
    kind: str
    turn: int
    trainable: bool


def messages(instruction: str) -> list[dict[str, object]]:
    """The opening messages of a task in the shape that `toolcall_dsl.encode` takes."""
    return [
        {"role": "system", "content": SYSTEM, "tools": [{"type": "function", "function": tool} for tool in TOOLS]},
        {"role": "user", "content": instruction},
    ]


def prompt(instruction: str, tokenizer: Tokenizer, thinking: Thinking) -> tuple[PromptSegment, ...]:
    """The prompt of a task in tokens; byte for byte the official encoding of `messages`."""
    return encoded(messages(instruction), tokenizer, thinking)


def encoded(
    said: Sequence[Mapping[str, object]], tokenizer: Tokenizer, thinking: Thinking
) -> tuple[PromptSegment, ...]:
    """The official encoding of messages, up to where the model goes on.  toolcall_dsl.MessageError."""
    segments = encode(
        said, tokenizer, thinking=thinking != "none", reasoning_effort="max" if thinking == "max" else None
    )
    return _prompt_segments(segments)


def conversation_prompt(
    conversation: Conversation, tokenizer: Tokenizer, thinking: Thinking
) -> tuple[PromptSegment, ...]:
    """The prompt of a conversation: its tokens as they are, or the official encoding of its messages.

    toolcall_dsl.MessageError names the message that cannot be encoded.
    """
    if conversation.token_ids:
        return (PromptSegment(SpanKind.USER.value, conversation.token_ids),)
    return encoded(msgspec.json.decode(conversation.messages_json), tokenizer, thinking)


def results(observations: tuple[str, ...], tokenizer: Tokenizer, thinking: Thinking) -> tuple[PromptSegment, ...]:
    """What is appended after a turn whose calls were answered, up to where the model goes on."""
    return _prompt_segments(encode_results(observations, tokenizer, thinking=thinking != "none"))


def _prompt_segments(segments: tuple[Segment, ...]) -> tuple[PromptSegment, ...]:
    return tuple(PromptSegment(segment.kind.value, segment.token_ids) for segment in segments)


def spans_of(segments: tuple[PromptSegment, ...], start: int, turn: int) -> tuple[Span, ...]:
    """The spans of prompt segments that were appended at `start`; never trainable."""
    spans = []
    for segment in segments:
        spans.append(Span(start, len(segment.token_ids), segment.kind, turn, trainable=False))
        start += len(segment.token_ids)
    return tuple(spans)


def ragged_offsets(spans: tuple[Span, ...], rows: Sequence[Sequence[object]]) -> tuple[int, ...]:
    """Where the row of each token of the context begins, and the last one ends: only sampled tokens have any."""
    offsets, drawn = [0], iter(rows)
    for span in spans:
        for _ in range(span.length):
            offsets.append(offsets[-1] + (len(next(drawn, ())) if span.trainable else 0))
    return tuple(offsets)
