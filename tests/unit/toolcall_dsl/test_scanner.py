"""The scanners: text leaves as soon as it is decided, and little is ever held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from toolcall_dsl import DIALECTS, Dialect, Policy, Tokenizer, parse
from toolcall_dsl.scanner import HEADER_UNITS_MAX, UNDECIDED_UNITS_MAX, Chunk, Event, Marks, Place, Scanner
from toolcall_dsl.stream import scanner_for
from toolcall_dsl.tokenizer import UnitMap

CALL = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
POLICIES: tuple[Policy, ...] = get_args(Policy)


def tag(dialect: Dialect, name: str, rest: str, *, closes: bool = False) -> str:
    return f"<{'/' * closes}{dialect.dsml}{name}{rest}"


def opened_value(dialect: Dialect) -> str:
    block = tag(dialect, dialect.block_name, ">\n")
    invoke = tag(dialect, dialect.invoke_name, ' name="f">\n')
    return "\n\n" + block + invoke + tag(dialect, dialect.parameter_name, ' name="a" string="true">')


def fed(scanner: Scanner, unit_map: UnitMap, text: str) -> list[Event]:
    scanner.feed(unit_map.units(text))
    return list(iter(scanner.next_event, None))


@pytest.fixture(params=DIALECTS.values(), ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    found: Dialect = request.param
    return found


@pytest.fixture
def unit_map(dialect: Dialect) -> UnitMap:
    return UnitMap((*dialect.control_tokens, "<｜another｜>"))


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    found: Policy = request.param
    return found


@pytest.fixture
def scanner(dialect: Dialect, unit_map: UnitMap, policy: Policy) -> Scanner:
    return scanner_for(Marks(dialect, unit_map), thinking=False, policy=policy)


def test_text_that_cannot_be_a_tag_comes_out_at_once(scanner: Scanner, unit_map: UnitMap) -> None:
    for part in ("2 < 3", " and\n", "\nso on"):
        scanner.feed(unit_map.units(part))
    assert scanner.next_event() == Chunk(Place.CONTENT, "2 < 3 and\n\nso on", 0)


def test_a_long_value_streams_while_it_is_sampled(scanner: Scanner, unit_map: UnitMap, dialect: Dialect) -> None:
    fed(scanner, unit_map, opened_value(dialect))
    for _ in range(100):
        (event,) = fed(scanner, unit_map, "line\n")
        assert isinstance(event, Chunk)
        assert event.place is Place.VALUE


@pytest.mark.parametrize("filler", ["x", "<", "\n\n", "</", "<｜another｜>", 'name="a" string="true">'])
@pytest.mark.parametrize("lead", ["text", "\n\n", "block", "value"])
def test_what_is_undecided_is_bounded_in_every_state(
    scanner: Scanner, unit_map: UnitMap, dialect: Dialect, lead: str, filler: str
) -> None:
    inside = {"block": "\n\n" + tag(dialect, dialect.block_name, ">\n"), "value": opened_value(dialect)}
    fed(scanner, unit_map, "long " * 5000 + inside.get(lead, lead))
    for name in (dialect.block_name, dialect.invoke_name, dialect.parameter_name):
        for opener in (tag(dialect, name, ""), tag(dialect, name, ' name="'), tag(dialect, name, "", closes=True)):
            fed(scanner, unit_map, "long " * 5000 + "\n\n" + opener)
            assert scanner.undecided_count <= UNDECIDED_UNITS_MAX
            for _ in range(2 * HEADER_UNITS_MAX // len(filler)):
                fed(scanner, unit_map, filler)
                assert scanner.undecided_count <= UNDECIDED_UNITS_MAX


def test_text_before_an_undecided_tag_is_not_held(scanner: Scanner, unit_map: UnitMap, dialect: Dialect) -> None:
    opener = "\n\n" + tag(dialect, dialect.block_name[:-2], "")
    assert fed(scanner, unit_map, "done." * 100 + opener) == [Chunk(Place.CONTENT, "done." * 100, 0)]
    assert scanner.undecided_count == len(unit_map.units(opener))


def test_the_control_tokens_of_the_default_dialect_are_all_in_the_shipped_vocabulary(tokenizer: Tokenizer) -> None:
    for spelling in DIALECTS["v4"].control_tokens:
        assert tokenizer.control(spelling) in tokenizer.control_ids


def test_a_vocabulary_without_the_markers_reads_everything_as_text(tokenizer_file: Path, tmp_path: Path) -> None:
    definition = json.loads(tokenizer_file.read_text())
    definition["added_tokens"] = [entry for entry in definition["added_tokens"] if entry["special"]]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(definition))
    tokenizer = Tokenizer.from_file(bare)
    turn = parse(tokenizer.encode_plain(CALL), tokenizer, thinking=False, policy="tolerant")
    assert (turn.content, turn.calls) == (CALL, ())
