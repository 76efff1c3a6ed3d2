"""A call against its tool's JSON Schema: what does not fit, told so that a model can act on it.

A step of its own behind parsing, for the layer that runs tools.  Nothing a model wrote raises:
an unknown tool, a missing parameter, a wrong type are values with a path, what was expected and
what was found.  What a schema allows is allowed; extra properties are a problem only where the
schema says so.  Under `tolerant`, values of the wrong JSON type are converted where that loses
nothing and makes the call fit.

Schemas may come from strangers (a tool server), so nothing is ever fetched for a `$ref`, patterns
run on an engine with a bounded number of steps, and a call is not explained in detail where a
schema's alternatives multiply.  `jsonschema-rs` is imported here only.

See: docs/formats/toolcall_dsl.md, "Schema check".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import jsonschema_rs
from jsonschema_rs import ValidationError, Validator
from jsonschema_rs import ValidationErrorKind as Kind

from toolcall_dsl.errors import SchemaError
from toolcall_dsl.options import check_policy
from toolcall_dsl.types import ParseStatus, Policy, ToolCall
from toolcall_dsl.values import BadJsonError, json_value

PROBLEMS_MAX = 8
"""Most problems that one check tells."""
TEXT_MAX = 200
"""Most characters of each text in a problem."""
BACKTRACKS_MAX = 100_000
"""Steps that a pattern may take on one value; one that needs more does not match."""
VISITS_MAX = 10_000
"""Subschemas on the paths that explaining a value may take; above, a misfit is told as one problem."""

_OF_TYPE = (Kind.Type, Kind.Enum, Kind.Constant, Kind.AnyOf, Kind.OneOfNotValid)
"""Misfits that another JSON type of the same value may cure."""
_CONVERSION_ROUNDS = 4
_PLAIN: Mapping[str, str] = {
    "falseSchema": "nothing here",
    "uniqueItems": "no item twice",
    "contains": "an item that the schema's contains describes",
    "propertyNames": "property names that the schema's propertyNames allows",
}
_INSIDE = frozenset(
    {"items", "prefixItems", "additionalItems", "contains", "additionalProperties", "unevaluatedItems"}
    | {"unevaluatedProperties", "propertyNames"}
)
_INSIDE_BY_NAME = frozenset({"properties", "patternProperties"})
_IN_PLACE = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "then", "else"})
_IN_PLACE_BY_NAME = frozenset({"dependentSchemas", "dependencies"})
_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
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


_TOO_MANY_WAYS = SchemaProblem(
    "", "arguments that fit the tool's schema", "others (the schema has too many alternatives to say where)"
)


class ToolChecker:
    """The tools of a conversation (OpenAI shape), their schemas compiled once."""

    def __init__(self, tools: Sequence[Mapping[str, object]]) -> None:
        """SchemaError for no list of tools, a tool without a name, a name given twice, or a schema that is none."""
        self._schemas: dict[str, Mapping[str, object]] = {}
        self._validators: dict[str, Validator] = {}
        if not isinstance(tools, list | tuple):
            raise SchemaError(f"tools: must be a list of tools, not {type(tools).__name__}")
        for index, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str):
                raise SchemaError(f"tools[{index}]: must be an object with function.name, a string")
            if name in self._schemas:
                raise SchemaError(f"tools[{index}]: {name!r} is declared twice")
            schema = function.get("parameters", {})
            if not isinstance(schema, Mapping):
                raise SchemaError(f"tools[{index}] ({name}): parameters must be a JSON Schema object")
            self._schemas[name] = schema
            self._validators[name] = _compiled(schema, f"tools[{index}] ({name})")

    def check(self, call: ToolCall, *, policy: Policy = "strict") -> CheckedCall:
        """What does not fit, and under `tolerant` the call with converted values if that makes it fit.  OptionError."""
        check_policy(policy)
        validator = self._validators.get(call.name)
        if validator is None:
            known = ", ".join(map(repr, self._schemas)) or "none is declared"
            return CheckedCall(call, (SchemaProblem("", _clipped(f"a declared tool ({known})"), _shown(call.name)),))
        try:
            if validator.is_valid(call.arguments):
                return CheckedCall(call, ())
            if _visits(self._schemas[call.name], _depth(call.arguments)) > VISITS_MAX:
                return CheckedCall(call, (_TOO_MANY_WAYS,))
            converted = _converted(validator, call) if policy == "tolerant" else None
            if converted is not None:
                return converted
            errors = sorted(validator.iter_errors(call.arguments), key=lambda error: len(error.instance_path))
            return CheckedCall(call, tuple(map(_problem, errors[:PROBLEMS_MAX])))
        except (
            ValueError,
            RecursionError,
        ) as error:  # what no JSON text can hold: too deep, lone surrogates, numbers without end
            return CheckedCall(call, (SchemaProblem("", "arguments that JSON can hold", _clipped(str(error))),))


def check_call(call: ToolCall, tools: Sequence[Mapping[str, object]], *, policy: Policy = "strict") -> CheckedCall:
    """One call against `tools`; a `ToolChecker` compiles them once for many calls.  SchemaError as there."""
    return ToolChecker(tools).check(call, policy=policy)


def _compiled(schema: Mapping[str, object], where: str) -> Validator:
    options = jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS_MAX)
    try:
        return jsonschema_rs.validator_for(dict(schema), offline=True, pattern_options=options, validate_formats=False)
    except ValueError as error:
        raise SchemaError(f"{where}: not a usable JSON Schema: {_clipped(' '.join(str(error).split()))}") from error


def _problem(error: ValidationError) -> SchemaProblem:
    expected, found = _expected(error)
    return SchemaProblem(_told(error.instance_path), _clipped(expected), _clipped(found or _shown(error.instance)))


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
    inner_path = _told(first.instance_path[len(outer.instance_path) :])
    expected = _clipped(_expected(first)[0])
    return f"{inner_path}: {expected}" if inner_path else expected


def _told(path: Sequence[str | int]) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return _clipped("".join(parts).removeprefix("."))


def _shown(value: object) -> str:
    return _clipped(json.dumps(value, ensure_ascii=False, default=str))


def _clipped(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 1] + "…"


def _converted(validator: Validator, call: ToolCall) -> CheckedCall | None:
    """The call with values converted so that it fits, None if it then does not."""
    changed = replace(call, arguments=copy.deepcopy(call.arguments), status=ParseStatus.CONVERTED)
    paths: list[_Path] = []
    for _ in range(_CONVERSION_ROUNDS):
        errors = list(validator.iter_errors(changed.arguments))
        if not errors:
            return CheckedCall(changed, (), tuple(map(_told, paths)))
        wrong = dict.fromkeys(tuple(error.instance_path) for error in errors)
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


def _depth(value: object) -> int:
    """How deep lists and objects are nested."""
    deepest = 0
    open_values = [(value, 0)]
    while open_values:
        inner, depth = open_values.pop()
        deepest = max(deepest, depth)
        if isinstance(inner, dict | list):
            open_values += [(each, depth + 1) for each in (inner.values() if isinstance(inner, dict) else inner)]
    return deepest


def _visits(root: Mapping[str, object], depth: int) -> int:
    """Subschemas on all paths that a value nested `depth` deep can take, counted up to `VISITS_MAX` and one more."""
    count = 0
    open_nodes: list[tuple[object, int]] = [(root, depth)]
    while open_nodes and count <= VISITS_MAX:
        node, left = open_nodes.pop()
        count += 1
        if isinstance(node, list):
            open_nodes += [(inner, left) for inner in node]
        if not isinstance(node, Mapping):
            continue
        for keyword, inner in node.items():
            if keyword in _REFERENCES:
                open_nodes.append((_referred(root, inner), left))
            elif keyword in _IN_PLACE:
                open_nodes.append((inner, left))
            elif keyword in _IN_PLACE_BY_NAME and isinstance(inner, Mapping):
                open_nodes += [(each, left) for each in inner.values()]
            elif keyword in _INSIDE and left:
                open_nodes.append((inner, left - 1))
            elif keyword in _INSIDE_BY_NAME and left and isinstance(inner, Mapping):
                open_nodes += [(each, left - 1) for each in inner.values()]
    return count


def _referred(root: Mapping[str, object], reference: object) -> object:
    """What a pointer into the schema refers to; the whole schema for every other reference."""
    node: object = root
    for step in str(reference).partition("#")[2].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or key not in node:
            return root
        node = node[key]
    return node
