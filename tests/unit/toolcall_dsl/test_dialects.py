"""The dialects: each reproduces the vectors of its checkpoint and differs from others where its document says so."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from toolcall_dsl import (
    DIALECTS,
    V4,
    V4_0731,
    V4_1,
    Dialect,
    MessageError,
    ParseStatus,
    Tokenizer,
    TokenizerError,
    encode,
    encode_text,
    parse_text,
)

GOLDEN = Path(__file__).parents[2] / "golden/dsml"
VECTORS_0731 = {path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "encode_0731").glob("*.json"))}
SPECIAL_TOKENS = {entry["content"]: entry for entry in json.loads((GOLDEN / "special_tokens.json").read_text())}
LOOKUP = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "q"}

Case = tuple[list[dict[str, Any]], dict[str, Any], str]


def fixture_input(folder: str, number: int) -> dict[str, Any]:
    data = json.loads((GOLDEN / folder / f"test_input_{number}.json").read_text())
    return data if isinstance(data, dict) else {"messages": data}


def golden_text(name: str) -> str:
    return (GOLDEN / name).read_text()


def cases() -> dict[str, Case]:
    """Messages, options and text of every fixture that states a dialect's prompt."""
    found: dict[str, Case] = {}
    for number in range(1, 6):
        data = fixture_input("deepseek_v4", number)
        for dialect, efforts in ((V4, (None, "high")), (V4_0731, (None, "low"))):
            for effort in efforts:
                options = {"thinking": number < 4, "tools": data.get("tools"), "dialect": dialect}
                text = golden_text(f"deepseek_v4/test_output_{number}.txt")
                found[f"deepseek_v4/{number} {dialect.name} {effort}"] = (
                    data["messages"], {**options, "reasoning_effort": effort}, text
                )  # fmt: skip
        data = fixture_input("deepseek_v41", number)
        options = {
            "thinking": data.get("thinking_mode") == "thinking",
            "tools": data.get("tools"),
            "reasoning_effort": data.get("reasoning_effort"),
            "dialect": V4_1,
        }
        found[f"deepseek_v41/{number}"] = (
            data["messages"],
            options,
            golden_text(f"deepseek_v41/test_output_{number}.txt"),
        )
    developer = [
        {"role": "user", "content": "question"},
        {"role": "developer", "content": "policy", "tools": [LOOKUP]},
        {"role": "assistant", "content": "answer"},
    ]
    for folder, dialect in (("rust_renderer_v4", V4_0731), ("rust_renderer_v41", V4_1)):
        effort = "low" if dialect is V4_0731 else None
        for number in (1, 2):
            data = fixture_input("deepseek_v4", number)
            options = {"thinking": True, "tools": data.get("tools"), "reasoning_effort": effort, "dialect": dialect}
            found[f"{folder}/{number}"] = data["messages"], options, golden_text(f"{folder}/test_output_{number}.txt")
        options = {"thinking": True, "reasoning_effort": effort, "dialect": dialect}
        found[f"{folder}/developer"] = developer, options, golden_text(f"{folder}/test_output_developer_tools.txt")
    for name, vector in VECTORS_0731.items():
        request = dict(vector["input"])
        messages, thinking = request.pop("messages"), request.pop("thinking_mode") == "thinking"
        found[name] = messages, {"thinking": thinking, "dialect": V4_0731, **request}, vector["output_text"]
    return found


CASES = cases()


def ids_of(messages: list[dict[str, Any]], tokenizer: Tokenizer, options: dict[str, Any]) -> list[int]:
    return [*chain.from_iterable(segment.token_ids for segment in encode(messages, tokenizer, **options))]


def text_of(*messages: dict[str, Any], dialect: Dialect = V4_1, **options: Any) -> str:
    return encode_text(messages, dialect=dialect, **{"thinking": True, **options})


def test_there_is_a_vector_for_everything_that_was_published() -> None:
    assert len(VECTORS_0731) == 10
    assert len(CASES) == 20 + 5 + 6 + 10


@pytest.mark.parametrize("name", CASES)
def test_a_fixture_is_encoded_byte_for_byte(name: str) -> None:
    messages, options, text = CASES[name]
    assert encode_text(messages, **options) == text


@pytest.mark.parametrize("name", CASES)
def test_the_ids_of_a_fixture_are_those_of_tokenizing_it_whole(
    name: str, wide_tokenizer: Tokenizer, wide_tokenizer_file: Path
) -> None:
    messages, options, text = CASES[name]
    ids = ids_of(messages, wide_tokenizer, options)
    assert wide_tokenizer.decode(ids) == text
    assert ids == tokenizers.Tokenizer.from_file(str(wide_tokenizer_file)).encode(text, add_special_tokens=False).ids


def test_dialects_are_found_by_name() -> None:
    assert dict(DIALECTS) == {"v4": V4, "v4-0731": V4_0731, "v4.1": V4_1}


@pytest.mark.parametrize("dialect", [V4, V4_0731], ids=lambda dialect: dialect.name)
def test_the_control_tokens_are_entries_of_the_published_vocabulary(dialect: Dialect) -> None:
    assert [token for token in dialect.control_tokens if token not in SPECIAL_TOKENS] == []
    assert SPECIAL_TOKENS[dialect.bos]["id"] == 0
    assert SPECIAL_TOKENS[dialect.eos]["id"] == 1
    assert SPECIAL_TOKENS[dialect.dsml]["id"] == 128825
    assert SPECIAL_TOKENS[dialect.task_marks["read_url"]]["id"] == 128844


def test_the_system_token_is_the_only_one_that_v4_1_adds() -> None:
    assert set(V4_1.control_tokens) - set(SPECIAL_TOKENS) == {"<｜System｜>"}
    assert set(V4_1.control_tokens) - set(V4.control_tokens) == {"<｜System｜>"}


@pytest.mark.parametrize(
    ("dialect", "effort", "start"),
    [
        (V4, None, "<｜User｜>"),
        (V4, "high", "<｜User｜>"),
        (V4, "max", "Reasoning Effort: Absolute maximum"),
        (V4_0731, None, "<｜User｜>"),
        (V4_0731, "low", "<｜User｜>"),
        (V4_0731, "high", "Reasoning Effort: Absolute maximum"),
        (V4_0731, "max", "Reasoning Effort: Beyond maximum"),
        (V4_1, None, "<｜System｜>Reasoning Effort: 75 (range 1-100, the higher"),
        (V4_1, "low", "<｜System｜>Reasoning Effort: 50 (range"),
        (V4_1, "high", "<｜System｜>Reasoning Effort: 75 (range"),
        (V4_1, "xhigh", "<｜System｜>Reasoning Effort: 75 (range"),
        (V4_1, "max", "<｜System｜>Reasoning Effort: 100 (range"),
        (V4_1, 1, "<｜System｜>Reasoning Effort: 1 (range"),
        (V4_1, 42, "<｜System｜>Reasoning Effort: 42 (range"),
    ],
)
def test_an_effort_opens_a_thinking_prompt_and_no_other(dialect: Dialect, effort: Any, start: str) -> None:
    assert text_of(QUESTION, dialect=dialect, reasoning_effort=effort).startswith(dialect.bos + start)
    assert (
        text_of(QUESTION, dialect=dialect, reasoning_effort=effort, thinking=False)
        == "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜></think>"
    )


@pytest.mark.parametrize(
    ("dialect", "effort", "known"),
    [
        (V4, "low", "high, max"),
        (V4, 42, "high, max"),
        (V4_0731, "xhigh", "low, high, max"),
        (V4_1, "medium", "low, high, xhigh, max, 1 to 100"),
        (V4_1, 0, "low, high, xhigh, max, 1 to 100"),
        (V4_1, 101, "1 to 100"),
        (V4_1, True, "1 to 100"),
        (V4_1, 1.0, "1 to 100"),
        (V4_1, [], "1 to 100"),
        (V4_1, "x" * 1000, "1 to 100"),
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_an_effort_that_a_dialect_does_not_know_is_refused(
    dialect: Dialect, effort: Any, known: str, thinking: bool
) -> None:
    told = f"{known} (dialect {dialect.name})"
    with pytest.raises(MessageError, match=f"reasoning_effort: .* is none of .*{re.escape(told)}$") as caught:
        text_of(QUESTION, dialect=dialect, reasoning_effort=effort, thinking=thinking)
    assert len(str(caught.value)) < 120


def test_v4_1_marks_every_system_text_and_answers_one_behind_the_first_turn() -> None:
    system = {"role": "system", "content": "s"}
    assert text_of(system, QUESTION, system, thinking=False) == (
        "<｜begin▁of▁sentence｜><｜System｜>s<｜User｜>q<｜System｜>s<｜Assistant｜></think>"
    )
    assert text_of(system, thinking=False) == "<｜begin▁of▁sentence｜><｜System｜>s"
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert text_of(QUESTION, answer, system, reasoning_effort="low").endswith(
        "<｜User｜>q<｜Assistant｜></think>a<｜end▁of▁sentence｜><｜System｜>s<｜Assistant｜><think>"
    )


def test_v4_1_keeps_the_reasoning_of_a_turn_across_its_tool_results() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "", "reasoning_content": "r2", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "value"},
    ]
    text = text_of(*talk)
    assert "<｜User｜>q1<｜Assistant｜></think>a1<｜end▁of▁sentence｜>" in text
    assert "<｜User｜>q2<｜Assistant｜><think>r2</think>" in text
    assert text.endswith("<tool_result>value</tool_result><｜Assistant｜><think>")
    assert "r2" not in text_of(*talk, QUESTION)
    assert "r2" not in text_of(*talk, dialect=V4)


def test_v4_1_reads_the_content_blocks_of_a_user_message() -> None:
    blocks = [
        {"type": "text", "text": "b"},
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "x"}, {"type": "audio"}]},
        {"type": "image_url", "image_url": {"url": "u"}},
    ]
    message = {"role": "user", "content": "c", "content_blocks": blocks}
    assert text_of(message, thinking=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>b\n\n<tool_result>x\n\n[Unsupported audio]</tool_result>\n\n"
        "<｜deepseek_image｜><｜Assistant｜></think>"
    )
    assert "<｜User｜>c<" in text_of({**message, "content_blocks": []}, thinking=False)
    assert "<｜User｜>c<" in text_of(message, thinking=False, dialect=V4)


def test_tools_of_a_user_message_are_never_written_and_keep_reasoning_in_v4_1_only() -> None:
    talk = [
        {"role": "user", "content": "q1", "tools": [LOOKUP]},
        {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
        QUESTION,
    ]
    assert "r1</think>a1" in text_of(*talk)
    assert "lookup" not in text_of(*talk)
    assert "r1" not in text_of(*talk, dialect=V4)


def test_arguments_that_were_made_json_twice_are_read_in_v4_1_only() -> None:
    def text(arguments: str, dialect: Dialect) -> str:
        call = {"function": {"name": "f", "arguments": arguments}}
        return text_of({"role": "assistant", "content": "", "tool_calls": [call]}, dialect=dialect, thinking=False)

    twice = json.dumps(json.dumps({"a": 1}))
    assert 'name="a" string="false">1<' in text(twice, V4_1)
    assert f'name="arguments" string="true">{twice}<' in text(twice, V4)
    assert 'name="arguments" string="true">"plain"<' in text('"plain"', V4_1)


def test_images_become_ids_only_where_the_vocabulary_has_the_placeholder(
    tokenizer: Tokenizer, wide_tokenizer: Tokenizer
) -> None:
    message = {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": V4.image}]}
    ids = ids_of([message], wide_tokenizer, {"thinking": False})
    assert ids.count(wide_tokenizer.control(V4.image)) == 1
    with pytest.raises(TokenizerError, match="<｜deepseek_image｜>"):
        encode([message], tokenizer, thinking=False)


def test_the_system_token_is_needed_only_where_it_is_written(tokenizer: Tokenizer) -> None:
    assert encode([QUESTION], tokenizer, thinking=False, dialect=V4_1)
    with pytest.raises(TokenizerError, match="<｜System｜>"):
        encode([QUESTION], tokenizer, thinking=True, dialect=V4_1)


def test_a_block_tag_of_another_name_in_a_value_is_text_to_strict_and_its_end_to_tolerant() -> None:
    text = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="c" string="true">'
        "one<｜DSML｜toolcalls>two</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    (strict,) = parse_text(text, thinking=False).calls
    (tolerant,) = parse_text(text, thinking=False, policy="tolerant").calls
    assert (strict.arguments, strict.status) == ({"c": "one<｜DSML｜toolcalls>two"}, ParseStatus.OK)
    assert (tolerant.arguments, tolerant.status) == ({"c": "one"}, ParseStatus.RECOVERED)
