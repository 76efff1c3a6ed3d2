"""Appending to an encoded prefix: what is new, or which message would be rewritten and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolcall_dsl import (
    V4,
    V4_1,
    AppendError,
    DslError,
    MessageError,
    Tokenizer,
    encode,
    encode_appended,
    token_ids_of,
)
from toolcall_dsl.append import REASONS

DOCUMENT = Path(__file__).parents[3] / "docs/formats/toolcall_dsl.md"
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def user(content: str = "q", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def said(content: str = "a", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": "r", **fields}


def system(content: str = "s", **fields: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **fields}


def developer(content: str = "d", **fields: Any) -> dict[str, Any]:
    return {"role": "developer", "content": content, **fields}


def called(*call_ids: str) -> dict[str, Any]:
    return said("", tool_calls=[{"id": call_id, "function": {"name": "f", "arguments": "{}"}} for call_id in call_ids])


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": f"<{call_id}>"}


REMINDER = {"role": "latest_reminder", "content": "today"}


APPENDS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]] = {
    "nothing to nothing": ([], [], {}),
    "a beginning": ([], [system(), user()], {"reasoning_effort": "max"}),
    "nothing": ([user()], [], {}),
    "an answer": ([user()], [said()], {}),
    "a reminder behind the header": ([user()], [REMINDER, said()], {}),
    "a question where reasoning is kept": ([user(), said()], [user()], {"drop_thinking": False}),
    "a question in chat mode": ([user(), said()], [user()], {"thinking": False}),
    "a question where tools are declared": ([system(tools=TOOLS), user(), said()], [user()], {}),
    "a question where the request declares tools": ([system(), user(), said()], [user()], {"tools": TOOLS}),
    "results of calls": ([system(tools=TOOLS), user(), called("c0", "c1")], [result("c1"), result("c0")], {}),
    "results alone, without tools": ([user(), called("c")], [result("c"), said()], {"dialect": V4_1}),
    "a second answer": ([user(), said()], [said("b")], {}),
    "a question behind a system message": ([system()], [user()], {}),
    "an answer to an instruction": ([user(task="query")], [said("x")], {}),
    "more behind a prefill": ([user(), said("one", wo_eos=True)], [user()], {"thinking": False}),
    "a first question behind a developer message": ([user(), said(), developer()], [said()], {"thinking": False}),
}

REFUSALS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any], str, int]] = {
    "a question to a question": ([user("q1")], [user("q2")], {}, "turn-joined", 0),
    "one more result": ([user(), called("a", "b"), result("a")], [result("b")], {"tools": TOOLS}, "turn-joined", 2),
    "a result of an earlier call": (
        [user(), called("a", "b"), result("b")], [result("a")], {"tools": TOOLS}, "results-sorted", 2
    ),
    "a system message behind a header": ([user()], [system()], {}, "header-written", 0),
    "a question behind an instruction": ([user(task="query")], [user()], {"thinking": False}, "header-written", 0),
    "a question behind a title": ([user(), said(task="title")], [user()], {"thinking": False}, "header-written", 1),
    "a question behind a system message that is answered": (
        [user(), said(), system()], [user()], {"dialect": V4_1, "thinking": False}, "header-written", 2
    ),
    "a question that drops reasoning": ([user(), said(), user("q1"), said()], [user()], {}, "reasoning-dropped", 2),
    "a header that opened reasoning": ([user()], [said(), user()], {}, "reasoning-dropped", 0),
    "an answer without question": ([said()], [user()], {}, "reasoning-dropped", 0),
    "a result that counts as question": ([user(), called("c")], [result("c")], {}, "reasoning-dropped", 0),
    "tools declared late": ([user(), said(), user()], [said(), system(tools=TOOLS)], {}, "reasoning-restored", 0),
    "a developer message left behind": ([developer(), said()], [user()], {}, "developer-dropped", 0),
    "a system message that takes the tools": ([user(), said()], [system()], {"tools": TOOLS}, "tools-moved", -1),
    "a text that runs on": ([user(), said(), system("a)")], [system("</b")], {"thinking": False}, "tokens-merged", 2),
    "a prefill that runs on": (
        [user(), said("f(x)", wo_eos=True)], [said("</code>")], {"thinking": False}, "tokens-merged", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APPENDS)
def test_what_is_appended_completes_the_prefix(name: str, wide_tokenizer: Tokenizer) -> None:
    prefix, new, options = APPENDS[name]
    options = {"thinking": True, **options}
    tail = token_ids_of(encode_appended(prefix, new, wide_tokenizer, **options))
    head = token_ids_of(encode(prefix, wide_tokenizer, **options))
    assert head + tail == token_ids_of(encode([*prefix, *new], wide_tokenizer, **options))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_be_rewritten_is_named(name: str, wide_tokenizer: Tokenizer) -> None:
    prefix, new, options, reason, index = REFUSALS[name]
    options = {"thinking": True, **options}
    with pytest.raises(AppendError) as caught:
        encode_appended(prefix, new, wide_tokenizer, **options)
    assert (caught.value.reason, caught.value.index) == (reason, index)
    where = "request" if index < 0 else f"messages[{index}]"
    assert str(caught.value) == f"{where}: {REASONS[reason]}"
    head, whole = (token_ids_of(encode(talk, wide_tokenizer, **options)) for talk in (prefix, [*prefix, *new]))
    assert whole[: len(head)] != head


def test_every_reason_has_its_example_and_its_line_in_the_document() -> None:
    assert {reason for _, _, _, reason, _ in REFUSALS.values()} == set(REASONS)
    assert [reason for reason in REASONS if f"| `{reason}` |" not in DOCUMENT.read_text()] == []


def test_a_refusal_is_an_error_of_the_language(tokenizer: Tokenizer) -> None:
    with pytest.raises(DslError):
        encode_appended([user()], [user()], tokenizer, thinking=True)
    assert (AppendError.code, AppendError.retryable, AppendError.fault) == ("NOT_APPENDABLE", False, "caller")


def test_what_is_appended_knows_what_it_is(tokenizer: Tokenizer) -> None:
    segments = encode_appended([user()], [said(), user()], tokenizer, thinking=False, train_on_assistant=True)
    assert [(segment.kind, segment.trainable) for segment in segments] == [
        ("SAMPLED_TEXT", True), ("TEMPLATE", False), ("USER", False), ("TEMPLATE", False),
    ]  # fmt: skip


def test_a_message_without_encoding_is_named_by_its_place_in_the_whole(tokenizer: Tokenizer) -> None:
    with pytest.raises(MessageError, match=r"messages\[1\]: unknown role"):
        encode_appended([user()], [{"role": "robot"}], tokenizer, thinking=False, dialect=V4)
