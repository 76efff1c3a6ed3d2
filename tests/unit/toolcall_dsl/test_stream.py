"""The incremental parser: every vector in every chunking, what is said when, and what is never said."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from toolcall_dsl import (
    DIALECTS,
    V4,
    ArgumentsText,
    CallFinished,
    CallStarted,
    ContentText,
    FeedError,
    ParsedTurn,
    ParseStatus,
    Policy,
    ReasoningText,
    StreamParser,
    Tokenizer,
    ToolCall,
    TurnEvent,
    TurnFailed,
    parse,
    parse_text,
    turn_of,
)
from toolcall_dsl.stream import SPACE_HELD_MAX
from toolcall_dsl.testing import events_of, joined, sampled_ids

GOLDEN = Path(__file__).parents[2] / "golden/dsml/parse"
POLICIES: tuple[Policy, ...] = get_args(Policy)
EOS = V4.eos
OPENED = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
CLOSED = "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"


def vectors() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, text, options of its parser) of every parse vector."""
    for name in ("reference_strict.json", "tolerant_expected.json"):
        for case in json.loads((GOLDEN / name).read_text()):
            options = {"thinking": case["thinking_mode"] == "thinking", "tools": case.get("tools")}
            yield case["id"], case["completion_text"], options
    for case in json.loads((GOLDEN / "grammar_replay.json").read_text()):
        yield case["id"], case["completion_text"] + EOS, {"thinking": True, "dialect": DIALECTS[case["dialect"]]}
    for case in map(json.loads, (GOLDEN / "open.jsonl").read_text().splitlines()):
        yield case["id"], case["raw"], {"thinking": case["thinking"]}


VECTORS = {name: (text, options) for name, text, options in vectors()}


def parameter(name: str, value: str, flag: str = ' string="true"') -> str:
    return f'<｜DSML｜parameter name="{name}"{flag}>{value}</｜DSML｜parameter>\n'


def arguments_of(events: Sequence[TurnEvent], index: int = 0) -> str:
    return "".join(event.json_text for event in events if isinstance(event, ArgumentsText) and event.index == index)


def assert_events_tell(events: Sequence[TurnEvent], turn: ParsedTurn) -> None:
    """The events are in order and say what the turn says."""
    assert turn_of(events) == ParsedTurn(turn.reasoning, turn.content, turn.calls, turn.error, ())
    finished = [event for event in events if isinstance(event, CallFinished)]
    assert [event.index for event in finished] == list(range(len(finished)))
    for event in finished:
        assert CallStarted(event.index, event.call.name) in events
        assert json.loads(arguments_of(events, event.index)) == event.call.arguments
    assert [event for event in events[:-1] if isinstance(event, TurnFailed)] == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", VECTORS)
def test_every_two_way_split_of_a_text_gives_the_events_of_the_whole(name: str, policy: Policy) -> None:
    text, options = VECTORS[name]

    def events(parts: Sequence[str]) -> list[TurnEvent]:
        return joined(events_of(StreamParser(policy=policy, **options), parts))

    whole = events([text])
    assert_events_tell(whole, parse_text(text, policy=policy, **options))
    assert events(text) == whole
    for at in range(1, len(text)):
        assert events([text[:at], text[at:]]) == whole


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", VECTORS)
def test_token_by_token_gives_the_events_and_spans_of_the_whole(
    name: str, policy: Policy, tokenizer: Tokenizer
) -> None:
    text, options = VECTORS[name]
    for ids in (sampled_ids(text, tokenizer), tokenizer.encode_plain(text)):
        turn = parse(ids, tokenizer, policy=policy, **options)
        for size in (1, 2, 3, 7):
            parser = StreamParser(tokenizer, policy=policy, **options)
            events = events_of(parser, [ids[at : at + size] for at in range(0, len(ids), size)])
            assert_events_tell(events, turn)
            assert parser.spans() == turn.spans


def test_the_order_of_events_is_the_order_of_the_wire() -> None:
    text = "why</think>so" + OPENED + parameter("a", "x") + CLOSED + EOS
    call = ToolCall("f", {"a": "x"})
    assert joined(events_of(StreamParser(thinking=True), text)) == [
        ReasoningText("why"),
        ContentText("so"),
        CallStarted(0, "f"),
        ArgumentsText(0, '{"a": "x"}'),
        CallFinished(0, call),
    ]


def test_text_values_stream_chunk_by_chunk_and_escaped() -> None:
    for policy in POLICIES:
        parser = StreamParser(thinking=False, policy=policy)
        parser.feed_text(OPENED + '<｜DSML｜parameter name="a" string="true">')
        said = list(iter(parser.next_event, None))
        assert said == [CallStarted(0, "f"), ArgumentsText(0, '{"a": "')]
        for chunk, fragment in (
            ("say ", "say "),
            ('"hi"', '\\"hi\\"'),
            ("\n\\", "\\n\\\\"),
            ("🧑", "🧑"),
            ("2 <", "2 "),
        ):
            parser.feed_text(chunk)
            assert parser.next_event() == ArgumentsText(0, fragment)
            assert parser.next_event() is None


def test_strict_json_values_stream_as_they_stand() -> None:
    parser = StreamParser(thinking=False)
    parser.feed_text(OPENED + '<｜DSML｜parameter name="a" string="false">[1, ')
    assert arguments_of(list(iter(parser.next_event, None))) == '{"a": [1, '


@pytest.mark.parametrize("flag", ["", ' string="false"', ' string="maybe"'])
@pytest.mark.parametrize(("value", "fragment"), [("[1, 2]", "[1, 2]"), ("[1, 2", '"[1, 2"'), ("a\nb", '"a\\nb"')])
def test_tolerant_holds_only_the_values_that_may_be_two_things(flag: str, value: str, fragment: str) -> None:
    parser = StreamParser(thinking=False, policy="tolerant")
    parser.feed_text(OPENED + parameter("s", "text") + f'<｜DSML｜parameter name="a"{flag}>' + value)
    assert arguments_of(list(iter(parser.next_event, None))) == '{"s": "text", "a": '
    parser.feed_text("</｜DSML｜parameter>")
    assert parser.next_event() == ArgumentsText(0, fragment)


TOOLS = [{"function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}}]


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ([("arguments", '{"a": 1}')], {"a": 1}),
        ([("arguments", '{"a": 1}'), ("b", "x")], {"arguments": '{"a": 1}', "b": "x"}),
        ([("input", '{"a": 1}'), ("input", '{"b": 1}')], {"input": '{"b": 1}'}),
        ([("arguments", '{"c": 1}')], {"arguments": '{"c": 1}'}),
        ([("a", "x"), ("arguments", '{"a": 1}')], {"a": "x", "arguments": '{"a": 1}'}),
    ],
)
def test_a_possible_wrapper_is_held_until_it_is_one_or_none(
    values: list[tuple[str, str]], arguments: dict[str, object]
) -> None:
    text = OPENED + "".join(parameter(name, value) for name, value in values) + CLOSED + EOS
    events = events_of(StreamParser(thinking=False, policy="tolerant", tools=TOOLS), text)
    assert json.loads(arguments_of(events)) == arguments
    assert turn_of(events).calls[0].arguments == arguments
    parser = StreamParser(thinking=False, policy="tolerant", tools=TOOLS)
    parser.feed_text(OPENED + parameter(*values[0]))
    assert bool(arguments_of(list(iter(parser.next_event, None)))) is (values[0][0] == "a")


def test_a_body_that_is_no_parameter_is_dropped_once_there_is_one() -> None:
    text = OPENED + '{"b": 1}' + parameter("a", "x") + "loose" + CLOSED + EOS
    turn = parse_text(text, thinking=False, policy="tolerant")
    assert turn.calls == (ToolCall("f", {"a": "x"}, ParseStatus.RECOVERED),)


def test_strict_announces_no_call_before_the_whole_turn_is_sound() -> None:
    sound = OPENED + parameter("a", "x") + CLOSED + EOS
    parser = StreamParser(thinking=False)
    for character in sound:
        parser.feed_text(character)
    before = list(iter(parser.next_event, None))
    assert [event for event in before if isinstance(event, CallFinished)] == []
    parser.finish()
    assert list(iter(parser.next_event, None)) == [CallFinished(0, ToolCall("f", {"a": "x"}))]


@pytest.mark.parametrize("tail", ["x", f"{EOS}x", "\n"])
def test_strict_never_announces_a_call_of_a_turn_that_fails_behind_it(tail: str) -> None:
    events = events_of(StreamParser(thinking=False), OPENED + parameter("a", "x") + CLOSED + tail)
    assert [event for event in events if isinstance(event, CallFinished)] == []
    assert isinstance(events[-1], TurnFailed)


def test_tolerant_announces_a_call_when_its_end_is_read() -> None:
    parser = StreamParser(thinking=False, policy="tolerant")
    parser.feed_text(OPENED + parameter("a", "x") + "</｜DSML｜invoke>")
    assert list(iter(parser.next_event, None))[-1] == CallFinished(0, ToolCall("f", {"a": "x"}))
    parser.feed_text('<｜DSML｜invoke name="g">')
    parser.finish()
    started, failed = iter(parser.next_event, None)
    assert started == CallStarted(1, "g")
    assert isinstance(failed, TurnFailed)
    assert failed.error.rule == "truncated-call"


def test_an_error_says_line_column_and_what_follows_however_late_that_comes() -> None:
    text = "é\n\n" + OPENED + parameter("n", "{" + "x" * 500, ' string="false"') + CLOSED + EOS
    (error,) = {event.error for event in events_of(StreamParser(thinking=False), text) if isinstance(event, TurnFailed)}
    assert text[error.offset :].startswith("{xxx")
    assert error.line == text[: error.offset].count("\n") + 1 == 7
    assert error.column == len('<｜DSML｜parameter name="n" string="false">') + 1
    assert error.excerpt == text[error.offset - 30 : error.offset + 50]
    assert parse_text(text, thinking=False).error == error


def test_a_failed_turn_says_so_at_once_and_tells_it_when_the_excerpt_is_there() -> None:
    parser = StreamParser(thinking=False)
    parser.feed_text("ab<think>")
    assert parser.failed
    assert list(iter(parser.next_event, None)) == [ContentText("ab")]
    parser.feed_text("x" * 1000)
    (failed,) = iter(parser.next_event, None)
    assert isinstance(failed, TurnFailed)
    assert (failed.error.offset, failed.error.line, failed.error.column) == (2, 1, 3)
    parser.feed_text("ignored")
    parser.finish()
    assert parser.next_event() is None


@pytest.mark.parametrize("spaces_count", [3, SPACE_HELD_MAX, SPACE_HELD_MAX + 5])
def test_white_space_before_a_block_that_ends_reasoning_is_cut_up_to_a_bound(spaces_count: int) -> None:
    text = "why" + " " * spaces_count + OPENED.strip("\n") + CLOSED
    kept = "why" + " " * max(0, spaces_count - SPACE_HELD_MAX)
    for parts in ([text], text):
        events = joined(events_of(StreamParser(thinking=True, policy="tolerant"), parts))
        assert events[0] == ReasoningText(kept)
    unclosed = events_of(StreamParser(thinking=True, policy="tolerant"), "why" + " " * spaces_count)
    assert joined(unclosed) == [ReasoningText("why" + " " * spaces_count)]


@pytest.mark.parametrize("place", ["content", "value"])
def test_a_character_cut_by_a_token_border_comes_out_whole(place: str, tokenizer: Tokenizer) -> None:
    lead = sampled_ids(OPENED + '<｜DSML｜parameter name="a" string="true">', tokenizer) if place == "value" else []
    ids = tokenizer.encode_plain("热海🧑")
    assert len(ids) > 3, "the shipped tokenizer cuts these characters"
    parser = StreamParser(tokenizer, thinking=False)
    events = events_of(parser, [lead, *([token_id] for token_id in ids)])
    texts = [getattr(event, "text", None) or getattr(event, "json_text", "") for event in events]
    assert "".join(texts[: len(texts)]).endswith("热海🧑")
    assert [text for text in texts if "\ufffd" in text] == []


@pytest.mark.parametrize(
    "text", ["｜DSML｜DSML｜", "<<think>", "｜DSML｜DSML｜DSML｜x", "a<｜User", "<｜end▁of▁sentence"]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_spelling_cut_anywhere_is_read_as_in_the_whole(text: str, policy: Policy) -> None:
    whole = events_of(StreamParser(thinking=False, policy=policy), [text])
    for parts in ([text[:at], text[at:]] for at in range(len(text) + 1)):
        assert joined(events_of(StreamParser(thinking=False, policy=policy), parts)) == joined(whole)


def test_a_parser_used_out_of_order_is_refused(tokenizer: Tokenizer) -> None:
    for_ids, for_text = StreamParser(tokenizer, thinking=False), StreamParser(thinking=False)
    with pytest.raises(FeedError):
        for_ids.feed_text("a")
    with pytest.raises(FeedError):
        for_text.feed([1])
    for_ids.finish()
    for_text.finish()
    for_text.finish()
    with pytest.raises(FeedError):
        for_ids.feed([1])
    with pytest.raises(FeedError):
        for_text.feed_text("a")


@pytest.mark.parametrize("text", ["a", b"a"])
def test_text_in_place_of_ids_is_refused(text: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(FeedError, match=r"text is for feed_text\(\) or parse_text\(\)"):
        parse(text, tokenizer, thinking=False)


def test_ids_in_place_of_text_are_refused() -> None:
    ids: Any = [1]
    with pytest.raises(FeedError, match=r"ids are for feed\(\) or parse\(\)"):
        parse_text(ids, thinking=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_id_that_the_vocabulary_lacks_does_not_vanish(policy: Policy, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_plain("a"), -1, 10**9, tokenizer.control(EOS)]
    turn = parse(ids, tokenizer, thinking=False, policy=policy)
    assert (turn.content, turn.error) == ("a\ufffd\ufffd", None)


@cache
def ids_of_long_prose(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_plain("All work and no play makes <b>Jack</b> a dull boy.\n" * 40)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("lead", ["", "<think>"])
def test_memory_does_not_grow_with_the_prose_of_a_turn(
    policy: Policy, thinking: bool, lead: str, tokenizer: Tokenizer
) -> None:
    parser = StreamParser(tokenizer, thinking=thinking, policy=policy)
    parser.feed(sampled_ids(lead, tokenizer))
    ids = ids_of_long_prose(tokenizer)

    def feed_all() -> int:
        for _ in range(8):
            parser.feed(ids)
            while parser.next_event() is not None:
                pass
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    first, second, third = feed_all(), feed_all(), feed_all()
    tracemalloc.stop()
    assert third - second < 20_000
    assert third - first < 40_000
    assert parser.undecided_count <= 3
