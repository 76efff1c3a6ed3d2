"""Messages as a caller writes them, brought into the turns that the wire knows.

The wire has no tool role: a run of tool and user messages is one user turn of blocks, its tool
results in the order of the calls they answer.  Old reasoning falls away at a new question
unless tools are declared.  These rules are the reference encoder's, quirks included; validation
happens here once and what is JSON on the wire is spelled here, so that rendering cannot fail.

See: docs/formats/toolcall_dsl.md, "Messages", "Encoding" and "Quirks".
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolcall_dsl.dialect import Dialect
from toolcall_dsl.errors import MessageError

Message = Mapping[str, object]

FIELDS = frozenset(
    {"role", "content", "content_blocks", "reasoning_content", "reasoning", "tool_calls", "tool_call_id"}
    | {"tools", "response_format", "task", "wo_eos", "mask"}
)
"""Every field of a message that is read."""

_ROLES = frozenset({"system", "developer", "user", "tool", "assistant", "latest_reminder"})
_IMAGES = ("image", "image_url")
_INSTEAD_OF_CONTENT = {
    "system": ("tools", "response_format"),
    "assistant": ("tool_calls", "reasoning_content", "reasoning"),
}
"""What a message of a role may hold instead of content."""


@dataclass(frozen=True)
class Block:
    """One part of a user turn: text, an image, or the result of the call `call_id` when `is_result`."""

    text: str
    is_result: bool = False
    is_image: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class Parameter:
    """One argument as the wire spells it: raw text when `is_string`, else JSON."""

    name: str
    text: str
    is_string: bool


@dataclass(frozen=True)
class Call:
    """One call of an assistant turn, its parameters in wire order."""

    call_id: str
    name: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Turn:
    """One rendered unit of a conversation.

    `index` is its first message's place in the caller's list, -1 for a turn that no message wrote.
    `tools` and `response_format` are JSON texts.
    """

    index: int
    role: str
    content: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[str, ...] = ()
    response_format: str | None = None
    task: str | None = None
    wo_eos: bool = False
    is_masked: bool = False
    is_context: bool = False


def turns_of(messages: Sequence[Message], dialect: Dialect, *, is_context: bool = False) -> list[Turn]:
    """Validate messages and fuse runs of user and tool messages.  MessageError names index and field."""
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"{'context' if is_context else 'messages'}[{index}]"
        if not isinstance(message, Mapping):
            raise MessageError(f"{where}: a message must be an object, not {type(message).__name__}")
        turn = _turn(message, index, where, dialect)
        _require_content(message, where, dialect)
        turn = replace(turn, is_context=True) if is_context else turn
        absorbs = bool(turns) and turns[-1].role == turn.role == "user"
        if absorbs and (message["role"] == "tool" or turns[-1].task is None):
            turns[-1] = replace(turns[-1], blocks=turns[-1].blocks + turn.blocks)
        else:
            turns.append(turn)
    return turns


def with_request(turns: list[Turn], tools: object, response_format: object, *, is_context: bool) -> list[Turn]:
    """Give what the request declares to the first system turn, or to an empty one put first.  MessageError."""
    schemas, wanted = _tools(tools, "request"), _response_format(response_format, "request")
    if not schemas and wanted is None:
        return turns
    place = next((i for i, turn in enumerate(turns) if turn.role == "system"), None)
    if place is None:
        return [Turn(-1, "system", tools=schemas, response_format=wanted, is_context=is_context), *turns]
    system = turns[place]
    if (schemas and system.tools) or (wanted is not None and system.response_format is not None):
        field = "tools" if schemas and system.tools else "response_format"
        raise MessageError(f"request: {field} are declared here and by the first system message: declare them once")
    declared = replace(
        system, tools=schemas or system.tools, response_format=system.response_format if wanted is None else wanted
    )
    return [*turns[:place], declared, *turns[place + 1 :]]


def sort_results(turns: Sequence[Turn]) -> list[Turn]:
    """Order the results inside each user turn by the calls of the assistant turn before it (stable)."""
    order: dict[str, int] = {}
    sorted_turns = []
    for turn in turns:
        if turn.calls:
            order = {call.call_id: place for place, call in enumerate(turn.calls) if call.call_id}
        results = [block for block in turn.blocks if block.is_result]
        if len(results) > 1 and order:
            ranked = iter(sorted(results, key=lambda block: order.get(block.call_id, 0)))
            blocks = tuple(next(ranked) if block.is_result else block for block in turn.blocks)
            sorted_turns.append(replace(turn, blocks=blocks))
        else:
            sorted_turns.append(turn)
    return sorted_turns


def asks(turns: Sequence[Turn], index: int, dialect: Dialect) -> bool:
    """Whether the model answers this turn: questions, and in some dialects a system message behind the first turn."""
    role = turns[index].role
    return role in {"user", "developer"} or (role == "system" and index > 0 and dialect.mid_system_asks)


def last_question_index(turns: Sequence[Turn], dialect: Dialect) -> int:
    """Index of the turn before which old reasoning is dropped, -1 if there is none."""
    for index in reversed(range(len(turns))):
        blocks = turns[index].blocks
        is_question = dialect.results_ask or not blocks or not all(block.is_result for block in blocks)
        if asks(turns, index, dialect) and is_question:
            return index
    return -1


def drop_reasoning(turns: Sequence[Turn], dialect: Dialect) -> list[Turn]:
    """Before the last question, forget reasoning and leave out developer turns."""
    last = last_question_index(turns, dialect)
    kept = []
    for index, turn in enumerate(turns):
        if index >= last:
            kept.append(turn)
        elif turn.role != "developer":
            kept.append(replace(turn, reasoning=""))
    return kept


def _turn(message: Message, index: int, where: str, dialect: Dialect) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MessageError(f"{where}: unknown role {reprlib.repr(role)}, expected one of {', '.join(sorted(_ROLES))}")
    if role == "tool":
        block = Block(_result_text(message, where), is_result=True, call_id=_text(message, "tool_call_id", where))
        return Turn(index, "user", blocks=(block,))
    task = _task(message, where, dialect)
    if role == "user":
        kept = dialect.user_fields_kept
        return Turn(
            index=index,
            role=role,
            blocks=_blocks(message, where, kept=kept),
            tools=_tools(message.get("tools"), where) if kept else (),
            task=task,
        )
    content = _content(message, where)
    if role == "developer" and not content:
        raise MessageError(f"{where}: a developer message needs content")
    return Turn(
        index=index,
        role=role,
        content=content,
        reasoning=_text(message, _reasoning_key(message), where),
        calls=_calls(message, where, dialect) if role == "assistant" else (),
        tools=_tools(message.get("tools"), where),
        response_format=_response_format(message.get("response_format"), where),
        task=task,
        wo_eos=bool(message.get("wo_eos")),
        is_masked=bool(message.get("mask")),
    )


def _require_content(message: Message, where: str, dialect: Dialect) -> None:
    """A message that says nothing at all is a mistake (a misspelled field); empty or null content is said."""
    role = str(message["role"])
    instead = ("content_blocks",) if role == "user" and dialect.user_fields_kept else _INSTEAD_OF_CONTENT.get(role, ())
    if "content" not in message and not any(message.get(key) for key in instead):
        either = " or ".join(("content", *instead))
        raise MessageError(f"{where}: a message of the role {role} needs {either}")


def _text(message: Message, key: str, where: str) -> str:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise MessageError(f"{where}: {key} must be a string, not {type(value).__name__}")
    return value or ""


def _reasoning_key(message: Message) -> str:
    """VLLM's fixtures and API say `reasoning`; DeepSeek's name comes first."""
    return "reasoning" if message.get("reasoning_content") is None else "reasoning_content"


def _task(message: Message, where: str, dialect: Dialect) -> str | None:
    task = _text(message, "task", where) or None
    if task is not None and task not in dialect.tasks:
        raise MessageError(f"{where}: unknown task {reprlib.repr(task)}, expected one of {', '.join(dialect.tasks)}")
    return task


def _parts(message: Message, key: str, where: str) -> list[Message]:
    parts = message.get(key)
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise MessageError(f"{where}: each part of {key} must be an object")
    return parts


def _content(message: Message, where: str) -> str:
    """Content that can only be text: a string, or text parts joined by blank lines."""
    if not isinstance(message.get("content"), list):
        return _text(message, "content", where)
    parts = _parts(message, "content", where)
    for part in parts:
        if part.get("type") != "text":
            raise MessageError(
                f"{where}: a part of type {reprlib.repr(part.get('type'))} has no encoding here, only text has"
            )
    return "\n\n".join(_text(part, "text", where) for part in parts)


def _result_text(message: Message, where: str) -> str:
    if not isinstance(message.get("content"), list):
        return _text(message, "content", where)
    return "\n\n".join(_result_part(part, where) for part in _parts(message, "content", where))


def _result_part(part: Message, where: str) -> str:
    kind = _text(part, "type", where)
    return _text(part, "text", where) if kind == "text" else f"[Unsupported {kind or None}]"


def _blocks(message: Message, where: str, *, kept: bool) -> tuple[Block, ...]:
    """The blocks of a user message; `content_blocks` count only where the dialect keeps them."""
    if kept and message.get("content_blocks"):
        return tuple(_kept_block(part, where) for part in _parts(message, "content_blocks", where))
    if isinstance(message.get("content"), list):
        blocks = tuple(_block(part, where) for part in _parts(message, "content", where))
        return blocks or (Block(""),)
    return (Block(_text(message, "content", where)),)


def _block(part: Message, where: str) -> Block:
    kind = part.get("type")
    if kind == "text":
        return Block(_text(part, "text", where))
    if kind in _IMAGES:
        return Block("", is_image=True)
    raise MessageError(f"{where}: a part of type {reprlib.repr(kind)} has no encoding here, only text and images have")


def _kept_block(part: Message, where: str) -> Block:
    if part.get("type") == "tool_result":
        return Block(_result_text(part, where), is_result=True, call_id=_text(part, "tool_use_id", where))
    return _block(part, where)


def _tools(tools: object, where: str) -> tuple[str, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise MessageError(f"{where}: tools must be a list")
    schemas = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise MessageError(f"{where}: each tool must be an object with a 'function'")
        schemas.append(_json(function, f"{where}: a tool"))
    return tuple(schemas)


def _response_format(value: object, where: str) -> str | None:
    return _json(value, f"{where}: response_format") if value else None


def _json(value: object, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"{what} is not JSON: {error}") from error


def _calls(message: Message, where: str, dialect: Dialect) -> tuple[Call, ...]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"{where}: tool_calls must be a list")
    return tuple(_call(call, f"{where}.tool_calls[{i}]", dialect) for i, call in enumerate(calls))


def _call(call: object, where: str, dialect: Dialect) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise MessageError(f"{where}: a tool call must be an object with a 'function'")
    name = _text(function, "name", where)
    if not name:
        raise MessageError(f"{where}: a tool call needs a name")
    call_id = _text(call, "id", where) or _text(function, "id", where)
    arguments = _arguments(function.get("arguments"), where, dialect.argument_decodings)
    parameters = [
        Parameter(str(key), value, is_string=True)
        if isinstance(value, str)
        else Parameter(str(key), _json(value, f"{where}: argument {reprlib.repr(key)}"), is_string=False)
        for key, value in arguments.items()
    ]
    return Call(call_id, name, tuple(parameters))


def _arguments(arguments: object, where: str, decodings: int) -> Mapping[str, object]:
    """Arguments as an object; text that holds no JSON object becomes one argument named `arguments`."""
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        raise MessageError(f"{where}: arguments must be a JSON string or an object")
    value: object = arguments
    for _ in range(decodings):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            break
    return value if isinstance(value, dict) else {"arguments": arguments}
