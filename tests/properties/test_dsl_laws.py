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
    RULES,
    V4,
    ParsedTurn,
    ParseStatus,
    Policy,
    Segment,
    SpanKind,
    Tokenizer,
    encode,
    encode_results,
    encode_text,
    parse,
    parse_text,
)
from toolcall_dsl.testing import events_of

TOKENIZER_FILE = Path(__file__).parents[2] / "rollout/engines/embedded/checkpoint/tokenizer.json"
POLICIES: tuple[Policy, ...] = get_args(Policy)
SAMPLED_KINDS = {SpanKind.SAMPLED_THINK, SpanKind.SAMPLED_TEXT, SpanKind.SAMPLED_CALL}
TAGS = [
    "\n\n<｜DSML｜tool_calls>\n",
    "<｜DSML｜toolcalls>",
    '<｜DSML｜invoke name="f">\n',
    '<｜DSML｜invoke name="',
    '<｜DSML｜parameter name="a" string="true">',
    '<｜DSML｜parameter name="b" string="false">',
    '<｜DSML｜parameter name="c">',
    "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>\n",
    "</｜DSML｜tool_calls>",
]
EDGES = ["<", "</", ">", ">\n", "\n", "\n\n", "\n\n<", '">\n', "tool_calls", "invoke", "parameter", "1", '{"a": 1}']

hostile = st.sampled_from([*V4.control_tokens, *TAGS, *EDGES])
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


def ids_of(segments: Sequence[Segment]) -> list[int]:
    return [token_id for segment in segments for token_id in segment.token_ids]


def assistant(reasoning: str, content: str, wanted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in wanted]
    tool_calls = [{"id": f"c{i}", "function": function} for i, function in enumerate(functions)]
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": tool_calls}


def assert_spans_cover(turn: ParsedTurn, count: int) -> None:
    assert sum(span.length for span in turn.spans) == count
    assert all(span.length > 0 and span.kind in SAMPLED_KINDS for span in turn.spans)
    assert all(before.start + before.length == after.start for before, after in pairwise(turn.spans))
    assert not turn.spans or turn.spans[0].start == 0


@given(reasoning=prose, content=prose, wanted=calls, thinking=st.booleans(), policy=st.sampled_from(POLICIES))
def test_a_rendered_turn_is_read_back_whatever_it_says(
    reasoning: str, content: str, wanted: list[tuple[str, dict[str, Any]]], thinking: bool, policy: Policy
) -> None:
    message = assistant(reasoning, content, wanted)
    context: list[dict[str, Any]] = [
        {"role": "system", "content": "", "tools": [{"function": {"name": "f"}}]},
        {"role": "user"},
    ]
    ids = ids_of(encode([message], tokenizer(), thinking=thinking, context=context))
    turn = parse(ids, tokenizer(), thinking=thinking, policy=policy)
    assert turn.error is None
    assert (turn.reasoning, turn.content) == (reasoning if thinking else "", content)
    assert [(call.name, call.arguments) for call in turn.calls] == wanted
    assert all(call.status is ParseStatus.OK for call in turn.calls)
    assert_spans_cover(turn, len(ids))


@given(ids=st.lists(st.integers(-2, 4200), max_size=60), thinking=st.booleans(), policy=st.sampled_from(POLICIES))
def test_garbage_tokens_give_a_turn_or_a_named_rule(ids: list[int], thinking: bool, policy: Policy) -> None:
    turn = parse(ids, tokenizer(), thinking=thinking, policy=policy)
    assert turn.error is None or (turn.error.rule in RULES and len(turn.error.excerpt) <= 80)
    assert policy == "tolerant" or turn.error is None or turn.calls == ()
    assert_spans_cover(turn, len(ids))


@given(
    parts=st.lists(st.sampled_from([*TAGS, *EDGES, "x", "é", V4.eos, V4.think_close, V4.think_open]), max_size=25),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    thinking=st.booleans(),
    policy=st.sampled_from(POLICIES),
)
def test_however_a_turn_is_split_it_reads_the_same(
    parts: list[str], cuts: list[int], thinking: bool, policy: Policy
) -> None:
    unit_map = tokenizer().unit_map
    units = unit_map.units("".join(parts))
    borders = [0, *sorted(cut for cut in cuts if cut < len(units)), len(units)]
    pieces = [units[start:end] for start, end in pairwise(borders)]
    whole = events_of([units], unit_map, thinking=thinking, policy=policy)
    assert events_of(pieces, unit_map, thinking=thinking, policy=policy) == whole
    assert events_of(list(units), unit_map, thinking=thinking, policy=policy) == whole
    turn = parse_text("".join(parts), thinking=thinking, policy=policy)
    assert turn.error is None or turn.error.rule in RULES


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
    tail = ids_of(encode_results(results, tokenizer(), thinking=thinking))
    head = ids_of(encode(before, tokenizer(), thinking=thinking))
    whole = ids_of(encode([*before, *reversed(answers)], tokenizer(), thinking=thinking))
    assert head + tail == whole
    assert tokenizer().decode(whole) == encode_text([*before, *answers], thinking=thinking)
