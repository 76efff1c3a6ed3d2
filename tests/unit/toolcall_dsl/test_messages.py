"""Messages: the shapes that are understood, what a request declares, and the complaint about each other shape."""

from __future__ import annotations

from typing import Any

import pytest

from toolcall_dsl import V4_1, MessageError, encode_text, parse_text


def test_reasoning_has_two_names() -> None:
    def text(**fields: Any) -> str:
        message = {"role": "assistant", "content": "a", **fields}
        return encode_text([{"role": "user", "content": "q"}, message], thinking=True)

    assert text(reasoning="r") == text(reasoning_content="r")
    assert text(reasoning_content="r", reasoning="other") == text(reasoning_content="r")
    assert text(reasoning_content=None, reasoning="r") == text(reasoning_content="r")
    assert text(reasoning_content="", reasoning="r") == text(reasoning_content="")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "latest_reminder"])
def test_content_may_be_a_list_of_texts(role: str) -> None:
    def text(content: object) -> str:
        return encode_text([{"role": role, "content": content}], thinking=False)

    assert text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == text("a\n\nb")


def test_what_is_no_text_in_a_result_is_named_by_its_type() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "audio"}, {}, {"type": "text"}]
    text = encode_text([{"role": "tool", "content": parts}], thinking=False)
    assert "<tool_result>a\n\n[Unsupported audio]\n\n[Unsupported None]\n\n</tool_result>" in text


def test_an_empty_list_is_an_empty_message() -> None:
    assert encode_text([{"role": "user", "content": []}], thinking=False) == encode_text(
        [{"role": "user", "content": ""}], thinking=False
    )


@pytest.mark.parametrize("given", ["tools", "response_format"])
def test_what_the_request_declares_belongs_to_the_first_system_message(
    given: str, tools: list[dict[str, object]]
) -> None:
    declared: dict[str, Any] = {given: tools if given == "tools" else {"type": "json"}}
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
    later = {"role": "system", "content": "later"}
    for before, after in (
        ([system, user, later], [{**system, **declared}, user, later]),
        ([user, later], [user, {**later, **declared}]),
        ([user], [{"role": "system", **declared}, user]),
        ([], [{"role": "system", **declared}]),
    ):
        assert encode_text(before, thinking=True, **declared) == encode_text(after, thinking=True)
    assert encode_text([user], thinking=True, tools=[], response_format={}) == encode_text([user], thinking=True)


def test_the_tools_of_a_request_keep_reasoning_and_stand_in_the_context(tools: list[dict[str, object]]) -> None:
    talk = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "user", "content": "q2"},
    ]
    assert "r</think>a" in encode_text(talk, thinking=True, tools=tools)
    assert encode_text(talk[2:], thinking=True, tools=tools, context=talk[:2]) == "<｜User｜>q2<｜Assistant｜><think>"


@pytest.mark.parametrize("given", ["tools", "response_format"])
def test_what_request_and_system_message_both_declare_is_refused(given: str, tools: list[dict[str, object]]) -> None:
    declared: dict[str, Any] = {given: tools if given == "tools" else {"type": "json"}}
    with pytest.raises(MessageError, match=f"request: {given} are declared here and by the first system message"):
        encode_text([{"role": "system", "content": "", **declared}], thinking=True, **declared)


def test_request_and_system_message_may_declare_different_things(tools: list[dict[str, object]]) -> None:
    whole = {"role": "system", "content": "", "tools": tools, "response_format": {"type": "json"}}
    for name in ("tools", "response_format"):
        rest = {key: value for key, value in whole.items() if key != name}
        assert encode_text([rest], thinking=True, **{name: whole[name]}) == encode_text([whole], thinking=True)


def test_tools_on_a_user_message_are_ignored(tools: list[dict[str, object]]) -> None:
    talk = [
        {"role": "user", "content": "q1", "tools": tools},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "user", "content": "q2"},
    ]
    assert encode_text(talk, thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>q1<｜Assistant｜></think>a<｜end▁of▁sentence｜>"
        "<｜User｜>q2<｜Assistant｜><think>"
    )


@pytest.mark.parametrize("arguments", ["not json", "[1, 2]", '"text"', "3", "[" * 100_000])
def test_arguments_that_are_no_object_become_one_parameter(arguments: str) -> None:
    call = {"function": {"name": "bash", "arguments": arguments}}
    text = encode_text([{"role": "assistant", "content": "", "tool_calls": [call]}], thinking=False)
    assert f'name="arguments" string="true">{arguments}</｜DSML｜parameter>' in text


def test_arguments_may_be_an_object() -> None:
    def text(arguments: object) -> str:
        call = {"function": {"name": "f", "arguments": arguments}}
        return encode_text([{"role": "assistant", "content": None, "tool_calls": [call]}], thinking=False)

    assert text({"a": "é", "b": [1, None]}) == text('{"a": "é", "b": [1, null]}')


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "robot", "content": "x"}, "messages[0]: unknown role 'robot'"),
        ({"content": "x"}, "messages[0]: unknown role None"),
        ({"role": ["user"], "content": "x"}, "messages[0]: unknown role"),
        ({"role": "user", "content": 3}, "messages[0]: content must be a string, not int"),
        ({"role": "direct_search_results", "content": "x"}, "messages[0]: unknown role 'direct_search_results'"),
        ({"role": "x" * 10_000}, "unknown role 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
        (["user"], "messages[0]: a message must be an object, not list"),
        ({"role": "user", "content": {"type": "text"}}, "content must be a string, not dict"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a part of type 'audio' has no encoding here"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages[0]: text must be a string"),
        (
            {"role": "system", "content": [{"type": "image_url"}]},
            "type 'image_url' has no encoding here, only text has",
        ),
        ({"role": "assistant", "content": ["x"]}, "messages[0]: each part of content must be an object"),
        ({"role": "assistant", "content": "", "reasoning": 3}, "messages[0]: reasoning must be a string, not int"),
        (
            {"role": "system", "tools": [{"function": {"name": {1, 2}}}]},
            "messages[0]: a tool is not JSON: Object of type set",
        ),
        ({"role": "system", "response_format": {"a": b"x"}}, "messages[0]: response_format is not JSON"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": b"x"}}}]},
            "messages[0].tool_calls[0]: argument 'a' is not JSON",
        ),
        ({"role": "user", "content": "x", "task": "dance"}, "messages[0]: unknown task 'dance'"),
        ({"role": "developer", "content": ""}, "messages[0]: a developer message needs content"),
        ({"role": "system", "content": "", "tools": "bash"}, "messages[0]: tools must be a list"),
        ({"role": "system", "content": "", "tools": [{"name": "f"}]}, "each tool must be an object with a 'function'"),
        ({"role": "system", "tools": [{"function": "f"}]}, "each tool must be an object with a 'function'"),
        ({"role": "tool", "content": [{"type": ["x"]}]}, "messages[0]: type must be a string, not list"),
        ({"role": "tool", "content": ["x"]}, "messages[0]: each part of content must be an object"),
        ({"role": "user", "contents": "x"}, "messages[0]: a message of the role user needs content"),
        ({"role": "user", "content_blocks": [{"type": "text", "text": "x"}]}, "the role user needs content"),
        ({"role": "system"}, "messages[0]: a message of the role system needs content or tools or response_format"),
        ({"role": "system", "tools": []}, "messages[0]: a message of the role system needs content"),
        ({"role": "tool", "tool_call_id": "c"}, "messages[0]: a message of the role tool needs content"),
        ({"role": "latest_reminder"}, "messages[0]: a message of the role latest_reminder needs content"),
        ({"role": "assistant", "tool_calls": []}, "needs content or tool_calls or reasoning_content or reasoning"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[0]: tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "messages[0].tool_calls[0]: a tool call must be"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, "a tool call needs a name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "arguments must be a JSON string"),
    ],
)
def test_a_message_that_cannot_be_encoded_is_named(message: Any, complaint: str) -> None:
    with pytest.raises(MessageError) as caught:
        encode_text([message], thinking=False)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "user", "content": ""},
        {"role": "system", "response_format": {"type": "json"}},
        {"role": "assistant", "reasoning": "r"},
        {"role": "assistant", "content": None},
    ],
)
def test_a_message_may_say_that_it_is_empty_or_hold_something_else(message: Any) -> None:
    assert encode_text([message], thinking=False)


def test_blocks_are_content_where_the_dialect_keeps_them() -> None:
    message = {"role": "user", "content_blocks": [{"type": "text", "text": "x"}]}
    assert "<｜User｜>x" in encode_text([message], thinking=False, dialect=V4_1)


def test_the_second_message_that_lacks_content_is_named_by_its_place() -> None:
    with pytest.raises(MessageError, match=r"^messages\[1\]: "):
        encode_text([{"role": "user", "content": "x"}, {"role": "user"}], thinking=False)


def test_numbers_that_json_lacks_are_written_and_not_read_back() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": [NaN, -Infinity]}'}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = encode_text(messages, thinking=False).partition("</think>")[2]
    assert '<｜DSML｜parameter name="a" string="false">[NaN, -Infinity]</｜DSML｜parameter>' in text
    error = parse_text(text, thinking=False).error
    assert error is not None
    assert error.rule == "bad-json"
