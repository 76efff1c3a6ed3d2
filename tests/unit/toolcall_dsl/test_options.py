"""Options: what means nothing is refused at once, by name, and never read as the forgiving choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from toolcall_dsl import (
    V4,
    DslError,
    OptionError,
    StreamParser,
    Tokenizer,
    ToolCall,
    ToolChecker,
    check_call,
    encode,
    encode_appended,
    encode_results,
    encode_text,
    parse,
    parse_text,
)
from toolcall_dsl.quick import instruction, read_answer, shared_prefix

TALK = [{"role": "user", "content": "q"}]
Use = Callable[..., object]


def uses(tokenizer: Tokenizer) -> dict[str, Use]:
    """Every function that takes options, with all else given."""
    return {
        "parse": lambda **options: parse([], tokenizer, **{"thinking": False, **options}),
        "parse_text": lambda **options: parse_text("", **{"thinking": False, **options}),
        "StreamParser": lambda **options: StreamParser(**{"thinking": False, **options}),
        "check": lambda **options: ToolChecker([]).check(ToolCall("f", {}), **options),
        "check_call": lambda **options: check_call(ToolCall("f", {}), [], **options),
        "encode": lambda **options: encode(TALK, tokenizer, **{"thinking": False, **options}),
        "encode_text": lambda **options: encode_text(TALK, **{"thinking": False, **options}),
        "encode_appended": lambda **options: encode_appended([], TALK, tokenizer, **{"thinking": False, **options}),
        "encode_results": lambda **options: encode_results(["r"], tokenizer, **{"thinking": False, **options}),
        "instruction": lambda **options: instruction("query", **{"thinking": False, **options}),
        "shared_prefix": lambda **options: shared_prefix([], tokenizer, **options),
        "read_answer": lambda **options: read_answer("query", [], tokenizer, **options),
    }


READERS = ["parse", "parse_text", "StreamParser"]
WRITERS = ["encode", "encode_text", "encode_appended", "encode_results", "instruction"]


@pytest.mark.parametrize("policy", ["Strict", "tolerent", "", None, True, ["strict"]])
@pytest.mark.parametrize("name", [*READERS, "check", "check_call"])
def test_a_policy_that_is_none_of_the_two_is_refused_and_the_two_are_named(
    name: str, policy: object, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=r"policy: .* is none of 'strict', 'tolerant'$"):
        uses(tokenizer)[name](policy=policy)


@pytest.mark.parametrize("thinking", ["chat", "thinking", 1, 0, None])
@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_a_word_or_a_number_is_no_thinking_mode(name: str, thinking: object, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^thinking: .* is neither True nor False$"):
        uses(tokenizer)[name](thinking=thinking)


@pytest.mark.parametrize("switch", ["drop_thinking", "add_default_bos_token", "train_on_assistant"])
def test_the_other_switches_are_on_or_off(switch: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match=rf"^{switch}: 'no' is neither True nor False$"):
        uses(tokenizer)["encode"](**{switch: "no"})


@pytest.mark.parametrize("dialect", ["v4.1", "v9", None, 4])
@pytest.mark.parametrize("name", [*READERS, *WRITERS, "shared_prefix", "read_answer"])
def test_a_name_is_no_dialect_and_is_told_where_the_dialects_are(
    name: str, dialect: object, tokenizer: Tokenizer
) -> None:
    with pytest.raises(OptionError, match=r"is no Dialect; DIALECTS\[name\] has 'v4', 'v4-0731', 'v4.1'$"):
        uses(tokenizer)[name](dialect=dialect)


@pytest.mark.parametrize("tools", [{"name": "f"}, "f", ["f"], 3])
@pytest.mark.parametrize("name", READERS)
def test_tools_that_are_no_list_of_objects_are_refused(name: str, tools: object, tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="tools: must be a list of objects"):
        uses(tokenizer)[name](tools=tools)


def test_a_wrong_option_is_an_error_of_the_language_and_a_value_error() -> None:
    with pytest.raises(DslError) as caught:
        parse_text("", thinking=cast("Any", "chat"))
    assert isinstance(caught.value, ValueError)
    assert caught.value.code == "BAD_OPTION"


def test_a_dialect_is_shown_by_its_name() -> None:
    assert repr(V4) == "<Dialect v4>"
