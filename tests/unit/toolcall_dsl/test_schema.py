"""A call against its tool's schema: what a model is told, what is converted, and schemas from strangers."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolcall_dsl import (
    DslError,
    ParseStatus,
    Policy,
    SchemaError,
    ToolCall,
    ToolChecker,
    check_call,
    parse_text,
)
from toolcall_dsl.schema import PROBLEMS_MAX, TEXT_MAX

POLICIES: tuple[Policy, ...] = get_args(Policy)


def tool(name: str = "f", **schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def message_of(arguments: dict[str, Any], policy: Policy = "strict", **schema: Any) -> str:
    return check_call(ToolCall("f", arguments), [tool(**schema)], policy=policy).message


@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_that_fits_is_given_back_as_it_is(policy: Policy) -> None:
    call = ToolCall("f", {"command": "ls", "n": 5, "more": [1.5, None]}, ParseStatus.RECOVERED)
    schema = {"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}}}
    checked = check_call(call, [tool(**schema)], policy=policy)
    assert checked.fits
    assert checked.call is call
    assert (checked.message, checked.conversions) == ("", ())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("schema", "arguments", "message"),
    [
        ({"required": ["d"]}, {}, 'call: expected a value for "d"; found none'),
        (
            {"properties": {"a": {}}, "additionalProperties": False},
            {"a": 1, "b": 2},
            'call: expected no other properties; found "b"',
        ),
        (
            {"properties": {"a": {}}, "unevaluatedProperties": False},
            {"b": 2},
            'call: expected no other properties; found "b"',
        ),
        ({"properties": {"a": {"type": "integer"}}}, {"a": "x"}, 'a: expected integer; found "x"'),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1.5}, "a: expected integer; found 1.5"),
        ({"properties": {"a": {"type": ["array", "null"]}}}, {"a": {}}, "a: expected array or null; found {}"),
        ({"properties": {"a": {"enum": ["x", "y"]}}}, {"a": "z"}, 'a: expected one of ["x", "y"]; found "z"'),
        ({"properties": {"a": {"const": 4}}}, {"a": 5}, "a: expected const 4; found 5"),
        ({"properties": {"a": {"minimum": 3}}}, {"a": 2}, "a: expected minimum 3; found 2"),
        ({"properties": {"a": {"pattern": "^x"}}}, {"a": "y"}, 'a: expected pattern "^x"; found "y"'),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, 1]}, "a: expected no item twice; found [1, 1]"),
        ({"properties": {"a": False}}, {"a": 1}, "a: expected nothing here; found 1"),
        (
            {"properties": {"a": {"oneOf": [{"type": "integer"}, {"minimum": 0}]}}},
            {"a": 5},
            "a: expected a value that fits only one of the alternatives; found 5",
        ),
        (
            {"properties": {"a": {"anyOf": [{"type": "null"}, {"properties": {"x": {"type": "null"}}}]}}},
            {"a": {"x": 1}},
            'a: expected null or x: null; found {"x": 1}',
        ),
        (
            {"properties": {"a": {"items": {"properties": {"b": {"type": "null"}}}}}},
            {"a": [{}, {"b": 1}]},
            "a[1].b: expected null; found 1",
        ),
    ],
)
def test_a_problem_says_where_it_is_what_was_expected_and_what_was_found(
    schema: dict[str, Any], arguments: dict[str, Any], message: str, policy: Policy
) -> None:
    assert message_of(arguments, policy, **schema) == message


@pytest.mark.parametrize("policy", POLICIES)
def test_an_unknown_tool_is_told_with_the_tools_there_are(policy: Policy) -> None:
    checked = check_call(ToolCall("rm", {}), [tool("bash"), tool("edit")], policy=policy)
    assert not checked.fits
    assert checked.message == "call: expected a declared tool ('bash', 'edit'); found \"rm\""
    assert "none is declared" in check_call(ToolCall("rm", {}), []).message


def test_a_tool_without_parameters_takes_any() -> None:
    for function in ({"name": "f"}, {"name": "f", "parameters": {}}):
        assert check_call(ToolCall("f", {"a": 1}), [{"function": function}]).fits


def test_what_a_model_is_told_is_bounded_whatever_it_wrote() -> None:
    names = {f"p{i}" * 100: {"type": "null"} for i in range(50)}
    checked = check_call(ToolCall("f", dict.fromkeys(names, "v" * 10_000)), [tool(properties=names)])
    assert len(checked.problems) == PROBLEMS_MAX
    for problem in checked.problems:
        assert max(map(len, (problem.path, problem.expected, problem.found))) <= TEXT_MAX
    extras = check_call(ToolCall("f", dict.fromkeys(names, 1)), [tool(additionalProperties=False)])
    assert len(extras.message) <= 3 * TEXT_MAX


def test_the_call_as_a_whole_is_told_before_its_parts() -> None:
    properties = {f"p{i}": {"type": "null"} for i in range(PROBLEMS_MAX)}
    message = message_of(dict.fromkeys(properties, 1), properties=properties, required=["z"])
    assert message.startswith('call: expected a value for "z"')


@pytest.mark.parametrize(
    ("schema", "before", "after"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "integer", "enum": [5, 6]}, "5", 5),
        ({"type": "number"}, "-0.5", -0.5),
        ({"type": "integer"}, "5.0", 5.0),
        ({"type": "integer"}, "12345678901234567890", 12345678901234567890),
        ({"type": "boolean"}, "true", True),
        ({"type": "null"}, "null", None),
        ({"type": "array"}, ' ["a"] ', ["a"]),
        ({"type": "object"}, '{"x": "1"}', {"x": "1"}),
        ({"type": "string"}, 5, "5"),
        ({"type": "string"}, True, "true"),
        ({"type": ["string", "null"]}, 7, "7"),
        ({"enum": ["1", "2"]}, 2, "2"),
        ({"const": 3}, "3", 3),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", 3),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "false", False),
        ({"type": "array", "items": {"type": "integer"}}, '["1", 2]', [1, 2]),
        ({"$ref": "#/$defs/n"}, "1", 1),
    ],
)
def test_tolerant_converts_what_loses_nothing_and_says_so(schema: dict[str, Any], before: Any, after: Any) -> None:
    whole = {"properties": {"a": schema}, "$defs": {"n": {"type": "integer"}}}
    call = ToolCall("f", {"a": before, "b": "5"})
    checked = check_call(call, [tool(**whole)], policy="tolerant")
    assert checked.call == ToolCall("f", {"a": after, "b": "5"}, ParseStatus.CONVERTED)
    assert type(checked.call.arguments["a"]) is type(after)
    assert checked.conversions[0] == "a"
    assert call.arguments["a"] == before
    strict = check_call(call, [tool(**whole)])
    assert strict.call is call
    assert not strict.fits


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, "5.5"),
        ({"type": "integer"}, "five"),
        ({"type": "integer"}, "05"),
        ({"type": "integer"}, " 5"),
        ({"type": "number"}, "1e3"),
        ({"type": "number"}, "0.10000000000000000001"),
        ({"type": "boolean"}, "True"),
        ({"type": "boolean"}, 1),
        ({"type": "string"}, 1.5),
        ({"type": "string"}, None),
        ({"type": "string"}, {"x": 1}),
        ({"type": "integer", "minimum": 10}, "5"),
        ({"type": "array", "items": {"type": "integer"}}, '["x"]'),
        ({"type": "string"}, ["a"]),
        ({"pattern": "^x"}, "5"),
        ({"type": "integer"}, '"5"'),
    ],
)
def test_a_conversion_that_would_lose_or_not_fit_is_not_made(schema: dict[str, Any], value: Any) -> None:
    call = ToolCall("f", {"a": value})
    checked = check_call(call, [tool(properties={"a": schema})], policy="tolerant")
    assert checked.call is call
    assert not checked.fits


def test_a_call_is_converted_whole_or_not_at_all() -> None:
    call = ToolCall("f", {"a": "5"})
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["b"]}
    checked = check_call(call, [tool(**schema)], policy="tolerant")
    assert checked.call is call
    assert [problem.path for problem in checked.problems] == ["", "a"]


def test_a_value_that_never_settles_is_not_converted_for_ever() -> None:
    nested = "5"
    for _ in range(6):
        nested = json.dumps([nested])
    schema = {
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
        "properties": {"a": {"$ref": "#/$defs/n"}},
    }
    assert not check_call(ToolCall("f", {"a": nested}), [tool(**schema)], policy="tolerant").fits
    assert not check_call(ToolCall("f", {}), [tool(type="string")], policy="tolerant").fits


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"properties": {"a": {"pattern": "("}}},
        {"properties": {"a": {"$ref": "#/$defs/none"}}},
        {"properties": {1: {}}},
        {"$schema": "https://nowhere.invalid/schema"},
        {"required": "a"},
        {"properties": {"a": {"pattern": "(a{1000}){1000}"}}},
    ],
)
def test_a_schema_that_is_none_is_the_callers_error_and_names_the_tool(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"tools\[1\] \(bad\)") as caught:
        ToolChecker([tool("good"), {"function": {"name": "bad", "parameters": schema}}])
    assert isinstance(caught.value, DslError)
    assert len(str(caught.value)) < 2 * TEXT_MAX


@pytest.mark.parametrize(
    "tools",
    [
        [{}],
        [{"function": {}}],
        [{"function": {"name": 5}}],
        [tool("f"), tool("f")],
        [{"function": {"name": "f", "parameters": []}}],
    ],
)
def test_a_tool_that_is_none_is_the_callers_error(tools: list[dict[str, Any]]) -> None:
    with pytest.raises(SchemaError):
        ToolChecker(tools)


@pytest.mark.parametrize("tools", [{"name": "f"}, "f", 3, None, ["f"], [None]])
def test_what_is_no_list_of_tools_is_refused(tools: Any) -> None:
    with pytest.raises(SchemaError, match=r"^tools(\[0\])?: must be "):
        ToolChecker(tools)


def test_a_schema_that_is_none_is_told_in_one_line() -> None:
    with pytest.raises(SchemaError) as caught:
        ToolChecker([{"function": {"name": "f", "parameters": {"type": "objct"}}}])
    assert str(caught.value).startswith("tools[0] (f): not a usable JSON Schema: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/x.json", "https://127.0.0.1:9/x", "file:///etc/passwd"])
def test_a_remote_reference_is_never_fetched(reference: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        local = reference.replace(":9/", f":{listener.getsockname()[1]}/")
        with pytest.raises(SchemaError):
            ToolChecker([tool(properties={"a": {"$ref": local}})])
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(?=(a+)+$)\\1b$", "^(a|a)*$", "(.*a){25}b"])
def test_a_catastrophic_pattern_ends(pattern: str) -> None:
    assert not check_call(ToolCall("f", {"a": "a" * 50_000 + "!"}), [tool(properties={"a": {"pattern": pattern}})]).fits


def test_references_that_multiply_do_not_multiply_the_work() -> None:
    twice = [{"type": kind, "items": {"$ref": "#/$defs/n"}} for kind in ("array", ["array"])]
    schema = {"$defs": {"n": {"oneOf": [*twice, {"type": "integer"}]}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    value: Any = 5
    for _ in range(60):
        value = [value]
    for policy in POLICIES:
        assert "too much work to check" in message_of({"a": value}, policy, **schema)
    assert message_of({"a": "x"}, **schema) == 'a: expected array or integer; found "x"'


@pytest.mark.parametrize("name", ["0", "007", "+1", "-1", "18446744073709551616", "1.0"])
def test_property_names_that_look_like_numbers_are_names(name: str) -> None:
    schema = {"properties": {"a": {"items": {"properties": {name: {"type": "integer"}}}}}}
    assert message_of({"a": [{name: "x"}]}, **schema) == f'a[0].{name}: expected integer; found "x"'
    call = ToolCall("f", {"a": [{name: "5"}]})
    checked = check_call(call, [tool(**schema)], policy="tolerant")
    assert checked.call.arguments == {"a": [{name: 5}]}
    assert checked.conversions == (f"a[0].{name}",)
    assert message_of({name: "x"}, "tolerant", properties={name: {"type": "null"}}) == (
        f'{name}: expected null; found "x"'
    )


def test_names_that_a_path_cannot_tell_apart_are_not_converted() -> None:
    call = ToolCall("f", {"7": "5", "007": "5"})
    schema = {"properties": {"7": {"type": ["string", "integer"]}, "007": {"type": "integer"}}}
    assert check_call(call, [tool(**schema)], policy="tolerant").call is call


def test_an_alternative_tells_names_that_look_like_numbers() -> None:
    schema = {"properties": {"a": {"anyOf": [{"type": "null"}, {"properties": {"0": {"type": "null"}}}]}}}
    assert message_of({"a": {"0": 1}}, **schema) == 'a: expected null or 0: null; found {"0": 1}'


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#/$defs/a%7E1b"}], "$defs": {"a/b": {"anyOf": [{"items": {"$ref": "#"}}, True]}}},
        {"allOf": [{"type": "object"}, {"$ref": "#/allOf/0"}]},
        {"$schema": "http://json-schema.org/draft-04/schema#", "id": "http://x.invalid/s", "items": {"$ref": "s#"}},
        {"properties": {"a": {"$ref": "#n"}, "id": {}, "$ref": {}}, "$defs": {"n": {"$anchor": "n", "type": "null"}}},
        {"$id": "urn:x", "properties": {"a": {"$ref": "urn:x#/$defs/n"}}, "$defs": {"n": {"type": "null"}}},
        {
            "properties": {"a": {"$ref": "urn:e#/$defs/n"}},
            "$defs": {"e": {"$id": "urn:e", "$defs": {"n": {"type": "null"}}}},
        },
        {"if": {"properties": {"a": {"type": "integer"}}}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
        {
            "dependentSchemas": {"a": {"required": ["b"]}},
            "patternProperties": {"^x": {"prefixItems": [{"type": "null"}]}},
        },
        {"properties": {"a": {"$dynamicRef": "#n"}}, "$defs": {"n": {"$dynamicAnchor": "n", "type": "null"}}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "dependencies": {"a": ["b"], "c": {"required": ["b"]}}},
    ],
)
def test_odd_but_legal_schemas_are_checked(schema: dict[str, Any]) -> None:
    for policy in POLICIES:
        for arguments in ({}, {"a": 1}, {"a": [1, [2]], "x": {"y": [1]}, "c": 1}):
            checked = check_call(
                ToolCall("f", arguments), [{"function": {"name": "f", "parameters": schema}}], policy=policy
            )
            assert checked.fits or checked.message


@pytest.mark.parametrize("value", ["\ud800", b"x", {1: 2}])
def test_a_call_that_json_cannot_hold_is_a_problem_and_not_an_exception(value: Any) -> None:
    assert "arguments that JSON can hold" in message_of({"a": value}, properties={"a": {"type": "null"}})


def test_a_call_nested_beyond_any_reader_is_a_problem_and_not_an_exception() -> None:
    value: Any = 5
    for _ in range(sys.getrecursionlimit() * 5):
        value = [value]
    assert not check_call(ToolCall("f", {"a": value}), [tool(properties={"a": {"type": "null"}})]).fits


def test_huge_numbers_are_compared_exactly() -> None:
    schema = {"properties": {"a": {"type": "integer", "maximum": 10**400}}}
    assert not message_of({"a": 10**400}, **schema)
    assert message_of({"a": 10**400 + 1}, **schema)


def test_what_tolerant_parsing_reads_can_then_be_converted() -> None:
    text = '<｜DSML｜invoke name="f"><｜DSML｜parameter name="n" string="true">5</｜DSML｜parameter></｜DSML｜invoke>'
    tools = [tool(properties={"n": {"type": "integer"}}, required=["n"])]
    (call,) = parse_text(text, thinking=False, policy="tolerant", tools=tools).calls
    assert check_call(call, tools, policy="tolerant").call == ToolCall("f", {"n": 5}, ParseStatus.CONVERTED)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
types = st.sampled_from(["integer", "number", "string", "boolean", "null", "array", "object"])


@given(
    arguments=st.dictionaries(
        st.sampled_from(["a", "b"]), json_values | st.sampled_from(["1", "true", "[1]", '{"a":1}'])
    ),
    properties=st.dictionaries(st.sampled_from(["a", "b"]), st.builds(lambda kind: {"type": kind}, types)),
    policy=st.sampled_from(POLICIES),
)
def test_a_checked_call_fits_or_says_why_and_strict_changes_nothing(
    arguments: dict[str, Any], properties: dict[str, Any], policy: Policy
) -> None:
    checker = ToolChecker([tool(properties=properties)])
    call = ToolCall("f", arguments)
    checked = checker.check(call, policy=policy)
    assert checked.fits or checked.message
    assert checked.call is call or policy == "tolerant"
    if checked.fits:
        assert checker.check(checked.call).fits
    else:
        assert checked.call is call
