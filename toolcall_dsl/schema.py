"""A call against its tool's JSON Schema: what does not fit, told so that a model can act on it.

A step of its own behind parsing, for the layer that runs tools.  Nothing a model wrote raises:
an unknown tool, a missing parameter, a wrong type are values with a path, what was expected and
what was found.  What a schema allows is allowed; extra properties are a problem only where the
schema says so.  Under `tolerant`, values of the wrong JSON type are converted where that loses
nothing and makes the call fit.

Schemas may come from strangers (a tool server), so nothing is ever fetched for a `$ref`, patterns
run on an engine with a bounded number of steps, and `toolcall_dsl.subschemas` counts the work
before any is done.  `jsonschema-rs` is imported here only.

See: docs/formats/toolcall_dsl.md, "Schema check".
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jsonschema_rs
from jsonschema_rs import ValidationError, Validator
from jsonschema_rs import ValidationErrorKind as Kind

from toolcall_dsl.errors import SchemaError
from toolcall_dsl.options import check_policy
from toolcall_dsl.subschemas import Subschemas
from toolcall_dsl.types import ParseStatus, Policy, ToolCall
from toolcall_dsl.values import BadJsonError, json_value

PROBLEMS_MAX = 8
"""Most problems that one check tells."""
TEXT_MAX = 200
"""Most characters of each text in a problem."""
BACKTRACKS_MAX = 100_000
"""Steps that a pattern may take on one value; one that needs more does not match."""

_OF_TYPE = (Kind.Type, Kind.Enum, Kind.Constant, Kind.AnyOf, Kind.OneOfNotValid)
"""Misfits that another JSON type of the same value may cure."""
_CONVERSION_ROUNDS = 4
_PLAIN: Mapping[str, str] = {
    "falseSchema": "nothing here",
    "uniqueItems": "no item twice",
    "contains": "an item that the schema's contains describes",
    "propertyNames": "property names that the schema's propertyNames allows",
}
_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class SchemaProblem:
    """One thing that does not fit; each text is at most `TEXT_MAX` long.

    `path` leads to it, like `a.items[0]`; it is "" for the call itself.
    """

    path: str
    expected: str
    found: str


@dataclass(frozen=True)
class CheckedCall:
    """A call and what is wrong with it.

    `call` is the call to run: the one that was checked or, if `conversions` (paths) is not empty,
    one with converted values and the status `converted`.  At most `PROBLEMS_MAX` problems.
    """

    call: ToolCall
    problems: tuple[SchemaProblem, ...]
    conversions: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the call may run."""
        return not self.problems

    @property
    def message(self) -> str:
        """The problems for a model, a line each; "" for a call that fits."""
        lines = [
            f"{problem.path or 'call'}: expected {problem.expected}; found {problem.found}" for problem in self.problems
        ]
        return "\n".join(lines)


_TOO_MUCH = SchemaProblem("", "simpler arguments", "some that are too much work to check against the tool's schema")
_NO_PLACE = SchemaProblem("", "arguments that fit the tool's schema", "others (too much work to say where)")


@dataclass(frozen=True)
class _Tool:
    """A tool's schema, compiled."""

    validator: Validator
    subschemas: Subschemas


class ToolChecker:
    """The tools of a conversation (OpenAI shape), their schemas compiled once."""

    def __init__(self, tools: Sequence[Mapping[str, object]]) -> None:
        """SchemaError for no list of tools, a tool without a name, a name given twice, or a schema that is none."""
        self._tools: dict[str, _Tool] = {}
        if not isinstance(tools, list | tuple):
            raise SchemaError(f"tools: must be a list of tools, not {type(tools).__name__}")
        for index, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str):
                raise SchemaError(f"tools[{index}]: must be an object with function.name, a string")
            if name in self._tools:
                raise SchemaError(f"tools[{index}]: {name!r} is declared twice")
            schema = function.get("parameters", {})
            if not isinstance(schema, Mapping):
                raise SchemaError(f"tools[{index}] ({name}): parameters must be a JSON Schema object")
            self._tools[name] = _compiled(schema, f"tools[{index}] ({name})")

    def check(self, call: ToolCall, *, policy: Policy = "strict") -> CheckedCall:
        """What does not fit, and under `tolerant` the call with converted values if that makes it fit.  OptionError."""
        check_policy(policy)
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(map(repr, self._tools)) or "none is declared"
            return CheckedCall(call, (SchemaProblem("", _clipped(f"a declared tool ({known})"), _shown(call.name)),))
        try:
            if not tool.subschemas.admits(call.arguments):
                return CheckedCall(call, (_TOO_MUCH,))
            if tool.validator.is_valid(call.arguments):
                return CheckedCall(call, ())
            if not tool.subschemas.reports(call.arguments):
                return CheckedCall(call, (_first_problem(tool, call.arguments),))
            converted = _converted(tool, call) if policy == "tolerant" else None
            if converted is not None:
                return converted
            errors = sorted(tool.validator.iter_errors(call.arguments), key=lambda error: len(error.instance_path))
            return CheckedCall(call, tuple(_problem(error, call.arguments) for error in errors[:PROBLEMS_MAX]))
        except (
            ValueError,
            RecursionError,
        ) as error:  # what no JSON text can hold: too deep, lone surrogates, numbers without end
            return CheckedCall(call, (SchemaProblem("", "arguments that JSON can hold", _clipped(str(error))),))


def check_call(call: ToolCall, tools: Sequence[Mapping[str, object]], *, policy: Policy = "strict") -> CheckedCall:
    """One call against `tools`; a `ToolChecker` compiles them once for many calls.  SchemaError as there."""
    return ToolChecker(tools).check(call, policy=policy)


def _compiled(schema: Mapping[str, object], where: str) -> _Tool:
    options = jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS_MAX)
    try:
        subschemas = Subschemas(schema)
        return _Tool(
            jsonschema_rs.validator_for(dict(schema), offline=True, pattern_options=options, validate_formats=False),
            subschemas,
        )
    except (ValueError, SchemaError) as error:
        raise SchemaError(f"{where}: not a usable JSON Schema: {_clipped(' '.join(str(error).split()))}") from error


def _first_problem(tool: _Tool, arguments: object) -> SchemaProblem:
    """The misfit that is met first: where a schema has no alternatives it holds no others, so it is little."""
    try:
        if not tool.subschemas.has_alternatives:
            tool.validator.validate(arguments)
    except ValidationError as error:
        return _problem(error, arguments)
    return _NO_PLACE


def _problem(error: ValidationError, arguments: object) -> SchemaProblem:
    expected, found = _expected(error)
    path = _told(_resolved(error.instance_path, arguments))
    return SchemaProblem(path, _clipped(expected), _clipped(found or _shown(error.instance)))


def _expected(error: ValidationError) -> tuple[str, str]:
    """What the schema wants, and what was found where that is not the value itself."""
    match error.kind:
        case Kind.Type(types=types):
            return " or ".join(sorted(types)), ""
        case Kind.Required(property=name):
            return f"a value for {_shown(name)}", "none"
        case Kind.AdditionalProperties(unexpected=names) | Kind.UnevaluatedProperties(unexpected=names):
            return "no other properties", ", ".join(map(_shown, names[:PROBLEMS_MAX]))
        case Kind.Enum(options=options):
            return f"one of {_shown(options)}", ""
        case Kind.AnyOf(context=context) | Kind.OneOfNotValid(context=context):
            ways = dict.fromkeys(_way(errors[0], error) for errors in context[:PROBLEMS_MAX] if errors)
            return " or ".join(ways), ""
        case Kind.OneOfMultipleValid():
            return "a value that fits only one of the alternatives", ""
        case kind:
            return _PLAIN.get(kind.name) or f"{kind.name} {_shown(kind.value)}", ""


def _way(first: ValidationError, outer: ValidationError) -> str:
    """What one alternative wants first."""
    inner_path = _told(_resolved(first.instance_path[len(outer.instance_path) :], outer.instance))
    expected = _clipped(_expected(first)[0])
    return f"{inner_path}: {expected}" if inner_path else expected


def _resolved(path: Sequence[str | int], value: Any) -> _Path:
    """A path of the validator, which takes every name that it can read as a number for an index, as `value` has it."""
    steps: list[str | int] = []
    for told in path:
        step = told
        if isinstance(value, dict) and isinstance(told, int):
            named = (name for name in value if re.fullmatch(rf"\+?0*{told}", name))
            step = str(told) if str(told) in value else next(named)
        steps.append(step)
        value = value[step]
    return tuple(steps)


def _told(path: Sequence[str | int]) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return _clipped("".join(parts).removeprefix("."))


def _shown(value: object) -> str:
    return _clipped(json.dumps(value, ensure_ascii=False, default=str))


def _clipped(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 1] + "…"


def _converted(tool: _Tool, call: ToolCall) -> CheckedCall | None:
    """The call with values converted so that it fits, None if it then does not."""
    changed = replace(call, arguments=copy.deepcopy(call.arguments), status=ParseStatus.CONVERTED)
    paths: list[_Path] = []
    for _ in range(_CONVERSION_ROUNDS):
        if not (tool.subschemas.admits(changed.arguments) and tool.subschemas.reports(changed.arguments)):
            return None
        errors = list(tool.validator.iter_errors(changed.arguments))
        if not errors:
            return CheckedCall(changed, (), tuple(map(_told, paths)))
        wrong = dict.fromkeys(_resolved(error.instance_path, changed.arguments) for error in errors)
        if not all(isinstance(error.kind, _OF_TYPE) for error in errors) or not wrong.keys().isdisjoint(paths):
            return None
        if not all(_convert(changed.arguments, path) for path in wrong):
            return None
        paths += wrong
    return None


def _convert(arguments: dict[str, object], path: _Path) -> bool:
    """Put the counterpart of the value at `path` in its place; False if it has none."""
    holder: Any = arguments
    for step in path[:-1]:
        holder = holder[step]
    candidate = _counterpart(holder[path[-1]]) if path else None
    if candidate is None:
        return False
    holder[path[-1]] = candidate[0]
    return True


def _counterpart(value: object) -> tuple[object] | None:
    """The one other JSON type that says the same: text and the JSON that it spells."""
    if isinstance(value, int):
        return (json.dumps(value),)
    if not isinstance(value, str):
        return None
    try:
        read = json_value(value)
    except BadJsonError:
        return None
    if isinstance(read, str):
        return None
    is_lossless = isinstance(read, dict | list) or json.dumps(read) == value
    return (read,) if is_lossless else None
