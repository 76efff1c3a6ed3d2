"""The arguments of one call while they are read: JSON text as it arrives, and the finished call.

What comes out, joined, is one JSON object, and reading it gives the finished call's arguments.
Text values go out chunk by chunk, escaped; strict JSON values go out as they stand and are
checked at their end.  Three things under `tolerant` mean something only later and wait until they
do: a value that may be JSON or text, a lone parameter that may wrap all arguments, and the body
of a call without parameters.

Invariants:
1. After `broken` is set nothing more comes out and there is no call.

See: docs/formats/toolcall_dsl.md, "Values" and "Streaming".
"""

from __future__ import annotations

from toolcall_dsl.types import ParseStatus, ToolCall
from toolcall_dsl.units import UnitsDecoder
from toolcall_dsl.values import (
    WRAPPERS,
    BadJsonError,
    json_string_inside,
    json_text,
    json_value,
    json_value_or_none,
    unwrapped,
)


class ArgumentsReader:
    """Methods take units in wire order and return the JSON text that is decided by them (often "")."""

    def __init__(
        self, name: str, decoder: UnitsDecoder, *, strict: bool, known: frozenset[str] | None, recovered: bool
    ) -> None:
        """`known` are the parameter names of the tool, None for a tool that nobody declared."""
        self.broken: str | None = None
        self._name = name
        self._decoder = decoder
        self._strict = strict
        self._known = known
        self._recovered = recovered
        self._arguments: dict[str, object] = {}
        self._parameters_count = 0
        self._body: list[str] = []
        self._parameter = ""
        self._is_string: bool | None = None
        self._streams = False
        self._value: list[str] = []
        self._held = ""
        self._inner_names: frozenset[str] | None = None

    def body(self, units: str) -> str:
        """Text between tags; it only counts in a call without parameters."""
        if not self._parameters_count:
            self._body.append(self._decoder.decode(units))
        elif not units.isspace():
            self._recovered = True
        return ""

    def open_parameter(self, name: str, is_string: bool | None) -> str:
        """A value begins; `is_string` is None when the wire does not say what it is."""
        if name in self._arguments:
            self._recovered = True
            if self._strict:
                self.broken = "duplicate-parameter"
                return ""
        self._recovered |= is_string is None or bool("".join((*self._body, self._decoder.finish())).strip())
        self._body = []
        head = ", " if self._parameters_count else "{"
        head += json_text(name) + ": " + ('"' if is_string else "")
        may_wrap = not self._strict and not self._parameters_count and name in WRAPPERS
        self._inner_names = self._known if may_wrap and self._known is not None and name not in self._known else None
        self._streams = self._strict or (is_string is True and self._inner_names is None)
        self._parameters_count += 1
        self._parameter, self._is_string, self._value = name, is_string, []
        return self._hold_or_give(head)

    def value(self, units: str) -> str:
        """More of the value."""
        text = self._decoder.decode(units)
        self._value.append(text)
        return self._out(text) if self._streams else ""

    def close_parameter(self, *, recovered: bool) -> str:
        """The value is complete."""
        tail = self._decoder.finish()
        self._value.append(tail)
        text = "".join(self._value)
        self._value = []
        self._recovered |= recovered
        value: object = text
        if self._is_string is not True:
            try:
                value = json_value(text)
            except BadJsonError:
                if self._strict:
                    self.broken = "bad-json"
                    return self._out(tail)
                self._recovered = True
        self._arguments[self._parameter] = value
        if self._streams:
            return self._out(tail) + ('"' if self._is_string else "")
        if self._is_string:
            return self._hold_or_give(self._out(text) + '"')
        return self._hold_or_give(json_text(text) if value is text else text)

    def close(self, *, recovered: bool) -> str:
        """The call is complete; take it with `call` unless it is broken."""
        self._recovered |= recovered
        if not self._parameters_count:
            return self._close_body()
        if self._inner_names is not None:
            inner = unwrapped(self._arguments[self._parameter], self._inner_names)
            if inner is not None:
                self._arguments, self._recovered = inner, True
                return json_text(inner)
        return self._held + "}"

    def call(self) -> ToolCall:
        """The finished call."""
        return ToolCall(self._name, self._arguments, ParseStatus.RECOVERED if self._recovered else ParseStatus.OK)

    def _hold_or_give(self, json_text: str) -> str:
        """What is known now, unless all of it may be a wrapper."""
        held, self._held = self._held + json_text, ""
        if self._inner_names is None:
            return held
        self._held = held
        return ""

    def _out(self, text: str) -> str:
        return json_string_inside(text) if self._is_string else text

    def _close_body(self) -> str:
        body = "".join((*self._body, self._decoder.finish())).strip()
        if not body:
            return "{}"
        value = json_value_or_none(body)
        if not isinstance(value, dict):
            self.broken = "malformed-invoke"
            return ""
        self._arguments, self._recovered = value, True
        return body
