"""Sampled tokens to a turn: reasoning, content, calls, and the kind of every token.

A turn in one piece is a turn fed once: `parse` hands everything to the incremental parser and
joins its events.  It is a total function: what a model samples never raises, it is either a turn
or a turn with an error that names the broken rule.  Unknown tools and missing parameters are not
errors of the format; `toolcall_dsl.schema` answers those.

Invariants:
1. Under `strict`, a turn with an error has no calls.  Under both policies a cut-off call is never among the calls.
2. The spans cover the token ids exactly.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.stream import StreamParser
from toolcall_dsl.tokenizer import Tokenizer
from toolcall_dsl.types import (
    CallFinished,
    ContentText,
    ParsedTurn,
    ParseError,
    Policy,
    ReasoningText,
    Span,
    ToolCall,
    TurnEvent,
    TurnFailed,
)


def parse(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    policy: Policy = "strict",
    tools: Sequence[Mapping[str, object]] | None = None,
    dialect: Dialect = V4,
) -> ParsedTurn:
    """Read what was sampled after the assistant header, EOS included.  Total: it never raises on ids.

    An id that the vocabulary lacks reads as U+FFFD.  FeedError for text in place of ids.

    `thinking` says which header it was (`<think>` or `</think>`).  `tools` (OpenAI shape) only
    serve the tolerant policy, to recognise a spurious wrapper parameter.  OptionError for an
    option that means nothing.
    """
    parser = StreamParser(tokenizer, thinking=thinking, policy=policy, tools=tools, dialect=dialect)
    parser.feed(token_ids)
    return _finished(parser)


def parse_text(
    text: str,
    *,
    thinking: bool,
    policy: Policy = "strict",
    tools: Sequence[Mapping[str, object]] | None = None,
    dialect: Dialect = V4,
) -> ParsedTurn:
    """Read a turn out of text, believing every control token that is spelled in it; no spans.

    FeedError for what is no text.
    """
    parser = StreamParser(thinking=thinking, policy=policy, tools=tools, dialect=dialect)
    parser.feed_text(text)
    return _finished(parser)


def turn_of(events: Iterable[TurnEvent], spans: tuple[Span, ...] = (), *, is_complete: bool = False) -> ParsedTurn:
    """The turn that a parser's events tell, from the first to the last.

    Events say neither `spans` nor whether the turn `is_complete`: the parser does.
    """
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    error: ParseError | None = None
    for event in events:
        match event:
            case ReasoningText(text):
                reasoning.append(text)
            case ContentText(text):
                content.append(text)
            case CallFinished(_, call):
                calls.append(call)
            case TurnFailed(error):
                pass
            case _:
                pass  # a call that started, and its arguments as text: they come back whole in CallFinished
    return ParsedTurn("".join(reasoning), "".join(content), tuple(calls), error, spans, is_complete)


def _finished(parser: StreamParser) -> ParsedTurn:
    parser.finish()
    return turn_of(_events(parser), parser.spans(), is_complete=parser.is_complete)


def _events(parser: StreamParser) -> Iterator[TurnEvent]:
    while (event := parser.next_event()) is not None:
        yield event
