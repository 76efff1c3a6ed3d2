"""Conversations to prompts: the reference text, and token ids with the kind of every token.

A prompt is first a list of pieces, control tokens and texts, and only then text or ids.  Adjacent
texts are joined before they are tokenized, so only a control token ends a run: the ids equal
those of tokenizing the whole text at once, except that data never turns into control tokens.

Invariants:
1. The pieces, spelled out, are the reference encoder's text byte for byte (exceptions: "Quirks").
2. A control id in a prompt was written by a template.
3. `encode(all)` is `encode(prefix)` plus `encode(rest, context=prefix)` for a split right after an
   assistant message, when tools are declared or thinking is off.

See: docs/formats/toolcall_dsl.md, "Encoding".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from toolcall_dsl.dialect import V4, Dialect
from toolcall_dsl.errors import MessageError
from toolcall_dsl.messages import (
    Block,
    Call,
    Message,
    Turn,
    drop_reasoning,
    last_asking_index,
    sort_results,
    turns_of,
)
from toolcall_dsl.tokenizer import Tokenizer, plain_units
from toolcall_dsl.types import Segment, SpanKind

Effort = Literal["high", "max"]


@dataclass(frozen=True)
class Control:
    """One control token, by its spelling."""

    text: str
    kind: SpanKind = SpanKind.TEMPLATE


@dataclass(frozen=True)
class Text:
    """Text in which nothing is a control token."""

    text: str
    kind: SpanKind = SpanKind.TEMPLATE


Piece = Control | Text


@dataclass(frozen=True)
class _Options:
    """The options of the reference encoder."""

    dialect: Dialect
    thinking: bool
    effort: str | None
    drop_thinking: bool
    add_bos: bool


@dataclass(frozen=True)
class _Frame:
    """What rendering one turn must know about the whole conversation."""

    dialect: Dialect
    thinking: bool
    dropping: bool
    turns: Sequence[Turn]
    last_asking: int


def encode_text(
    messages: Sequence[Message],
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] = (),
    dialect: Dialect = V4,
) -> str:
    """The prompt as the reference encoder writes it; `context` was encoded before and is not repeated.

    MessageError for a conversation that has no encoding.
    """
    options = _Options(dialect, thinking, reasoning_effort, drop_thinking, add_default_bos_token)
    return "".join(piece.text for piece in _pieces(messages, context, options))


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    reasoning_effort: Effort | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    context: Sequence[Message] = (),
    dialect: Dialect = V4,
) -> tuple[Segment, ...]:
    """The prompt as token ids with kinds; assistant turns of the caller are FORCED, for nobody sampled them here.

    MessageError for a conversation that has no encoding, TokenizerError for a needed control
    token that the vocabulary lacks.
    """
    options = _Options(dialect, thinking, reasoning_effort, drop_thinking, add_default_bos_token)
    return segments_of(_pieces(messages, context, options), tokenizer)


def encode_results(
    results: Sequence[str], tokenizer: Tokenizer, *, thinking: bool, dialect: Dialect = V4
) -> tuple[Segment, ...]:
    """What follows the end of an assistant turn whose calls were answered with `results`, in call order.

    The same tokens that `encode` gives for tool messages behind that turn when tools are declared.
    MessageError for no result at all.
    """
    if not results:
        raise MessageError("results: an answered turn has at least one result")
    frame = _Frame(dialect, thinking, dropping=False, turns=(), last_asking=-1)
    blocks = [Block(result, is_result=True) for result in results]
    return segments_of([*_user(frame, blocks), *_header(frame, index=0)], tokenizer)


def segments_of(pieces: Iterable[Piece], tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """Tokenize pieces; a token that spans two texts has the kind of its first byte."""
    tagged: list[tuple[int, SpanKind]] = []
    run: list[Text] = []
    for piece in pieces:
        if isinstance(piece, Text):
            run.append(piece)
            continue
        tagged += _tokenize_run(run, tokenizer)
        run = []
        tagged.append((tokenizer.control(piece.text), piece.kind))
    tagged += _tokenize_run(run, tokenizer)
    return _grouped(tagged)


def _tokenize_run(run: Sequence[Text], tokenizer: Tokenizer) -> Iterator[tuple[int, SpanKind]]:
    ends, kinds, end = [], [], 0
    for text in run:
        end += len(plain_units(text.text))
        ends.append(end)
        kinds.append(text.kind)
    place, offset = 0, 0
    for token_id in tokenizer.encode_plain("".join(text.text for text in run)):
        while offset >= ends[place]:
            place += 1
        yield token_id, kinds[place]
        offset += len(tokenizer.units(token_id))


def _grouped(tagged: Iterable[tuple[int, SpanKind]]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    ids: list[int] = []
    kind: SpanKind | None = None
    for token_id, token_kind in tagged:
        if token_kind != kind and kind is not None:
            segments.append(Segment(tuple(ids), kind))
            ids = []
        kind = token_kind
        ids.append(token_id)
    if kind is not None:
        segments.append(Segment(tuple(ids), kind))
    return tuple(segments)


def _pieces(messages: Sequence[Message], context: Sequence[Message], options: _Options) -> Iterator[Piece]:
    dialect, thinking, effort = options.dialect, options.thinking, options.effort
    if effort is not None and effort not in dialect.effort_prefixes:
        raise MessageError(f"reasoning_effort: {effort!r} is none of {', '.join(dialect.effort_prefixes)}")
    turns = sort_results([*turns_of(context, is_context=True), *turns_of(messages)])
    for turn in turns:
        if turn.task is not None and turn.task not in dialect.tasks:
            known = ", ".join(dialect.tasks)
            raise MessageError(f"messages[{turn.index}]: unknown task {turn.task!r}, expected one of {known}")
    dropping = options.drop_thinking and not any(turn.tools for turn in turns)
    if thinking and dropping:
        turns = drop_reasoning(turns)
    if options.add_bos and not context:
        yield Control(dialect.bos)
    if thinking and effort is not None and turns and not turns[0].is_context:
        yield Text(dialect.effort_prefixes[effort], SpanKind.SYSTEM)
    frame = _Frame(dialect, thinking, dropping, turns, last_asking_index(turns))
    for index, turn in enumerate(turns):
        if not turn.is_context:
            yield from _RENDERERS[turn.role](frame, index)
            yield from _transition(frame, index)


def _transition(frame: _Frame, index: int) -> Iterator[Piece]:
    """What opens the next turn: nothing unless it is the model's (or a reminder, a quirk)."""
    is_last = index + 1 == len(frame.turns)
    if not is_last and frame.turns[index + 1].role not in {"assistant", "latest_reminder"}:
        return
    turn, dialect = frame.turns[index], frame.dialect
    if turn.task is None:
        if turn.role in {"user", "developer"}:
            yield from _header(frame, index)
        return
    if turn.task in dialect.tasks_after_header:
        yield Control(dialect.assistant)
        yield Control(dialect.think_open if frame.thinking else dialect.think_close)
    yield Control(dialect.tasks[turn.task])


def _header(frame: _Frame, index: int) -> Iterator[Piece]:
    thinks = frame.thinking and (not frame.dropping or index >= frame.last_asking)
    yield Control(frame.dialect.assistant)
    yield Control(frame.dialect.think_open if thinks else frame.dialect.think_close)


def _render_system(frame: _Frame, index: int) -> Iterator[Piece]:
    yield Text(frame.turns[index].content, SpanKind.SYSTEM)
    yield from _appendices(frame, index)


def _render_developer(frame: _Frame, index: int) -> Iterator[Piece]:
    yield Control(frame.dialect.user)
    yield Text(frame.turns[index].content, SpanKind.USER)
    yield from _appendices(frame, index)


def _render_reminder(frame: _Frame, index: int) -> Iterator[Piece]:
    yield Control(frame.dialect.latest_reminder)
    yield Text(frame.turns[index].content, SpanKind.USER)


def _render_user(frame: _Frame, index: int) -> Iterator[Piece]:
    return _user(frame, frame.turns[index].blocks)


def _user(frame: _Frame, blocks: Sequence[Block]) -> Iterator[Piece]:
    yield Control(frame.dialect.user)
    for place, block in enumerate(blocks):
        if place:
            yield Text("\n\n")
        if block.is_result:
            yield Text("<tool_result>")
            yield Text(block.text, SpanKind.TOOL_RESULT)
            yield Text("</tool_result>")
        else:
            yield Text(block.text, SpanKind.USER)


def _appendices(frame: _Frame, index: int) -> Iterator[Piece]:
    """The tools section and the response format, both SYSTEM whoever carries them."""
    turn, dialect = frame.turns[index], frame.dialect
    if turn.tools:
        schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in turn.tools)
        yield Text("\n\n", SpanKind.SYSTEM)
        yield from _trusted(dialect.tools_head, dialect)
        yield Text(schemas, SpanKind.SYSTEM)
        yield from _trusted(dialect.tools_tail, dialect)
    if turn.response_format is not None:
        schema = json.dumps(turn.response_format, ensure_ascii=False)
        yield Text(f"\n\n{dialect.response_format_head}{schema}", SpanKind.SYSTEM)


def _trusted(template: str, dialect: Dialect) -> Iterator[Piece]:
    controls = dialect.control_tokens
    for part in re.split("(" + "|".join(map(re.escape, controls)) + ")", template):
        yield Control(part, SpanKind.SYSTEM) if part in controls else Text(part, SpanKind.SYSTEM)


def _render_assistant(frame: _Frame, index: int) -> Iterator[Piece]:
    turn, dialect, kind = frame.turns[index], frame.dialect, SpanKind.FORCED
    answers_task = index > 0 and frame.turns[index - 1].task is not None
    if frame.thinking and not answers_task and (not frame.dropping or index > frame.last_asking):
        yield Text(turn.reasoning, kind)
        yield Control(dialect.think_close, kind)
    yield Text(turn.content, kind)
    if turn.calls:
        yield from _call_block(turn.calls, dialect, kind)
    if not turn.wo_eos:
        yield Control(dialect.eos, kind)


def _call_block(calls: Sequence[Call], dialect: Dialect, kind: SpanKind) -> Iterator[Piece]:
    def opener(name: str, rest: str) -> Iterator[Piece]:
        yield Text("<", kind)
        yield Control(dialect.dsml, kind)
        yield Text(name + rest, kind)

    def closer(name: str, rest: str) -> Iterator[Piece]:
        yield Text("</", kind)
        yield Control(dialect.dsml, kind)
        yield Text(f"{name}>{rest}", kind)

    yield Text("\n\n", kind)
    yield from opener(dialect.block_name, ">\n")
    for call in calls:
        yield from opener(dialect.invoke_name, f' name="{call.name}">\n')
        for key, value in call.arguments:
            is_text = isinstance(value, str)
            spelled = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield from opener(
                dialect.parameter_name, f' name="{key}" string="{"true" if is_text else "false"}">{spelled}'
            )
            yield from closer(dialect.parameter_name, "\n")
        if not call.arguments:
            yield Text("\n", kind)
        yield from closer(dialect.invoke_name, "\n")
    yield from closer(dialect.block_name, "")


_RENDERERS: dict[str, Callable[[_Frame, int], Iterator[Piece]]] = {
    "system": _render_system,
    "developer": _render_developer,
    "user": _render_user,
    "assistant": _render_assistant,
    "latest_reminder": _render_reminder,
}
