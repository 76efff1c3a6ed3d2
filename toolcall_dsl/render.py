"""Turns to pieces: what each role writes, and what opens the reply to it.

All that two turns can disagree about is decided once, in `Conversation`: whose reasoning is
dropped, what the effort adds, where the last question stands.  A renderer then looks at its turn
and its neighbours only.  Every literal comes from the dialect.

See: docs/formats/toolcall_dsl.md, "Encoding".
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from toolcall_dsl.dialect import Dialect
from toolcall_dsl.errors import MessageError
from toolcall_dsl.messages import (
    Block,
    Call,
    Message,
    Turn,
    asks,
    drop_reasoning,
    last_question_index,
    sort_results,
    turns_of,
    with_request,
)
from toolcall_dsl.options import check_dialect, check_switches
from toolcall_dsl.pieces import Control, Piece, Text
from toolcall_dsl.types import SpanKind


@dataclass(frozen=True)
class Options:
    """The options of `toolcall_dsl.encode.encode`, in one value."""

    dialect: Dialect
    thinking: bool
    effort: str | int | None = None
    drop_thinking: bool = True
    add_bos: bool = True
    tools: object = None
    response_format: object = None
    train_on_assistant: bool = False

    def __post_init__(self) -> None:
        """OptionError for a dialect or a switch that is none."""
        check_dialect(self.dialect)
        check_switches(
            thinking=self.thinking,
            drop_thinking=self.drop_thinking,
            add_default_bos_token=self.add_bos,
            train_on_assistant=self.train_on_assistant,
        )


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation and what rendering one of them must know about all."""

    options: Options
    turns: Sequence[Turn]
    is_dropping: bool
    last_question: int
    effort_text: str

    @property
    def dialect(self) -> Dialect:
        """The dialect that the turns are written in."""
        return self.options.dialect


@dataclass(frozen=True)
class Rendered:
    """The pieces of one turn: `body` is the turn itself, `transition` what opens the reply to it."""

    turn: Turn
    body: tuple[Piece, ...]
    transition: tuple[Piece, ...]


def conversation_of(messages: Sequence[Message], context: Sequence[Message], options: Options) -> Conversation:
    """Validate, fuse, sort and drop.  MessageError for a conversation or an effort without encoding."""
    dialect = options.dialect
    effort_text = _effort_text(options.effort, dialect)
    turns = [*turns_of(context, dialect, is_context=True), *turns_of(messages, dialect)]
    turns = with_request(turns, options.tools, options.response_format, is_context=bool(context))
    turns = sort_results(turns)
    is_dropping = options.drop_thinking and not any(turn.tools for turn in turns)
    if options.thinking and is_dropping:
        turns = drop_reasoning(turns, dialect)
    return Conversation(
        options, turns, is_dropping, last_question_index(turns, dialect), effort_text if options.thinking else ""
    )


def rendered(conversation: Conversation) -> Iterator[Rendered]:
    """Every turn that is not context, in order."""
    for index, turn in enumerate(conversation.turns):
        if not turn.is_context:
            body = (*(_opening(conversation) if index == 0 else ()), *_RENDERERS[turn.role](conversation, index))
            yield Rendered(turn, body, tuple(_transition(conversation, index)))


def results_turn(results: Sequence[str], options: Options) -> Iterator[Piece]:
    """A user turn of results alone, and the header behind it."""
    turn = Turn(0, "user", blocks=tuple(Block(result, is_result=True) for result in results))
    conversation = Conversation(options, (turn,), is_dropping=False, last_question=-1, effort_text="")
    yield from _render_user(conversation, 0)
    yield from _transition(conversation, 0)


def header(dialect: Dialect, *, thinks: bool) -> tuple[Control, Control]:
    """What opens a reply: the assistant token, and reasoning opened or closed."""
    return Control(dialect.assistant), Control(dialect.think_open if thinks else dialect.think_close)


def task_pieces(task: str, dialect: Dialect, *, thinking: bool) -> Iterator[Piece]:
    """What asks for a Quick Instruction: its token, behind a header where the task wants one."""
    if task in dialect.tasks_after_header:
        yield from header(dialect, thinks=thinking)
    yield Control(dialect.tasks[task])


def _effort_text(effort: str | int | None, dialect: Dialect) -> str:
    wanted = dialect.default_effort if effort is None else effort
    if isinstance(wanted, bool) or not isinstance(wanted, str | int) or wanted not in dialect.efforts:
        names = [name for name in dialect.efforts if isinstance(name, str)]
        numbers = [number for number in dialect.efforts if isinstance(number, int)]
        known = [*names, f"{min(numbers)} to {max(numbers)}"] if numbers else names
        raise MessageError(
            f"reasoning_effort: {reprlib.repr(effort)} is none of {', '.join(known)} (dialect {dialect.name})"
        )
    return dialect.efforts[wanted]


def _opening(conversation: Conversation) -> Iterator[Piece]:
    """What stands before the first turn: the effort text, under the system token if there is one."""
    dialect = conversation.dialect
    if dialect.system and (conversation.effort_text or conversation.turns[0].role == "system"):
        yield Control(dialect.system)
    yield Text(conversation.effort_text, SpanKind.SYSTEM)


def _transition(conversation: Conversation, index: int) -> Iterator[Piece]:
    """What opens the next turn: nothing unless it is the model's (or a reminder, a quirk)."""
    turns, options = conversation.turns, conversation.options
    is_last = index + 1 == len(turns)
    if not is_last and turns[index + 1].role not in {"assistant", "latest_reminder"}:
        return
    task = turns[index].task
    if task is not None:
        yield from task_pieces(task, options.dialect, thinking=options.thinking)
    elif asks(turns, index, options.dialect):
        is_kept = not conversation.is_dropping or index >= conversation.last_question
        yield from header(options.dialect, thinks=options.thinking and is_kept)


def _render_system(conversation: Conversation, index: int) -> Iterator[Piece]:
    if conversation.dialect.system and index > 0:
        yield Control(conversation.dialect.system)
    yield Text(conversation.turns[index].content, SpanKind.SYSTEM)
    yield from _appendices(conversation, index)


def _render_developer(conversation: Conversation, index: int) -> Iterator[Piece]:
    yield Control(conversation.dialect.user)
    yield Text(conversation.turns[index].content, SpanKind.USER)
    yield from _appendices(conversation, index)


def _render_reminder(conversation: Conversation, index: int) -> Iterator[Piece]:
    yield Control(conversation.dialect.latest_reminder)
    yield Text(conversation.turns[index].content, SpanKind.USER)


def _render_user(conversation: Conversation, index: int) -> Iterator[Piece]:
    turn, dialect = conversation.turns[index], conversation.dialect
    mark = dialect.task_marks.get(turn.task or "")
    yield Control(dialect.user)
    for place, block in enumerate(turn.blocks):
        if place:
            yield Text("\n\n")
        if block.is_image:
            yield Control(dialect.image, SpanKind.USER)
        elif block.is_result:
            yield Text("<tool_result>")
            yield Text(block.text, SpanKind.TOOL_RESULT)
            yield Text("</tool_result>")
        elif mark is not None and mark in block.text:
            before, _, after = block.text.rpartition(mark)
            yield from (Text(before, SpanKind.USER), Control(mark), Text(after, SpanKind.USER))
        else:
            yield Text(block.text, SpanKind.USER)


def _appendices(conversation: Conversation, index: int) -> Iterator[Piece]:
    """The tools section and the response format, both SYSTEM whoever carries them."""
    turn, dialect = conversation.turns[index], conversation.dialect
    if turn.tools:
        yield Text("\n\n", SpanKind.SYSTEM)
        yield from _trusted(dialect.tools_head, dialect)
        yield Text("\n".join(turn.tools), SpanKind.SYSTEM)
        yield from _trusted(dialect.tools_tail, dialect)
    if turn.response_format is not None:
        yield Text(f"\n\n{dialect.response_format_head}{turn.response_format}", SpanKind.SYSTEM)


def _trusted(template: str, dialect: Dialect) -> Iterator[Piece]:
    controls = dialect.control_tokens
    for part in re.split("(" + "|".join(map(re.escape, controls)) + ")", template):
        yield Control(part, SpanKind.SYSTEM) if part in controls else Text(part, SpanKind.SYSTEM)


def _render_assistant(conversation: Conversation, index: int) -> Iterator[Piece]:
    """The kinds have the borders of `parse`: what closes a section belongs to it."""
    turn, dialect, options = conversation.turns[index], conversation.dialect, conversation.options
    think, text, call = (
        (SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_TEXT, SpanKind.SAMPLED_CALL)
        if options.train_on_assistant and not turn.is_masked
        else (SpanKind.FORCED, SpanKind.FORCED, SpanKind.FORCED)
    )
    answers_task = index > 0 and conversation.turns[index - 1].task is not None
    is_kept = not conversation.is_dropping or index > conversation.last_question
    if options.thinking and not answers_task and is_kept:
        yield Text(turn.reasoning, think)
        yield Control(dialect.think_close, think)
    yield Text(turn.content, text)
    if turn.calls:
        yield from _call_block(turn.calls, dialect, call)
    if not turn.wo_eos:
        yield Control(dialect.eos, call if turn.calls else text)


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
        for parameter in call.parameters:
            flag = "true" if parameter.is_string else "false"
            yield from opener(dialect.parameter_name, f' name="{parameter.name}" string="{flag}">{parameter.text}')
            yield from closer(dialect.parameter_name, "\n")
        if not call.parameters:
            yield Text("\n", kind)
        yield from closer(dialect.invoke_name, "\n")
    yield from closer(dialect.block_name, "")


_RENDERERS: dict[str, Callable[[Conversation, int], Iterator[Piece]]] = {
    "system": _render_system,
    "developer": _render_developer,
    "user": _render_user,
    "assistant": _render_assistant,
    "latest_reminder": _render_reminder,
}
