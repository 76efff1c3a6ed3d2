"""For tests and scripted engines: what a model would have sampled, and the events of a turn fed in parts.

A completion written as text says nothing about which tokens were sampled; `sampled_ids` takes every
control token that it spells as sampled.  `joined` joins neighbouring texts of one kind, so that the
events of two splits of one turn can be compared.

See: docs/formats/toolcall_dsl.md, "Streaming".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.stream import StreamParser
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import ArgumentsText, ContentText, ReasoningText, TurnEvent


def sampled_ids(text: str, tokenizer: Tokenizer, *, dialect: Dialect = V4) -> list[int]:
    """Ids of a completion; control tokens of the dialect that are spelled in it are control tokens."""
    ids: list[int] = []
    for part in tokenizer.unit_map.split(text):
        ids += [tokenizer.control(part)] if part in dialect.control_tokens else tokenizer.encode_plain(part)
    return ids


def events_of(parser: StreamParser, parts: Iterable[str | Sequence[int]]) -> list[TurnEvent]:
    """All events of one turn that is fed part by part, as text or as token ids, each taken as soon as it is there."""
    events: list[TurnEvent] = []
    for part in parts:
        if isinstance(part, str):
            parser.feed_text(part)
        else:
            parser.feed(part)
        events += iter(parser.next_event, None)
    parser.finish()
    events += iter(parser.next_event, None)
    return events


def joined(events: Iterable[TurnEvent]) -> list[TurnEvent]:
    """The same events with neighbouring texts of one kind (and one call) in one piece."""
    whole: list[TurnEvent] = []
    for event in events:
        match whole[-1:], event:
            case [ArgumentsText(index, before)], ArgumentsText(same, after) if index == same:
                whole[-1] = ArgumentsText(index, before + after)
            case [ReasoningText(before)], ReasoningText(after):
                whole[-1] = ReasoningText(before + after)
            case [ContentText(before)], ContentText(after):
                whole[-1] = ContentText(before + after)
            case _:
                whole.append(event)
    return whole
