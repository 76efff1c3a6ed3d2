"""Messages as a caller writes them, brought into the turns that the wire knows.

The wire has no tool role: a run of tool and user messages is one user turn of blocks, its tool
results in the order of the calls they answer.  Old reasoning falls away at a new user message
unless tools are declared.  These rules are the reference encoder's, quirks included; validation
happens here once, so that rendering cannot fail on shape.

See: docs/formats/toolcall_dsl.md, "Encoding", steps 1 to 3, and "Quirks".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolcall_dsl.errors import MessageError

Message = Mapping[str, object]

_ROLES = frozenset({"system", "developer", "user", "tool", "assistant", "latest_reminder"})
_ASKING = frozenset({"user", "developer"})


@dataclass(frozen=True)
class Block:
    """One part of a user turn: text, or the result of the call `call_id` when `is_result`."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class Call:
    """One call of an assistant turn; `arguments` are (key, JSON value) in wire order."""

    call_id: str
    name: str
    arguments: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Turn:
    """One rendered unit of a conversation; `index` is its first message's place in the caller's list."""

    index: int
    role: str
    content: str = ""
    blocks: tuple[Block, ...] = ()
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[object, ...] = ()
    response_format: object = None
    task: str | None = None
    wo_eos: bool = False
    is_context: bool = False


def turns_of(messages: Sequence[Message], *, is_context: bool = False) -> list[Turn]:
    """Validate messages and fuse runs of user and tool messages.  MessageError names index and field."""
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"{'context' if is_context else 'messages'}[{index}]"
        turn = replace(_turn(message, index, where), is_context=is_context)
        absorbs = bool(turns) and turns[-1].role == "user"
        if absorbs and turn.role == "user" and (turn.blocks[0].is_result or turns[-1].task is None):
            turns[-1] = replace(turns[-1], blocks=turns[-1].blocks + turn.blocks)
        else:
            turns.append(turn)
    return turns


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


def last_asking_index(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 if there is none."""
    return max((i for i, turn in enumerate(turns) if turn.role in _ASKING), default=-1)


def drop_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """Before the last user or developer turn, forget reasoning and leave out developer turns."""
    last = last_asking_index(turns)
    kept = []
    for index, turn in enumerate(turns):
        if index >= last:
            kept.append(turn)
        elif turn.role != "developer":
            kept.append(replace(turn, reasoning=""))
    return kept


def _turn(message: Message, index: int, where: str) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MessageError(f"{where}: unknown role {role!r}, expected one of {', '.join(sorted(_ROLES))}")
    task = _optional_text(message, "task", where)
    if role == "tool":
        block = Block(_result_text(message, where), is_result=True, call_id=_text(message, "tool_call_id", where))
        return Turn(index, "user", blocks=(block,))
    content = _text(message, "content", where)
    if role == "user":
        return Turn(index, "user", blocks=(Block(content),), task=task)
    if role == "developer" and not content:
        raise MessageError(f"{where}: a developer message needs content")
    return Turn(
        index=index,
        role=role,
        content=content,
        reasoning=_text(message, "reasoning_content", where),
        calls=_calls(message, where) if role == "assistant" else (),
        tools=_tools(message, where),
        response_format=message.get("response_format") or None,
        task=task,
        wo_eos=bool(message.get("wo_eos")),
    )


def _optional_text(message: Message, key: str, where: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise MessageError(f"{where}: {key} must be a string, not {type(value).__name__}")
    return value


def _text(message: Message, key: str, where: str) -> str:
    return _optional_text(message, key, where) or ""


def _result_text(message: Message, where: str) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return _text(message, "content", where)
    parts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise MessageError(f"{where}: each part of content must be an object")
        is_text = part.get("type") == "text"
        parts.append(_text(part, "text", where) if is_text else f"[Unsupported {part.get('type')}]")
    return "\n\n".join(parts)


def _tools(message: Message, where: str) -> tuple[object, ...]:
    tools = message.get("tools") or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise MessageError(f"{where}: tools must be a list")
    schemas = []
    for tool in tools:
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise MessageError(f"{where}: each tool must be an object with a 'function'")
        schemas.append(tool["function"])
    return tuple(schemas)


def _calls(message: Message, where: str) -> tuple[Call, ...]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"{where}: tool_calls must be a list")
    return tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls))


def _call(call: object, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise MessageError(f"{where}: a tool call must be an object with a 'function'")
    name = _text(function, "name", where)
    if not name:
        raise MessageError(f"{where}: a tool call needs a name")
    call_id = _text(call, "id", where) or _text(function, "id", where)
    return Call(call_id, name, _arguments(function.get("arguments"), where))


def _arguments(arguments: object, where: str) -> tuple[tuple[str, object], ...]:
    """Arguments as pairs; text that is no JSON object becomes one parameter named `arguments`."""
    if isinstance(arguments, Mapping):
        return tuple((str(key), value) for key, value in arguments.items())
    if not isinstance(arguments, str):
        raise MessageError(f"{where}: arguments must be a JSON string or an object")
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return (("arguments", arguments),)
    return tuple(value.items())
