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

_SURROGATE = re.compile("[\ud800-\udfff]")
_WRAPPERS = frozenset({"arguments", "input"})


class BadJsonError(ValueError):
    """A value that is no JSON, or holds what no JSON writer can give back."""


def unwrapped(arguments: dict[str, object], known: frozenset[str] | None) -> dict[str, object]:
    """Arguments out of one spurious wrapper parameter, else `arguments` itself.

    Only if the tool's parameter names are `known`, the wrapper is none of them, and all inner names are.
    """
    wrapper = next(iter(arguments), "")
    if known is None or len(arguments) != 1 or wrapper not in _WRAPPERS or wrapper in known:
        return arguments
    inner = arguments[wrapper]
    if isinstance(inner, str):
        inner = json_value_or_none(inner)
    return inner if isinstance(inner, dict) and inner.keys() <= known else arguments


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
    """One JSON value, without the extensions of Python's reader (NaN, Infinity, lone surrogates).  BadJsonError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise BadJsonError("a lone surrogate is no character")
    except (ValueError, RecursionError) as error:
        raise BadJsonError(str(error)) from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise BadJsonError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJsonError(f"{text} is out of range")
    return value
