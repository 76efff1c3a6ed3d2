"""The work that a schema from a stranger can ask for: counted before it is done, refused above the bounds."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from toolcall_dsl import Policy, SchemaError, ToolCall, ToolChecker, check_call
from toolcall_dsl.subschemas import ENTRIES_MAX, WORK_MAX

POLICIES: tuple[Policy, ...] = get_args(Policy)


def tool(name: str = "f", **schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def message_of(arguments: dict[str, Any], policy: Policy = "strict", **schema: Any) -> str:
    return check_call(ToolCall("f", arguments), [tool(**schema)], policy=policy).message


def test_alternatives_that_multiply_with_the_depth_of_the_value_do_not_multiply_the_work() -> None:
    twice = [{"type": kind, "items": {"$ref": "#/$defs/n"}} for kind in ("array", ["array"])]
    schema = {"$defs": {"n": {"oneOf": [*twice, {"type": "integer"}]}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    value: Any = 5
    for _ in range(60):
        value = [value]
    for policy in POLICIES:
        assert "too much work to check" in message_of({"a": value}, policy, **schema)
    assert message_of({"a": "x"}, **schema) == 'a: expected array or integer; found "x"'


def chain(count: int, *, named_by: str, reference: str = "$ref") -> dict[str, Any]:
    """Definitions that each refer twice to the next: 2 ** `count` ways to the last."""
    definitions: dict[str, Any] = {f"d{count}": {"type": "string"}}
    for index in range(count):
        definitions[f"d{index}"] = {"anyOf": [{reference: named_by.format(index + 1)}] * 2}
    for index in range(count + 1):
        definitions[f"d{index}"] |= {"$anchor": f"x{index}", "$dynamicAnchor": f"y{index}", "$id": f"i{index}"}
    keep = {"#x{}": "$anchor", "#y{}": "$dynamicAnchor", "i{}": "$id"}.get(named_by)
    for definition in definitions.values():
        for key in {"$anchor", "$dynamicAnchor", "$id"} - {keep}:
            del definition[key]
    return {"$defs": definitions, "properties": {"a": {reference: named_by.format(0)}}}


@pytest.mark.parametrize(
    ("named_by", "reference"),
    [
        ("#/$defs/d{}", "$ref"),
        ("#/%24defs/d{}", "$ref"),
        ("#x{}", "$ref"),
        ("i{}", "$ref"),
        ("#y{}", "$dynamicRef"),
        ("#/$defs/d{}", "$dynamicRef"),
    ],
)
def test_a_schema_with_too_many_ways_through_it_is_refused_however_its_parts_are_named(
    named_by: str, reference: str
) -> None:
    assert message_of({"a": 1}, **chain(8, named_by=named_by, reference=reference)) == "a: expected string; found 1"
    with pytest.raises(SchemaError, match="ways"):
        ToolChecker([tool(**chain(60, named_by=named_by, reference=reference))])


def test_a_long_schema_with_few_ways_is_none_too_many() -> None:
    definitions = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(2_000)}
    schema = {"$defs": definitions | {"d2000": {"type": "null"}}, "properties": {"a": {"$ref": "#/$defs/d0"}}}
    assert message_of({"a": 1}, **schema) == "a: expected null; found 1"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"not": {"$ref": "#"}}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"dependentSchemas": {"x": {"$ref": "#"}}}}},
        {"$recursiveRef": "#", "$schema": "https://json-schema.org/draft/2019-09/schema"},
    ],
)
def test_a_schema_that_leads_back_to_itself_in_place_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="without going into the value"):
        ToolChecker([tool(**schema)])


@pytest.mark.parametrize(
    ("reference", "places"),
    [
        ("#n", "more than one"),
        ("#m", "no"),
        ("e", "more than one"),
        ("sub/", "no"),
        ("#/$defs/0/none", "no"),
        ("#", "more than one"),
        ("http://json-schema.org/draft-07/schema#", "no"),
        ("#/$defs/none", "no"),
    ],
)
def test_a_reference_that_could_mean_several_places_is_refused(reference: str, places: str) -> None:
    definitions = {
        "0": [{"$id": "sub/", "$anchor": "n"}],
        "1": {"$id": "http://x.invalid/e", "$anchor": "n"},
        "2": {"$id": "y/e#m2"},
    }
    with pytest.raises(SchemaError, match=f"leads to {places} place"):
        ToolChecker([tool(properties={"a": {"$ref": reference}}, **{"$defs": definitions})])


def test_a_schema_document_is_bounded_even_if_it_holds_itself() -> None:
    endless: dict[str, Any] = {}
    endless["properties"] = {"a": endless}
    for schema in (endless, {"enum": list(range(ENTRIES_MAX))}):
        with pytest.raises(SchemaError, match=f"more than {ENTRIES_MAX} entries"):
            ToolChecker([tool(**schema)])


def test_a_schema_that_recurs_is_checked_as_deep_as_the_value_goes() -> None:
    inner = {"$ref": "#/$defs/n"}
    tree = {"type": "object", "properties": {"left": inner, "right": inner, "n": {"type": "integer"}}}
    shapes = [{"type": "integer"}, {"type": "array", "items": inner}, {"type": "object", "additionalProperties": inner}]
    for definition in (tree | {"additionalProperties": inner}, {"anyOf": shapes}):
        value: Any = {"n": 1}
        for _ in range(60):
            value = {"left": value, "right": {"n": 2}}
        schema = {"$defs": {"n": definition}, "properties": {"a": inner}}
        assert not message_of({"a": value}, **schema)
        assert message_of({"a": {"left": {"n": "x"}}}, **schema)


def test_a_value_that_is_too_much_work_is_a_problem_and_not_a_wait() -> None:
    many = [{"enum": list(range(90_000))}]
    assert "too much work to check" in message_of({"a": [1] * 1_000}, properties={"a": {"items": many[0]}})
    assert "too much work to check" in message_of({"a": [1] * (WORK_MAX + 1)}, properties={})
    named = {"propertyNames": {"maxLength": 9}, "patternProperties": {"^x": {"allOf": [{"type": "null"}] * 3_000}}}
    assert "too much work to check" in message_of({f"x{index}": None for index in range(200)}, **named)


@pytest.mark.parametrize("policy", POLICIES)
def test_of_very_many_misfits_the_first_is_told(policy: Policy) -> None:
    wrong = {"a": [1.5] * 50_000}
    assert message_of(wrong, policy, properties={"a": {"items": {"type": "string"}}}) == (
        "a[0]: expected string; found 1.5"
    )
    either = {"items": {"anyOf": [{"type": "string"}, {"type": "null"}]}}
    assert "too much work to say where" in message_of(wrong, policy, properties={"a": either})


def test_a_conversion_that_makes_the_call_too_much_work_is_not_made() -> None:
    schema = {"properties": {"a": {"type": "array", "items": {"enum": list(range(9_000))}}}}
    call = ToolCall("f", {"a": json.dumps([1] * 90_000)})
    checked = check_call(call, [tool(**schema)], policy="tolerant")
    assert checked.call is call
    assert [problem.path for problem in checked.problems] == ["a"]
