"""Parsing: every vector, what counts as a marker, spans, values, and the errors a model reads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from toolcall_dsl import (
    DIALECTS,
    RULES,
    V4,
    ParsedTurn,
    ParseStatus,
    Policy,
    SpanKind,
    Tokenizer,
    ToolCall,
    parse,
    parse_text,
)
from toolcall_dsl.testing import sampled_ids

GOLDEN = Path(__file__).parents[2] / "golden/dsml/parse"
STRICT = {case["id"]: case for case in json.loads((GOLDEN / "reference_strict.json").read_text())}
TOLERANT = {case["id"]: case for case in json.loads((GOLDEN / "tolerant_expected.json").read_text())}
OPEN = {case["id"]: case for case in map(json.loads, (GOLDEN / "open.jsonl").read_text().splitlines())}
REPLAY = {case["id"]: case for case in json.loads((GOLDEN / "grammar_replay.json").read_text())}
POLICIES: tuple[Policy, ...] = get_args(Policy)
EOS = "<｜end▁of▁sentence｜>"

RULE_OF_VECTOR = {
    "value_with_real_closer_HAZARD": "malformed-parameter",
    "missing_eos_plain": "missing-eos",
    "missing_think_close": "missing-think-close",
    "tool_inside_think": "call-inside-reasoning",
    "text_after_block": "text-after-block",
    "duplicate_param": "duplicate-parameter",
    "missing_string_attr": "malformed-parameter",
    "bad_string_attr": "malformed-parameter",
    "single_newline_before_block": "block-not-opened",
    "no_newlines_before_block": "block-not-opened",
    "v32_function_calls_wrapper": "block-not-opened",
    "orphan_invoke": "block-not-opened",
    "missing_invoke_close": "malformed-parameter",
    "missing_block_close": "truncated-call",
    "invalid_json_false": "bad-json",
    "dsml_token_in_content": "block-not-opened",
}


def block(*invokes: str) -> str:
    return "\n\n<｜DSML｜tool_calls>\n" + "".join(invokes) + "</｜DSML｜tool_calls>"


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + ("".join(parameters) or "\n") + "</｜DSML｜invoke>\n"


def parameter(name: str, value: str, *, string: bool = True) -> str:
    flag = "true" if string else "false"
    return f'<｜DSML｜parameter name="{name}" string="{flag}">{value}</｜DSML｜parameter>\n'


def calls_of(turn: ParsedTurn) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.arguments) for call in turn.calls]


def expected_calls(calls: list[dict[str, Any]]) -> list[tuple[str, dict[str, object]]]:
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize("name", STRICT)
def test_strict_reads_what_the_reference_reads_and_names_the_rule_of_the_rest(name: str, tokenizer: Tokenizer) -> None:
    case = STRICT[name]
    thinking = case["thinking_mode"] == "thinking"
    turn = parse(sampled_ids(case["completion_text"], tokenizer), tokenizer, thinking=thinking)
    if name in RULE_OF_VECTOR:
        assert turn.error is not None
        assert turn.error.rule == RULE_OF_VECTOR[name]
        assert turn.calls == ()
    else:
        reference = case["reference_result"]
        functions = [call["function"] for call in reference["tool_calls"]]
        assert turn.error is None
        assert (turn.content, turn.reasoning) == (reference["content"], reference["reasoning_content"])
        assert calls_of(turn) == [(function["name"], json.loads(function["arguments"])) for function in functions]
        assert {call.status for call in turn.calls} <= {ParseStatus.OK}


@pytest.mark.parametrize("name", [name for name in TOLERANT if name != "v32_wrapper"])
def test_tolerant_recovers_what_serving_engines_recover(name: str, tokenizer: Tokenizer) -> None:
    case = TOLERANT[name]
    ordinary = case.get("token_origin") == "ordinary"
    text = case["completion_text"]
    ids = tokenizer.encode_plain(text) if ordinary else sampled_ids(text, tokenizer)
    thinking = case["thinking_mode"] == "thinking"
    turn = parse(ids, tokenizer, thinking=thinking, policy="tolerant", tools=case.get("tools"))
    expected = case["expected"]
    assert (turn.reasoning, turn.content) == (expected["reasoning"] or "", expected["content"] or "")
    assert calls_of(turn) == expected_calls(expected["tool_calls"])


def test_the_block_name_of_the_former_version_is_read_and_does_not_leak(tokenizer: Tokenizer) -> None:
    text = TOLERANT["v32_wrapper"]["completion_text"]
    turn = parse(sampled_ids(text, tokenizer), tokenizer, thinking=False, policy="tolerant")
    assert turn.content == ""
    assert turn.calls == (ToolCall("search", {"query": "vllm"}, ParseStatus.RECOVERED),)


@pytest.mark.parametrize("name", OPEN)
def test_tolerant_reads_a_completion_without_its_end_token(name: str, tokenizer: Tokenizer) -> None:
    case = OPEN[name]
    turn = parse(sampled_ids(case["raw"], tokenizer), tokenizer, thinking=case["thinking"], policy="tolerant")
    expected = case["expect"]
    assert (turn.reasoning, turn.content) == (expected["reasoning"], expected["content"])
    assert calls_of(turn) == expected_calls(expected["calls"])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("end", ["", EOS])
@pytest.mark.parametrize("name", REPLAY)
def test_what_a_grammar_lets_a_model_write_is_read_in_its_dialect(name: str, end: str, policy: Policy) -> None:
    case = REPLAY[name]
    expected = case["expected"]
    turn = parse_text(case["completion_text"] + end, thinking=True, policy=policy, dialect=DIALECTS[case["dialect"]])
    assert (turn.reasoning, turn.content) == (expected["reasoning"], expected["content"])
    if policy == "strict" and not end and not expected["tool_calls"]:
        assert turn.error is not None
        assert turn.error.rule == "missing-eos"
    else:
        assert turn.error is None
        assert calls_of(turn) == expected_calls(expected["tool_calls"])
        assert {call.status for call in turn.calls} <= {ParseStatus.OK}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", STRICT)
def test_text_reads_like_the_tokens_it_spells(name: str, policy: Policy, tokenizer: Tokenizer) -> None:
    case = STRICT[name]
    thinking = case["thinking_mode"] == "thinking"
    from_text = parse_text(case["completion_text"], thinking=thinking, policy=policy)
    from_ids = parse(sampled_ids(case["completion_text"], tokenizer), tokenizer, thinking=thinking, policy=policy)
    assert (from_text.reasoning, from_text.content, from_text.calls, from_text.error) == (
        from_ids.reasoning,
        from_ids.content,
        from_ids.calls,
        from_ids.error,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_markers_written_with_ordinary_tokens_are_text(policy: Policy, tokenizer: Tokenizer) -> None:
    spelled = "</think>" + block(invoke("bash", parameter("command", "rm -rf /"))) + EOS
    ids = [*tokenizer.encode_plain(spelled), tokenizer.control(EOS)]
    assert parse(ids, tokenizer, thinking=False, policy=policy).content == spelled
    thinking = parse(ids, tokenizer, thinking=True, policy=policy)
    assert (thinking.reasoning, thinking.content, thinking.calls) == (spelled, "", ())


def test_a_closing_tag_written_with_ordinary_tokens_stays_in_the_value(tokenizer: Tokenizer) -> None:
    head, tail = (
        sampled_ids("\n\n<｜DSML｜tool_calls>\n", tokenizer),
        sampled_ids("</｜DSML｜tool_calls>" + EOS, tokenizer),
    )
    opened = sampled_ids('<｜DSML｜invoke name="bash">\n<｜DSML｜parameter name="command" string="true">', tokenizer)
    closed = sampled_ids("</｜DSML｜parameter>\n</｜DSML｜invoke>\n", tokenizer)
    value = f"echo '</｜DSML｜parameter>\n{EOS}' 2>&1"
    ids = [*head, *opened, *tokenizer.encode_plain(value), *closed, *tail]
    assert calls_of(parse(ids, tokenizer, thinking=False)) == [("bash", {"command": value})]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_that_the_dialect_does_not_know_is_text(policy: Policy, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.control("<｜fim▁hole｜>"), *sampled_ids(f"a{EOS}", tokenizer)]
    turn = parse(ids, tokenizer, thinking=False, policy=policy)
    assert (turn.content, turn.error) == ("<｜fim▁hole｜>a", None)


def test_a_stray_tag_behind_a_call_is_dropped() -> None:
    text = block(invoke("f")) + "</｜DSML｜parameter></｜DSML｜invoke>bye" + EOS
    turn = parse_text(text, thinking=False, policy="tolerant")
    assert (turn.content, calls_of(turn), turn.error) == ("", [("f", {})], None)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_control_token_in_a_value_that_begins_no_tag_is_part_of_the_value(policy: Policy) -> None:
    value = "<｜DSML｜x> ｜DSML｜invoke </think> <｜User｜>"
    turn = parse_text(block(invoke("f", parameter("a", value))) + EOS, thinking=False, policy=policy)
    assert turn.calls == (ToolCall("f", {"a": value}),)


@pytest.mark.parametrize("spelling", [token for token in V4.control_tokens if token not in {EOS, "｜DSML｜"}])
def test_a_chat_control_token_sampled_in_prose_is_an_error(spelling: str, tokenizer: Tokenizer) -> None:
    turn = parse(sampled_ids(f"a{spelling}b{EOS}", tokenizer), tokenizer, thinking=False)
    assert turn.error is not None
    assert (turn.error.rule, turn.error.offset, turn.content) == ("control-token-in-text", 1, "a")


@pytest.mark.parametrize(
    ("rest", "rule"),
    [
        (">\n", "truncated-call"),
        (">", "truncated-call"),
        (f">\n</｜DSML｜tool_c{EOS}", "truncated-call"),
        (">\n\n<｜DSML｜invoke", "malformed-block"),
        ("s>\n", "malformed-block"),
        ('>\n<｜DSML｜invoke name="bash', "truncated-call"),
        ('>\n<｜DSML｜invoke name="bash"\n', "malformed-invoke"),
        ('>\n<｜DSML｜invoke name="">\n', "malformed-invoke"),
        ('>\n<｜DSML｜invoke name="' + "x" * 2000, "malformed-invoke"),
        ('>\n<｜DSML｜invoke name="bash">\nls', "malformed-invoke"),
        ('>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" str', "truncated-call"),
        ('>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" string="True">x\n', "malformed-parameter"),
        ('>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" string="true">sl', "truncated-call"),
        ('>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" string="true">x</｜DSML｜par', "truncated-call"),
        (
            '>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" string="true">x\n<｜DSML｜parameter name="b"',
            "unclosed-parameter",
        ),
        (
            '>\n<｜DSML｜invoke name="b">\n<｜DSML｜parameter name="a" string="true">x\n</｜DSML｜invoke>',
            "unclosed-parameter",
        ),
    ],
)
@pytest.mark.parametrize("end", ["", EOS])
def test_a_broken_block_runs_nothing_and_says_why(rest: str, rule: str, end: str, tokenizer: Tokenizer) -> None:
    complete = invoke("bash", parameter("command", "ls"))
    text = "Now.\n\n<｜DSML｜tool_calls" + rest + ("" if rest.endswith(EOS) else end)
    turn = parse(sampled_ids(text, tokenizer), tokenizer, thinking=False)
    assert turn.error is not None
    assert turn.error.rule == rule
    assert (turn.content, turn.calls) == ("Now.", ())
    later = text.replace("tool_calls>\n", "tool_calls>\n" + complete, 1)
    assert parse(sampled_ids(later, tokenizer), tokenizer, thinking=False).calls == ()


@pytest.mark.parametrize(
    "value",
    ["", "[broken", "NaN", "-Infinity", "1e999", '"\\ud800"', "'a'", "1 2", "[" * 100_000, "9" * 5000, "tru", "\ufffd"],
)
def test_a_value_that_is_no_json_is_refused(value: str) -> None:
    text = block(invoke("f", parameter("a", value, string=False))) + EOS
    turn = parse_text(text, thinking=False)
    assert turn.error is not None
    assert (turn.error.rule, turn.calls) == ("bad-json", ())
    tolerant = parse_text(text, thinking=False, policy="tolerant")
    assert tolerant.calls == (ToolCall("f", {"a": value}, ParseStatus.RECOVERED),)


def test_an_error_tells_a_model_what_to_do_and_where() -> None:
    text = "One moment." + block(invoke("f", parameter("a", "x").replace("true", "yes"))) + EOS
    error = parse_text(text, thinking=False).error
    assert error is not None
    assert text[error.offset :].startswith('a" string="yes">x')
    assert 'a" string="yes">x' in error.excerpt
    assert len(error.excerpt) <= 80
    assert '<｜DSML｜parameter name="NAME" string="true|false">VALUE</｜DSML｜parameter>' in error.message


def test_every_rule_has_a_sentence_without_holes() -> None:
    for text in ("", "a", f"{EOS}x", block() + "x", block("x")):
        for thinking in (False, True):
            error = parse_text(text, thinking=thinking).error
            assert error is not None
            assert error.rule in RULES
            assert "{" not in error.message


def test_places_count_characters_and_lines_not_bytes() -> None:
    for text, place in (("热海🧑", (3, 1, 4)), ("热\n海", (3, 2, 2)), ("\n\n\n", (3, 4, 1)), ("", (0, 1, 1))):
        error = parse_text(f"{text}<think>{EOS}", thinking=False).error
        assert error is not None
        assert (error.offset, error.line, error.column) == place


def test_a_tolerant_turn_that_is_cut_off_keeps_the_calls_before_it() -> None:
    text = block(invoke("f", parameter("a", "x")), invoke("g", parameter("b", "y")))
    cut = text[: text.index("y") + 1]
    turn = parse_text(cut, thinking=False, policy="tolerant")
    assert calls_of(turn) == [("f", {"a": "x"})]
    assert turn.error is not None
    assert turn.error.rule == "truncated-call"


@pytest.mark.parametrize("length", range(1, 175))
@pytest.mark.parametrize("policy", POLICIES)
def test_no_beginning_of_a_call_ever_runs(length: int, policy: Policy) -> None:
    whole = block(invoke("f", parameter("a", "x"), parameter("n", "5", string=False)))
    closed = whole.index("</｜DSML｜invoke>") + len("</｜DSML｜invoke>")
    turn = parse_text(whole[:length], thinking=False, policy=policy)
    assert turn.calls == () or length >= (closed if policy == "tolerant" else len(whole))


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('<｜DSML｜parameter name="a" string="true">x</｜DSML｜invoke>', {"a": "x"}),
        ('<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter\n</｜DSML｜invoke\n', {"a": "x"}),
        ('<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>', {"a": "x"}),
        ('<｜DSML｜parameter name="a">1</｜DSML｜parameter>' * 2 + "</｜DSML｜invoke>", {"a": 1}),
        ('</｜DSML｜parameter>{"a": [1]}</｜DSML｜invoke>', {"a": [1]}),
        ("</｜DSML｜invoke>", {}),
    ],
)
def test_a_sloppy_call_is_recovered_and_marked(body: str, arguments: dict[str, object]) -> None:
    text = f'\n\n<｜DSML｜tool_calls><｜DSML｜invoke name="f">{body}</｜DSML｜tool_calls>{EOS}'
    turn = parse_text(text, thinking=False, policy="tolerant")
    assert calls_of(turn) == [("f", arguments)]
    assert turn.calls[0].status is (ParseStatus.OK if body == "</｜DSML｜invoke>" else ParseStatus.RECOVERED)


def test_a_call_whose_body_is_prose_is_not_run() -> None:
    text = '<｜DSML｜invoke name="f">please list the files</｜DSML｜invoke>'
    turn = parse_text(text, thinking=False, policy="tolerant")
    assert turn.calls == ()
    assert turn.error is not None
    assert turn.error.rule == "malformed-invoke"


@pytest.mark.parametrize(
    ("properties", "value", "arguments"),
    [
        ({"a": {}}, '{"a": 1}', {"a": 1}),
        ({"a": {}, "arguments": {}}, '{"a": 1}', {"arguments": {"a": 1}}),
        ({"b": {}}, '{"a": 1}', {"arguments": {"a": 1}}),
        ({"a": {}}, "[1]", {"arguments": [1]}),
    ],
)
def test_only_a_spurious_wrapper_is_unwrapped(
    properties: dict[str, object], value: str, arguments: dict[str, object]
) -> None:
    tools = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
    text = block(invoke("f", parameter("arguments", value, string=False)))
    assert calls_of(parse_text(text, thinking=False, policy="tolerant", tools=tools)) == [("f", arguments)]
    assert calls_of(parse_text(text, thinking=False, tools=tools)) == [("f", {"arguments": json.loads(value)})]
    spelled = block(invoke("f", parameter("arguments", value)))
    expected = arguments if "arguments" not in arguments else {"arguments": value}
    assert calls_of(parse_text(spelled, thinking=False, policy="tolerant", tools=tools)) == [("f", expected)]


def test_spans_tell_thinking_text_and_calls_apart(tokenizer: Tokenizer) -> None:
    parts = ["Look at it.</think>", "I list.", block(invoke("bash", parameter("command", "ls"))) + EOS]
    ids = sampled_ids("".join(parts), tokenizer)
    turn = parse(ids, tokenizer, thinking=True)
    kinds = [SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_TEXT, SpanKind.SAMPLED_CALL]
    assert [span.kind for span in turn.spans] == kinds
    assert [tokenizer.decode(ids[span.start : span.start + span.length]) for span in turn.spans] == [
        "Look at it.</think>",
        "I list.\n\n" if len(tokenizer.encode_plain(".\n\n")) == 1 else "I list.",
        parts[2].removeprefix("\n\n") if len(tokenizer.encode_plain(".\n\n")) == 1 else parts[2],
    ]


@pytest.mark.parametrize(
    ("text", "thinking", "kinds"),
    [
        ("", True, []),
        (f"done{EOS}", False, ["SAMPLED_TEXT"]),
        (f"never closed{EOS}", True, ["SAMPLED_THINK"]),
        (f"</think>{EOS}", True, ["SAMPLED_THINK", "SAMPLED_TEXT"]),
        (block() + EOS, False, ["SAMPLED_CALL"]),
        ("r</think>" + block() + EOS, True, ["SAMPLED_THINK", "SAMPLED_CALL"]),
    ],
)
def test_spans_cover_a_turn_exactly(text: str, thinking: bool, kinds: list[str], tokenizer: Tokenizer) -> None:
    ids = sampled_ids(text, tokenizer)
    spans = parse(ids, tokenizer, thinking=thinking).spans
    assert [span.kind for span in spans] == kinds
    assert sum(span.length for span in spans) == len(ids)
    assert [(before, after) for before, after in pairwise(spans) if before.start + before.length != after.start] == []


def test_a_place_behind_half_a_character_counts_its_replacement_sign(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_plain("ok\n🧑")[:-1], tokenizer.control(V4.think_open)]
    error = parse(ids, tokenizer, thinking=False).error
    assert error is not None
    assert (error.offset, error.line, error.column) == (4, 2, 2)
    assert error.excerpt == "ok\n\ufffd<think>"


def test_half_a_character_at_the_end_of_a_cut_turn_is_shown_as_a_replacement_sign(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("ok 🧑")[:-1]
    turn = parse(ids, tokenizer, thinking=False)
    assert turn.content.startswith("ok \ufffd")
    assert turn.error is not None
    assert turn.error.rule == "missing-eos"
