"""Laws of the language: what is rendered is read back, splits do not matter, garbage is only garbage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from hypothesis import given
from hypothesis import strategies as st

from toolcall_dsl import (
    DIALECTS,
    RULES,
    ArgumentsText,
    CallFinished,
    Dialect,
    ParsedTurn,
    ParseStatus,
    Policy,
    SpanKind,
    StreamParser,
    Tokenizer,
    TurnEvent,
    TurnFailed,
    encode,
    encode_results,
    encode_text,
    parse,
    parse_text,
    token_ids_of,
    turn_of,
)
from toolcall_dsl.scanner import UNDECIDED_UNITS_MAX
from toolcall_dsl.testing import events_of, joined

TOKENIZER_FILE = Path(__file__).parents[2] / "rollout/engines/embedded/checkpoint/tokenizer.json"
POLICIES: tuple[Policy, ...] = get_args(Policy)
SAMPLED_KINDS = {SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_TEXT, SpanKind.SAMPLED_CALL}


def tags_of(dialect: Dialect) -> list[str]:
    opener = f"<{dialect.dsml}"
    parameter = f'{opener}{dialect.parameter_name} name="'
    return [
        f"\n\n{opener}{dialect.block_name}>\n",
        f"{opener}toolcalls>",
        f'{opener}{dialect.invoke_name} name="f">\n',
        f'{opener}{dialect.invoke_name} name="',
        *(f'{parameter}{name}" string="{flag}">' for name in ("a", "arguments") for flag in ("true", "false")),
        f'{parameter}c">',
        *(f"</{dialect.dsml}{name}>\n" for name in (dialect.parameter_name, dialect.invoke_name)),
        f"</{dialect.dsml}{dialect.block_name}>",
    ]


EDGES = [
    "<",
    "</",
    ">",
    ">\n",
    "\n",
    "\n\n",
    "\n\n<",
    '">\n',
    "tool_calls",
    "invoke",
    "parameter",
    "1",
    '{"a": 1}',
    "  ",
]
DIALECT_LIST = list(DIALECTS.values())
TAGS = [tag for dialect in DIALECT_LIST for tag in tags_of(dialect)]
CONTROLS = [token for dialect in DIALECT_LIST for token in dialect.control_tokens]
TOOLS = [{"function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}}]

dialects = st.sampled_from(DIALECT_LIST)
policies = st.sampled_from(POLICIES)
hostile = st.sampled_from([*CONTROLS, *TAGS, *EDGES])
prose = st.lists(st.one_of(st.text(max_size=20), hostile), max_size=6).map("".join)
names = st.text(st.characters(exclude_characters='"\n', exclude_categories=["Cs"]), min_size=1, max_size=20)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), prose),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(prose, inner, max_size=3)),
    max_leaves=6,
)
calls = st.lists(st.tuples(names, st.dictionaries(names, json_values, max_size=3)), max_size=3)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(TOKENIZER_FILE)


def assistant(reasoning: str, content: str, wanted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in wanted]
    tool_calls = [{"id": f"c{i}", "function": function} for i, function in enumerate(functions)]
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": tool_calls}


def assert_spans_cover(turn: ParsedTurn, count: int) -> None:
    assert sum(span.length for span in turn.spans) == count
    assert [span for span in turn.spans if not (span.length > 0 and span.kind in SAMPLED_KINDS)] == []
    assert [
        (before, after) for before, after in pairwise(turn.spans) if before.start + before.length != after.start
    ] == []
    assert not turn.spans or turn.spans[0].start == 0


def rendered(message: dict[str, Any], *, thinking: bool, dialect: Dialect) -> list[int]:
    """Ids of an assistant turn as this package writes it, reasoning kept."""
    context: list[dict[str, Any]] = [{"role": "user", "content": ""}]
    return token_ids_of(
        encode([message], tokenizer(), thinking=thinking, context=context, drop_thinking=False, dialect=dialect)
    )


def pieces(whole: Sequence[Any], cuts: Sequence[int]) -> list[Any]:
    borders = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(borders)]


def assert_sound(events: Sequence[TurnEvent], turn: ParsedTurn, policy: Policy) -> None:
    """What the laws say of the events of any turn at all."""
    told = turn_of(events)
    assert (told.reasoning, told.content, told.calls, told.error) == (
        turn.reasoning,
        turn.content,
        turn.calls,
        turn.error,
    )
    assert [event for event in events[:-1] if isinstance(event, TurnFailed)] == []
    for event in events:
        if isinstance(event, CallFinished):
            texts = [e.json_text for e in events if isinstance(e, ArgumentsText) and e.index == event.index]
            assert json.loads("".join(texts)) == event.call.arguments
    if turn.error is not None:
        assert turn.error.rule in RULES
        assert len(turn.error.excerpt) <= 80
        assert policy == "tolerant" or turn.calls == ()


@given(
    reasoning=prose,
    content=prose,
    wanted=calls,
    thinking=st.booleans(),
    policy=policies,
    dialect=dialects,
    cuts=st.lists(st.integers(0, 10_000), max_size=5),
)
def test_a_rendered_turn_is_read_back_whatever_it_says_and_however_it_is_split(
    reasoning: str,
    content: str,
    wanted: list[tuple[str, dict[str, Any]]],
    thinking: bool,
    policy: Policy,
    dialect: Dialect,
    cuts: list[int],
) -> None:
    ids = rendered(assistant(reasoning, content, wanted), thinking=thinking, dialect=dialect)
    turn = parse(ids, tokenizer(), thinking=thinking, policy=policy, dialect=dialect)
    assert turn.error is None
    assert (turn.reasoning, turn.content) == (reasoning if thinking else "", content)
    assert [(call.name, call.arguments) for call in turn.calls] == wanted
    assert [call for call in turn.calls if call.status is not ParseStatus.OK] == []
    assert_spans_cover(turn, len(ids))
    for parts in (pieces(ids, cuts), pieces(ids, range(len(ids)))):
        parser = StreamParser(tokenizer(), thinking=thinking, policy=policy, dialect=dialect)
        assert_sound(events_of(parser, parts), turn, policy)
        assert parser.spans() == turn.spans


@given(
    ids=st.lists(st.integers(-2, 4200), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    thinking=st.booleans(),
    policy=policies,
    dialect=dialects,
)
def test_garbage_tokens_give_a_turn_or_a_named_rule_within_bounds(
    ids: list[int], cuts: list[int], thinking: bool, policy: Policy, dialect: Dialect
) -> None:
    turn = parse(ids, tokenizer(), thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
    assert_spans_cover(turn, len(ids))
    parser = StreamParser(tokenizer(), thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
    events = events_of(parser, pieces(ids, cuts))
    assert_sound(events, turn, policy)
    assert parser.spans() == turn.spans


@given(
    message=st.builds(assistant, prose, prose, calls),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.integers(-1, 4200)), max_size=4),
    thinking=st.booleans(),
    policy=policies,
    dialect=dialects,
)
def test_a_damaged_turn_reads_the_same_whole_and_token_by_token(
    message: dict[str, Any], edits: list[tuple[int, int, int]], thinking: bool, policy: Policy, dialect: Dialect
) -> None:
    ids = rendered(message, thinking=thinking, dialect=dialect)
    for position, removed, token_id in edits:
        at = position % (len(ids) + 1)
        ids[at : at + removed] = [token_id] if token_id >= 0 else []
    turn = parse(ids, tokenizer(), thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
    assert_spans_cover(turn, len(ids))
    parser = StreamParser(tokenizer(), thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
    assert_sound(events_of(parser, [[token_id] for token_id in ids]), turn, policy)
    assert parser.spans() == turn.spans


@given(data=st.data(), thinking=st.booleans(), policy=policies, dialect=dialects)
def test_however_a_text_is_split_its_events_are_the_same_few_and_soon(
    data: st.DataObject, thinking: bool, policy: Policy, dialect: Dialect
) -> None:
    part = st.sampled_from([*tags_of(dialect), *EDGES, "x", "é", dialect.eos, dialect.think_close, dialect.think_open])
    text = "".join(data.draw(st.lists(part, max_size=25)))
    cuts = data.draw(st.lists(st.integers(0, 1000), max_size=6))

    def events(parts: Sequence[str]) -> list[TurnEvent]:
        parser = StreamParser(thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
        found: list[TurnEvent] = []
        for piece in parts:
            parser.feed_text(piece)
            assert parser.undecided_count <= UNDECIDED_UNITS_MAX
            found += iter(parser.next_event, None)
        parser.finish()
        return [*found, *iter(parser.next_event, None)]

    whole = events([text])
    assert len(whole) <= 2 * len(text) + 2
    assert joined(events(pieces(text, cuts))) == joined(events(text)) == joined(whole)
    turn = parse_text(text, thinking=thinking, policy=policy, tools=TOOLS, dialect=dialect)
    assert_sound(whole, turn, policy)


@given(results=st.lists(prose, min_size=1, max_size=4), thinking=st.booleans(), reasoning=prose, content=prose)
def test_results_alone_are_the_tail_of_the_conversation(
    results: list[str], thinking: bool, reasoning: str, content: str
) -> None:
    wanted: list[tuple[str, dict[str, Any]]] = [("f", {"a": result}) for result in results]
    before: list[dict[str, Any]] = [
        {"role": "system", "content": "s", "tools": [{"function": {"name": "f"}}]},
        {"role": "user", "content": content},
        assistant(reasoning, content, wanted),
    ]
    answers: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": f"c{i}", "content": result} for i, result in enumerate(results)
    ]
    tail = token_ids_of(encode_results(results, tokenizer(), thinking=thinking))
    head = token_ids_of(encode(before, tokenizer(), thinking=thinking))
    whole = token_ids_of(encode([*before, *reversed(answers)], tokenizer(), thinking=thinking))
    assert head + tail == whole
    assert tokenizer().decode(whole) == encode_text([*before, *answers], thinking=thinking)
