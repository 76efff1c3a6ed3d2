"""The bugs that users of other parsers reported, each as a test that names its thread.

Every turn here is read whole and again in chunks of every size, as text and as tokens.  Where a
thread is about a server, the test shows what this library contributes and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest

from toolcall_dsl import (
    V4,
    ArgumentsText,
    CallFinished,
    CallStarted,
    ContentText,
    FeedError,
    ParsedTurn,
    ParseStatus,
    Policy,
    SpanKind,
    StreamParser,
    Tokenizer,
    ToolCall,
    check_call,
    encode,
    encode_results,
    encode_text,
    parse,
    parse_text,
    turn_of,
)
from toolcall_dsl.testing import events_of, joined, sampled_ids

POLICIES: tuple[Policy, ...] = get_args(Policy)
EOS = V4.eos
HEAD = "\n\n<｜DSML｜tool_calls>\n"
TAIL = "</｜DSML｜tool_calls>"
Read = Callable[..., ParsedTurn]


def parameter(name: str, value: str, flag: str = ' string="true"') -> str:
    return f'<｜DSML｜parameter name="{name}"{flag}>{value}</｜DSML｜parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + ("".join(parameters) or "\n") + "</｜DSML｜invoke>\n"


def tool(name: str, *names: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {} for name in names}, "required": list(names)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


@pytest.fixture
def read(tokenizer: Tokenizer) -> Read:
    """Reads a turn from text and from tokens, whole and in chunks of every size, all of which must agree."""

    def reading(text: str, *, thinking: bool = False, policy: Policy = "tolerant", **options: Any) -> ParsedTurn:
        options = {"thinking": thinking, "policy": policy, **options}
        turn = parse_text(text, **options)
        whole = joined(events_of(StreamParser(**options), [text]))
        ids = sampled_ids(text, tokenizer)
        from_ids = parse(ids, tokenizer, **options)
        assert replace(from_ids, spans=()) == turn
        for size in range(1, len(text) + 1):
            parts = [text[at : at + size] for at in range(0, len(text), size)]
            assert joined(events_of(StreamParser(**options), parts)) == whole
        for size in range(1, len(ids) + 1):
            parser = StreamParser(tokenizer, **options)
            assert joined(events_of(parser, [ids[at : at + size] for at in range(0, len(ids), size)])) == whole
            assert parser.spans() == from_ids.spans
            assert parser.is_complete == turn.is_complete
        assert turn_of(whole, is_complete=turn.is_complete) == turn
        return turn

    return reading


def calls_of(turn: ParsedTurn) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.arguments) for call in turn.calls]


def test_01_vllm_40800_40801_a_start_marker_split_across_chunks_does_not_leak(read: Read) -> None:
    """vllm #40800, #40801, fix #40806: a split start marker leaked, and state outlived its request."""
    for policy in POLICIES:
        turn = read("Let me look." + HEAD + invoke("f", parameter("a", "x")) + TAIL + EOS, policy=policy)
        assert (turn.content, calls_of(turn)) == ("Let me look.", [("f", {"a": "x"})])
    used = StreamParser(thinking=False)
    used.feed_text("half a <｜DSML")
    used.finish()
    with pytest.raises(FeedError):
        used.feed_text("｜tool_calls>")
    assert read("｜tool_calls>" + EOS).content == "｜tool_calls>"


def test_02_vllm_53227_a_partial_close_tag_does_not_leak_into_arguments(tokenizer: Tokenizer) -> None:
    """vllm #53227 (#53417, #53457, #53405): no streamed fragment may hold a part of a closing tag."""
    ids = sampled_ids(HEAD + invoke("f", parameter("a", "x</b> < y"), parameter("b", "</")) + TAIL + EOS, tokenizer)
    for policy in POLICIES:
        parser = StreamParser(tokenizer, thinking=False, policy=policy)
        said = ""
        for token_id in ids:
            parser.feed([token_id])
            for event in iter(parser.next_event, None):
                said += event.json_text if isinstance(event, ArgumentsText) else ""
            assert '{"a": "x</b> < y", "b": "</"}'.startswith(said)
        assert said == '{"a": "x</b> < y", "b": "</"}'


def test_03_vllm_pr_45877_46875_a_value_that_ends_like_a_tag_ends_where_it_ends(read: Read) -> None:
    """vllm PR 45877, #46875: `2>&1` before the close tag leaked the tag and left the JSON open."""
    for value in ("make 2>&1", "a >", "<", "</", "x<b>y</b>", "\n", "2>&1\n", '">', "</｜DSML", "</｜DSML｜para"):
        for policy in POLICIES:
            turn = read(HEAD + invoke("f", parameter("a", value)) + TAIL + EOS, policy=policy)
            assert calls_of(turn) == [("f", {"a": value})], value


@pytest.mark.parametrize("name", ["toolcalls", "tool"])
def test_04_vllm_51914_a_misspelled_opener_is_recovered_and_never_under_strict(name: str, read: Read) -> None:
    """vllm #51914, PR 52645: `toolcalls` for `tool_calls`, from the 0731 model with speculative decoding."""
    text = f"\n\n<｜DSML｜{name}>\n" + invoke("f", parameter("a", "x")) + f"</｜DSML｜{name}>" + EOS
    assert read(text).calls == (ToolCall("f", {"a": "x"}, ParseStatus.RECOVERED),)
    strict = read(text, policy="strict")
    assert (strict.calls, strict.error and strict.error.rule) == ((), "block-not-opened")


def test_05_vllm_48931_a_missing_opener_is_recovered_but_prose_is_no_call(read: Read, tokenizer: Tokenizer) -> None:
    """vllm #48931, PR 49117: opener lost at long context; over-recovery made phantom calls of prose."""
    turn = read("So:" + invoke("bash", parameter("command", "ls")) + EOS)
    assert turn.calls == (ToolCall("bash", {"command": "ls"}, ParseStatus.RECOVERED),)
    for prose in ('write <invoke name="bash">', "the <｜DSML｜ marker", "a <｜DSML｜invoke tag", "<DSML|invoke>"):
        told = read(prose + EOS)
        assert (told.content, told.calls) == (prose, ())
    quoted = tokenizer.encode_plain(HEAD + invoke("bash", parameter("command", "rm -rf /")) + TAIL)
    assert parse(quoted, tokenizer, thinking=False, policy="tolerant").calls == ()
    short = read(invoke("bash") + EOS).calls[0]
    assert check_call(short, [tool("bash", "command")]).message == 'call: expected a value for "command"; found none'
    assert "none is declared" in check_call(short, []).message


def test_06_frontend_crates_pr_123_a_wrapper_less_invoke_never_runs_under_strict(read: Read) -> None:
    """ai-dynamo/frontend-crates PR 123: the opposite policy of thread 5; here it is the default."""
    turn = read(invoke("bash", parameter("command", "ls")) + EOS, policy="strict")
    assert (turn.calls, turn.error and turn.error.rule) == ((), "block-not-opened")


FLAGS = (' string="true"', ' string="false"', "")
ENDS = ("", "</｜DSML｜invoke>", "</｜DSML｜invoke>\n")


@pytest.mark.parametrize("block", ["tool_calls", "toolcalls", "tool", "function_calls", None])
@pytest.mark.parametrize("lead", ["", "\n", "\n\n", "text"])
def test_07_sglang_40236_no_shape_of_a_call_leaks_as_content(block: str | None, lead: str) -> None:
    """sglang #40236: of 455 shapes (V3.2 block name, no wrapper, unterminated) 211 leaked markup."""
    opener, closer = (f"<｜DSML｜{block}>", f"</｜DSML｜{block}>") if block else ("", "")
    closes = ("</｜DSML｜parameter>", "")
    for newline, flag, value, close, end, tail in product(
        ("", "\n"), FLAGS, ("1", "x y", ""), closes, ENDS, (EOS, "", closer + EOS)
    ):
        call = f'<｜DSML｜invoke name="f">{newline}<｜DSML｜parameter name="a"{flag}>{value}{close}{newline}'
        text = lead + opener + newline + call + end + tail
        turn = parse_text(text, thinking=False, policy="tolerant")
        before = lead + newline if block is None else lead
        assert turn.content == before.removesuffix("\n\n"), text
        assert len(turn.calls) + (turn.error is not None) == 1, text
        parser = StreamParser(thinking=False, policy="tolerant")
        assert turn_of(events_of(parser, text), is_complete=parser.is_complete) == turn


def test_08_sglang_35736_without_tools_the_prompt_has_no_tools_block(read: Read) -> None:
    """sglang #35736: tool_choice=none leaked DSML.  A server's business; this library leaves the tools
    block out of a prompt without tools, and a call that comes anyway is a call and not content."""
    user = {"role": "user", "content": "hi"}
    assert "｜DSML｜" not in encode_text([user], thinking=False)
    assert "｜DSML｜" in encode_text([{"role": "system", "content": "", "tools": [tool("f")]}, user], thinking=False)
    turn = read("Hm." + HEAD + invoke("f") + TAIL + EOS, policy="strict")
    assert (turn.content, len(turn.calls)) == ("Hm.", 1)


def test_09_sglang_35563_any_split_gives_the_same_result() -> None:
    """sglang #35563: a two-chunk stream lost calls that non-streaming found."""
    text = "a\n\nb" + HEAD + invoke("f", parameter("a", "x\n")) + invoke("g") + TAIL + EOS
    for policy in POLICIES:
        whole = joined(events_of(StreamParser(thinking=False, policy=policy), [text]))
        assert [event.call.name for event in whole if isinstance(event, CallFinished)] == ["f", "g"]
        for first in range(len(text)):
            for second in range(first, len(text), 7):
                parts = [text[:first], text[first:second], text[second:]]
                assert joined(events_of(StreamParser(thinking=False, policy=policy), parts)) == whole


def test_10_sglang_pr_14573_a_call_without_arguments_is_streamed(read: Read) -> None:
    """sglang PR 14573: a tool without arguments was skipped when streaming."""
    for policy in POLICIES:
        for body in (invoke("now"), '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'):
            assert read(HEAD + body + TAIL + EOS, policy=policy).calls == (ToolCall("now", {}),)
    events = events_of(StreamParser(thinking=False), HEAD + invoke("now") + TAIL)
    assert events[:2] == [CallStarted(0, "now"), ArgumentsText(0, "{}")]


def test_11_vllm_41240_sglang_38924_a_spurious_wrapper_goes_and_a_real_parameter_stays(read: Read) -> None:
    """vllm #41240, PR 41241; sglang #38924: all arguments wrapped in `arguments` or `input`."""
    inner = '{"location": "SF", "unit": "c"}'
    for name in ("arguments", "input"):
        for flag in (' string="true"', ' string="false"', ""):
            text = HEAD + invoke("f", parameter(name, inner, flag)) + TAIL + EOS
            wrapped = read(text, tools=[tool("f", "location", "unit")])
            assert wrapped.calls == (ToolCall("f", json.loads(inner), ParseStatus.RECOVERED),)
            real = read(text, tools=[tool("f", name)]).calls[0].arguments
            assert real == {name: inner if "true" in flag else json.loads(inner)}
            unknown = read(text).calls[0].arguments
            assert list(unknown) == [name]


def test_12_vllm_pr_41241_held_text_comes_out_at_the_end(read: Read) -> None:
    """vllm PR 41241: text such as `2 <`, held because it might begin a marker, was lost at the end."""
    for text in ("2 <", "a\n\n<", "a\n\n", "a</", "<｜DSML", "x <｜DSML｜", "\n\n<｜DSML｜tool_ca", "<｜end▁of"):
        for end in ("", EOS):
            assert read(text + end).content == text


def test_13_vllm_52846_long_text_values_stream_as_they_arrive(tokenizer: Tokenizer) -> None:
    """vllm #52846, sglang PR 19662: a long string argument arrived in one piece."""
    for policy in POLICIES:
        parser = StreamParser(tokenizer, thinking=False, policy=policy)
        parser.feed(
            sampled_ids(HEAD + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">', tokenizer)
        )
        list(iter(parser.next_event, None))
        for token_id in tokenizer.encode_plain("a long line without a tag; " * 20):
            parser.feed([token_id])
            (event,) = iter(parser.next_event, None)
            assert isinstance(event, ArgumentsText)


def test_14_sglang_pr_23863_an_unknown_tool_is_parsed_and_told_as_a_problem(read: Read) -> None:
    """sglang PR 23863: skip an unknown tool or forward it?  The parser forwards; the schema check answers."""
    for policy in POLICIES:
        (call,) = read(
            HEAD + invoke("nosuch", parameter("a", "x")) + TAIL + EOS, policy=policy, tools=[tool("f")]
        ).calls
        checked = check_call(call, [tool("f")], policy=policy)
        assert not checked.fits
        assert checked.message == "call: expected a declared tool ('f'); found \"nosuch\""


def test_15_vllm_48645_a_reply_without_think_close_does_not_leak_eos(read: Read) -> None:
    """vllm #48645: a reply without `</think>` went to reasoning whole, and the EOS text leaked."""
    strict = read(f"an answer{EOS}", thinking=True, policy="strict")
    assert (strict.reasoning, strict.content) == ("an answer", "")
    assert strict.error is not None
    assert strict.error.rule == "missing-think-close"
    tolerant = read(f"an answer{EOS}", thinking=True)
    assert (tolerant.reasoning, tolerant.content, tolerant.error) == ("an answer", "", None)


def test_16_dynamo_pr_10646_a_block_inside_thinking_is_not_swallowed(read: Read) -> None:
    """dynamo PR 10646, llamadart #402, llama.cpp PR 25891: the call was lost and the turn looked finished."""
    text = "I should look." + HEAD + invoke("f", parameter("a", "x")) + TAIL + EOS
    tolerant = read(text, thinking=True)
    assert (tolerant.reasoning, tolerant.content) == ("I should look.", "")
    assert tolerant.calls == (ToolCall("f", {"a": "x"}, ParseStatus.RECOVERED),)
    strict = read(text, thinking=True, policy="strict")
    assert (strict.calls, strict.error and strict.error.rule) == ((), "call-inside-reasoning")


def test_17_vllm_ascend_10182_empty_arguments_are_an_object_and_nothing_leaks(read: Read) -> None:
    """vllm-ascend #10182: empty arguments, and a leak when a tool is named in tool_choice (a server's
    grammar then begins the reply with the block: it reads like any other block)."""
    turn = read(HEAD.lstrip("\n") + invoke("f", parameter("a", "")) + TAIL + EOS)
    assert (turn.content, calls_of(turn)) == ("", [("f", {"a": ""})])
    named = read(HEAD + invoke("f") + TAIL, policy="strict")
    assert (named.content, calls_of(named)) == ("", [("f", {})])


@pytest.mark.parametrize("token", [token for token in V4.control_tokens if token not in {V4.dsml, EOS}])
def test_18_vllm_ascend_pr_9462_a_control_token_in_place_of_a_marker_starts_no_call(token: str, read: Read) -> None:
    """vllm-ascend PR 9462: under MTP, BOS-like tokens were sampled in place of the marker and leaked."""
    text = f"ok\n\n<{token}tool_calls>\n" + f'<{token}invoke name="f">\n' + EOS
    strict = read(text, policy="strict")
    assert (strict.calls, strict.error and strict.error.rule) == ((), "control-token-in-text")
    assert not strict.content.endswith(token)
    assert read(text).calls == ()
    assert read(f"ok{EOS}tool_calls>{EOS}").content == "ok"


def test_19_vllm_pr_54686_a_name_that_never_ends_swallows_no_body(read: Read) -> None:
    """vllm PR 54686: with `">` missing, the name field took in a whole body; a leak in history made more."""
    body = "rm -rf build\n" * 3
    for text in (
        HEAD + '<｜DSML｜invoke name="bash\n' + body,
        HEAD + '<｜DSML｜invoke name="bash' + "x" * 300 + '\n<｜DSML｜parameter name="command" string="true">ls',
    ):
        for policy in POLICIES:
            assert read(text + EOS, policy=policy).calls == ()
    started = events_of(StreamParser(thinking=False), HEAD + '<｜DSML｜invoke name="' + "x" * 5000)
    assert [event for event in started if isinstance(event, CallStarted)] == []
    leak = [{"role": "user", "content": HEAD + invoke("f")}]
    assert encode_text(leak, thinking=False).count("｜DSML｜") == HEAD.count("｜DSML｜") + invoke("f").count("｜DSML｜")


def test_19_a_leak_in_history_holds_no_control_token(tokenizer: Tokenizer) -> None:
    """vllm PR 54686: markup that once leaked into a message goes back into the prompt as ordinary tokens."""
    leak: list[dict[str, Any]] = [{"role": "user", "content": HEAD + invoke("f")}]
    segments = encode(leak, tokenizer, thinking=False)
    assert tokenizer.control(V4.dsml) not in [token_id for segment in segments for token_id in segment.token_ids]


def test_20_vllm_36654_the_shapes_of_long_contexts_are_read(read: Read) -> None:
    """vllm #36654 (V3.2): frequent failures at long context, where tags lose their edges."""
    opened = '<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="true">x'
    closed = "</｜DSML｜parameter></｜DSML｜invoke>"
    for text in (
        f"<｜DSML｜function_calls>{opened}{closed}</｜DSML｜function_calls>",
        f"<｜DSML｜tool_calls>{opened}</｜DSML｜parameter\n</｜DSML｜invoke\n</｜DSML｜tool_calls",
        f"{opened}</｜DSML｜invoke>",
        '<｜DSML｜tool_calls><｜DSML｜invoke name="f">{"a": "x"}</｜DSML｜invoke></｜DSML｜tool_calls>',
    ):
        assert read(text + EOS).calls == (ToolCall("f", {"a": "x"}, ParseStatus.RECOVERED),)


def test_21_opencode_24442_reasoning_survives_a_second_serialisation(tokenizer: Tokenizer) -> None:
    """opencode #24442, langchain #37713: reasoning was lost when messages were serialised twice.  Here
    sampled ids are kept and never encoded again; and encoding what was parsed gives the same text."""
    text = "because</think>fine" + HEAD + invoke("f", parameter("a", "x")) + TAIL + EOS
    turn = parse_text(text, thinking=True)
    (call,) = turn.calls
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    message: dict[str, Any] = {
        "role": "assistant",
        "reasoning_content": turn.reasoning,
        "content": turn.content,
        "tool_calls": [{"id": "c", "function": function}],
    }
    context: list[dict[str, Any]] = [
        {"role": "system", "content": "", "tools": [tool("f", "a")]},
        {"role": "user", "content": ""},
    ]
    for again in (message, json.loads(json.dumps(json.loads(json.dumps(message))))):
        assert encode_text([again], thinking=True, context=context) == text
    assert encode_results(["ok"], tokenizer, thinking=True)


def test_22_deepseek_v3_1376_a_forced_call_behind_reasoning_is_read(read: Read) -> None:
    """DeepSeek-V3 #1376: the hosted API refuses thinking with a forced tool_choice.  A server's rule; a
    turn that goes from its reasoning straight into a block is read by both policies."""
    for policy in POLICIES:
        turn = read("so</think>" + HEAD + invoke("f", parameter("a", "x")) + TAIL, thinking=True, policy=policy)
        assert (turn.reasoning, turn.content, calls_of(turn)) == ("so", "", [("f", {"a": "x"})])


def test_23_llama_cpp_pr_29008_the_borders_for_cache_checkpoints_are_told(tokenizer: Tokenizer) -> None:
    """llama.cpp PR 29008: no cache checkpoint at `<｜User｜>` and `<｜Assistant｜>`.  A server's business;
    segments and spans are the borders where it can take one, and they cover every token."""
    segments = encode([{"role": "user", "content": "hi"}], tokenizer, thinking=True)
    borders = [segment.token_ids[0] for segment in segments if segment.kind is SpanKind.TEMPLATE]
    assert tokenizer.control(V4.assistant) in [token_id for segment in segments for token_id in segment.token_ids]
    assert borders
    ids = sampled_ids("so</think>done" + HEAD + invoke("f") + TAIL + EOS, tokenizer)
    spans = parse(ids, tokenizer, thinking=True).spans
    assert [span.kind for span in spans] == [SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_TEXT, SpanKind.SAMPLED_CALL]
    assert sum(span.length for span in spans) == len(ids)


def test_24_vllm_tests_a_missing_string_attribute_is_json_or_text(read: Read) -> None:
    """vLLM's Python and Rust tests: a parameter without `string` is JSON if it is JSON, else text."""
    for written, value in (("5", 5), ('{"x": [1]}', {"x": [1]}), ("ls -l", "ls -l"), ("", ""), ("null", None)):
        text = HEAD + invoke("f", parameter("a", written, "")) + TAIL + EOS
        assert read(text).calls == (ToolCall("f", {"a": value}, ParseStatus.RECOVERED),)
        strict = read(text, policy="strict")
        assert (strict.calls, strict.error and strict.error.rule) == ((), "malformed-parameter")
    assert calls_of(read(HEAD + invoke("f", parameter("a", "5")) + TAIL + EOS)) == [("f", {"a": "5"})]


def test_the_streamed_content_of_a_plain_reply_is_the_reply(read: Read) -> None:
    """Nothing is lost or added where nothing is special."""
    text = "Just prose: 1 < 2, a > b.\n\nAnd <b>more</b>."
    assert joined(events_of(StreamParser(thinking=False), text + EOS)) == [ContentText(text)]
    assert read(text + EOS).content == text
