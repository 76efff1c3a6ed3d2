"""Whether a turn ended by itself or was cut off: said under both policies, whatever else it is."""

from __future__ import annotations

from typing import get_args

import pytest

from toolcall_dsl import DIALECTS, V4, Dialect, ParsedTurn, Policy, StreamParser, Tokenizer, parse, parse_text
from toolcall_dsl.testing import events_of, sampled_ids

EOS = V4.eos
POLICIES: tuple[Policy, ...] = get_args(Policy)


def block(dialect: Dialect = V4) -> str:
    inner = f'<{dialect.dsml}{dialect.invoke_name} name="f">\n\n</{dialect.dsml}{dialect.invoke_name}>\n'
    return f"\n\n<{dialect.dsml}{dialect.block_name}>\n{inner}</{dialect.dsml}{dialect.block_name}>"


INVOKE = '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>'
COMPLETE = ["a" + EOS, EOS, "a" + block(), block() + EOS, block() + "x" + EOS, block().replace("invoke", "x", 1) + EOS]
CUT_OFF = [
    "",
    "a",
    block()[:-1],
    block() + "\n",
    block() + "a",
    block() + block()[:-9],
    INVOKE,
    "a<｜DSML｜",
    "a<｜end▁of▁",
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", COMPLETE)
def test_a_turn_that_ended_by_itself_is_complete(text: str, policy: Policy, tokenizer: Tokenizer) -> None:
    assert parse_text(text, thinking=False, policy=policy).is_complete
    assert parse(sampled_ids(text, tokenizer), tokenizer, thinking=False, policy=policy).is_complete


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", CUT_OFF)
def test_a_turn_that_was_cut_off_is_not(text: str, policy: Policy, tokenizer: Tokenizer) -> None:
    assert not parse_text(text, thinking=False, policy=policy).is_complete
    assert not parse(sampled_ids(text, tokenizer), tokenizer, thinking=False, policy=policy).is_complete


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_a_turn_may_stop_right_behind_its_block_in_every_dialect(dialect: Dialect, policy: Policy) -> None:
    turn = parse_text("a" + block(dialect), thinking=False, policy=policy, dialect=dialect)
    assert (turn.is_complete, turn.error, len(turn.calls)) == (True, None, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_reasoning_that_never_closed_was_cut_off_unless_the_end_token_came(policy: Policy) -> None:
    assert not parse_text("why", thinking=True, policy=policy).is_complete
    assert parse_text("why" + EOS, thinking=True, policy=policy).is_complete


@pytest.mark.parametrize("policy", POLICIES)
def test_a_spelled_end_token_ends_no_turn(policy: Policy, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("a" + EOS)
    assert not parse(ids, tokenizer, thinking=False, policy=policy).is_complete


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", [*COMPLETE, *CUT_OFF])
def test_splits_change_nothing(text: str, policy: Policy) -> None:
    parser = StreamParser(thinking=False, policy=policy)
    events_of(parser, text)
    assert parser.is_complete == parse_text(text, thinking=False, policy=policy).is_complete


def test_a_parser_says_it_as_soon_as_it_is_so() -> None:
    parser = StreamParser(thinking=False)
    told = []
    for part in ("a", block(), EOS):
        parser.feed_text(part)
        while parser.next_event() is not None:
            pass
        told.append(parser.is_complete)
    assert told == [False, True, True]


def test_a_turn_of_which_nobody_said_it_is_not_complete() -> None:
    assert not ParsedTurn("", "", (), None, ()).is_complete
