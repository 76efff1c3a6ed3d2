"""The incremental scanner: however a turn is split, the events are the same; little is held back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from toolcall_dsl import V4, Policy, Tokenizer, scanner_for
from toolcall_dsl.scanner import HEADER_UNITS_MAX, Chunk, Place
from toolcall_dsl.testing import events_of

GOLDEN = Path(__file__).parents[2] / "golden/dsml/parse"
CASES = {
    case["id"]: (case["completion_text"], case["thinking_mode"] == "thinking")
    for name in ("reference_strict.json", "tolerant_expected.json")
    for case in json.loads((GOLDEN / name).read_text())
}
POLICIES: tuple[Policy, ...] = get_args(Policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_any_split_gives_the_events_of_the_whole(name: str, policy: Policy, tokenizer: Tokenizer) -> None:
    text, thinking = CASES[name]
    for units in (tokenizer.unit_map.units(text), tokenizer.unit_map.units(text).replace("\n\n", "\n")):
        whole = events_of([units], tokenizer.unit_map, thinking=thinking, policy=policy)
        assert events_of(units, tokenizer.unit_map, thinking=thinking, policy=policy) == whole
        for at in range(1, len(units)):
            assert events_of([units[:at], units[at:]], tokenizer.unit_map, thinking=thinking, policy=policy) == whole


@pytest.mark.parametrize("policy", POLICIES)
def test_text_that_cannot_be_a_tag_comes_out_at_once(policy: Policy, tokenizer: Tokenizer) -> None:
    scanner = scanner_for(tokenizer.unit_map, thinking=False, policy=policy)
    for part in ("2 < 3", " and\n", "\nso on"):
        scanner.feed(part)
    event = scanner.next_event()
    assert event == Chunk(Place.CONTENT, "2 < 3 and\n\nso on", 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_value_streams_while_it_is_sampled(policy: Policy, tokenizer: Tokenizer) -> None:
    opened = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">'
    scanner = scanner_for(tokenizer.unit_map, thinking=False, policy=policy)
    scanner.feed(tokenizer.unit_map.units(opened))
    while scanner.next_event() is not None:
        pass
    for _ in range(100):
        scanner.feed("line\n")
        event = scanner.next_event()
        assert isinstance(event, Chunk)
        assert event.place is Place.VALUE
        assert scanner.next_event() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_header_that_never_ends_is_given_up_at_its_bound(policy: Policy, tokenizer: Tokenizer) -> None:
    opened = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="'
    scanner = scanner_for(tokenizer.unit_map, thinking=False, policy=policy)
    scanner.feed(tokenizer.unit_map.units(opened))
    while scanner.next_event() is not None:
        pass
    fed = 0
    while scanner.undecided_count < HEADER_UNITS_MAX and fed < 2 * HEADER_UNITS_MAX:
        scanner.feed("x")
        scanner.next_event()
        fed += 1
    scanner.feed("x" * 100)
    scanner.next_event()
    scanner.feed("")
    assert scanner.undecided_count < HEADER_UNITS_MAX


def test_the_control_tokens_of_the_dialect_are_all_in_the_shipped_vocabulary(tokenizer: Tokenizer) -> None:
    for spelling in V4.control_tokens:
        assert tokenizer.control(spelling) in tokenizer.control_ids
