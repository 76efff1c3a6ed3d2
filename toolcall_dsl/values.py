"""Parameter values: JSON read strictly, and the one repair that needs a tool's schema.

Python's JSON reader takes more than JSON, and gives back strings that no encoder accepts.  A
value that passes here can be written out again by anybody.

See: docs/formats/toolcall_dsl.md, "Values".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import NoReturn

JSON_DEPTH_MAX = 128
"""Deepest nesting of lists and objects in a value: a bound that no reader's stack depends on."""

WRAPPERS = frozenset({"arguments", "input"})
"""Names under which models wrap all arguments into one parameter."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class BadJsonError(ValueError):
    """A value that is no JSON, or holds what no JSON writer can give back."""


def unwrapped(wrapped: object, known: frozenset[str]) -> dict[str, object] | None:
    """The arguments inside a wrapper parameter's value, None unless all their names are `known` to the tool."""
    inner = json_value_or_none(wrapped) if isinstance(wrapped, str) else wrapped
    return inner if isinstance(inner, dict) and inner.keys() <= known else None


def json_text(value: object) -> str:
    """A value as JSON text, characters beyond ASCII as they are."""
    return _ENCODER.encode(value)


def json_string_inside(text: str) -> str:
    """What stands between the quotes of `text` as a JSON string; texts joined and then escaped read the same."""
    return json_text(text)[1:-1]


def properties_of(tool: Mapping[str, object]) -> tuple[str, frozenset[str]]:
    """Name and parameter names of a tool; anything missing reads as empty."""
    function = tool.get("function")
    schema = function.get("parameters") if isinstance(function, Mapping) else None
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return str(name or ""), frozenset(properties) if isinstance(properties, Mapping) else frozenset()


def json_value_or_none(text: str) -> object:
    """One JSON value, None for text that is none."""
    try:
        return json_value(text)
    except BadJsonError:
        return None


def json_value(text: str) -> object:
    """One JSON value, without the extensions of Python's reader (NaN, Infinity, lone surrogates).  BadJsonError.

    `text` itself holds no lone surrogates.  Nesting is at most `JSON_DEPTH_MAX`.
    """
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX and _depth(text) > JSON_DEPTH_MAX:
        raise BadJsonError(f"nested deeper than {JSON_DEPTH_MAX}")
    try:
        value: object = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadJsonError(str(error)) from error
    if "\\u" in text and _SURROGATE.search(json_text(value)):
        raise BadJsonError("a lone surrogate is no character")
    return value


def _depth(text: str) -> int:
    deepest = depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise BadJsonError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJsonError(f"{text} is out of range")
    return value


_ENCODER = json.JSONEncoder(ensure_ascii=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
