"""The rules that a turn can break, where it broke one, and how that is told.

An error shows the place in characters of the decoded turn and some text on both sides.  A turn is
read part by part and its text is not kept, so `Trail` counts what has passed, keeps the end of
it, and a `Mark` taken at a place collects what follows there as it comes.

Invariants:
1. A mark says the same however the turn was split.
2. A trail holds at most `_WINDOW_UNITS` units more than the scanner has left undecided.

See: docs/formats/toolcall_dsl.md, "Strict policy".
"""

from __future__ import annotations

from collections.abc import Mapping

from toolcall_dsl.dialect import Dialect
from toolcall_dsl.tokenizer import UnitMap
from toolcall_dsl.types import ParseError
from toolcall_dsl.units import UnitsDecoder

EXCERPT_BEFORE, EXCERPT_AFTER = 30, 50
"""Characters of an excerpt on both sides of the place."""

_AFTER_UNITS = 4 * EXCERPT_AFTER
_WINDOW_UNITS = 4096

RULES: Mapping[str, str] = {
    "missing-think-close": "the reply ended inside its reasoning: {think_close} is missing",
    "call-inside-reasoning": "a tool block inside the reasoning does not run: write {think_close} first",
    "control-token-in-text": "a control token stands where only text may stand",
    "block-not-opened": (
        "a tag stands outside of a tool block: calls begin with a blank line and then <{dsml}{block}> on a line"
        " of its own, behind all reasoning and text"
    ),
    "missing-eos": "the reply was cut off before its end",
    "malformed-block": "a tool block must hold invokes only, each on lines of its own, and end with </{dsml}{block}>",
    "malformed-invoke": (
        'an invoke must read <{dsml}{invoke} name="NAME">, then each parameter on its line, then </{dsml}{invoke}>'
    ),
    "malformed-parameter": (
        'a parameter must read <{dsml}{parameter} name="NAME" string="true|false">VALUE</{dsml}{parameter}>'
        " and end its line"
    ),
    "unclosed-parameter": "another tag of the block begins inside a value: </{dsml}{parameter}> is missing",
    "duplicate-parameter": "a parameter is given twice in one invoke",
    "bad-json": 'a parameter with string="false" must hold one JSON value',
    "truncated-call": "the reply ended inside a tool call, so the call was not run",
    "text-after-block": "nothing may follow the tool block",
    "text-after-eos": "nothing may follow the end of the reply",
}
"""Every rule that a turn can break, with the sentence that is told to the model."""


class Mark:
    """A place in a turn: its position, the text before it, and the units after it as they come."""

    def __init__(self, offset: int, line: int, column: int, before: str, after_units: str) -> None:
        self.offset, self.line, self.column = offset, line, column
        self.before = before
        self.after_units = after_units[:_AFTER_UNITS]

    @property
    def is_complete(self) -> bool:
        """Whether an excerpt here will not change any more."""
        return len(self.after_units) >= _AFTER_UNITS

    def extend(self, units: str) -> None:
        """More of what follows."""
        self.after_units += units[: _AFTER_UNITS - len(self.after_units)]


class Trail:
    """What has been read of a turn, as far as an error may have to show it."""

    def __init__(self, unit_map: UnitMap) -> None:
        self._unit_map = unit_map
        self._decoder = UnitsDecoder(unit_map)
        self._parts: list[str] = []
        self._units, self._at = "", 0
        self._base = 0
        self._end = 0
        self._offset, self._line, self._column = 0, 1, 1
        self._before = ""
        self._open_marks: list[Mark] = []

    def add(self, units: str) -> None:
        """More units were fed."""
        self._parts.append(units)
        self._end += len(units)
        if self._open_marks:
            for mark in self._open_marks:
                mark.extend(units)
            self._open_marks = [mark for mark in self._open_marks if not mark.is_complete]

    def mark(self, offset: int) -> Mark:
        """The place at unit `offset`, which is none before those asked for or forgotten earlier."""
        self._pass(offset)
        torn = self._decoder.is_inside_character
        after = self._units[self._at : self._at + _AFTER_UNITS]
        before = (self._before + "\ufffd" * torn)[-EXCERPT_BEFORE:]
        mark = Mark(self._offset + torn, self._line, self._column + torn, before, after)
        self._open_marks = [other for other in self._open_marks if not other.is_complete][-2:]
        self._open_marks.append(mark)
        return mark

    def forget(self, offset: int) -> None:
        """No place before unit `offset` will be asked for."""
        if self._end - self._base > _WINDOW_UNITS:
            self._pass(offset)

    def error(self, rule: str, mark: Mark, dialect: Dialect) -> ParseError:
        """The broken rule as it is told."""
        message = RULES[rule].format(
            think_close=dialect.think_close,
            dsml=dialect.dsml,
            block=dialect.block_name,
            invoke=dialect.invoke_name,
            parameter=dialect.parameter_name,
        )
        after = self._unit_map.text(mark.after_units)[:EXCERPT_AFTER]
        return ParseError(rule, mark.offset, mark.line, mark.column, mark.before + after, message)

    def _pass(self, offset: int) -> None:
        """Count everything before unit `offset`."""
        if self._parts:
            self._units = self._units[self._at :] + "".join(self._parts)
            self._at = 0
            self._parts = []
        end = self._at + offset - self._base
        text = self._decoder.decode(self._units[self._at : end])
        self._at, self._base = end, offset
        self._offset += len(text)
        newline = text.rfind("\n")
        if newline >= 0:
            self._line += text.count("\n")
            self._column = len(text) - newline
        else:
            self._column += len(text)
        self._before = (self._before + text[-EXCERPT_BEFORE:])[-EXCERPT_BEFORE:]
