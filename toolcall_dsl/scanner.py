"""The incremental scanner that both grammars stand on: units in, events out.

A scanner holds only the undecided suffix of its input.  Each state is a method that consumes
what it can decide and says whether it moved; when no state moves, more input is needed.  What a
state decides may depend on units that came, never on how they were split, so feeding a turn
whole, token by token or unit by unit gives the same events once neighbouring chunks are joined.

Invariants:
1. Every decision needs a bounded look-ahead, and text before what is undecided is handed out: when
   `next_event` gives None, at most `UNDECIDED_UNITS_MAX` units are held.
2. After `Fault` nothing more comes; a scanner never raises on input.

See: docs/formats/toolcall_dsl.md, "Parsing"; `toolcall_dsl.tokenizer` for what a unit is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from toolcall_dsl.dialect import Dialect
from toolcall_dsl.tokenizer import UnitMap

HEADER_UNITS_MAX = 1024
"""Longest tag header, name and attributes, in bytes: without a bound, a header whose end never comes eats the turn."""

UNDECIDED_UNITS_MAX = HEADER_UNITS_MAX + 8
"""Most units that a scanner holds while it waits for more: a header, and what may lead into its control token."""

HEADER_STOP = re.compile("[\n\ue000-\uf8ff]")
_LEAD = re.compile(r"(?:\n{1,2}<?|</?)\Z")
_LEAD_UNITS_MAX = 3


class Place(Enum):
    """Where a chunk of text stands."""

    REASONING = "reasoning"
    CONTENT = "content"
    VALUE = "value"
    BODY = "body"


@dataclass(frozen=True)
class Chunk:
    """Some more text of a place; `start` is the unit offset in the turn."""

    place: Place
    units: str
    start: int


@dataclass(frozen=True)
class ReasoningClosed:
    """Reasoning ended before unit `end`; `implied` when no closing token said so."""

    end: int
    implied: bool = False


@dataclass(frozen=True)
class BlockOpened:
    """A tool block starts at unit `start`, its leading blank line included."""

    start: int


@dataclass(frozen=True)
class InvokeOpened:
    """A call of the tool `name` (units) starts at unit `start`."""

    name: str
    start: int
    recovered: bool = False


@dataclass(frozen=True)
class ParameterOpened:
    """A parameter `name` (units) starts; `is_string` is None when the attribute is missing or bad."""

    name: str
    is_string: bool | None
    start: int


@dataclass(frozen=True)
class ParameterClosed:
    """The value is complete."""

    recovered: bool = False


@dataclass(frozen=True)
class InvokeClosed:
    """The call is complete."""

    recovered: bool = False


@dataclass(frozen=True)
class Fault:
    """The turn broke `rule` at unit `offset`; a call that is open then is not complete."""

    rule: str
    offset: int


Event = Chunk | ReasoningClosed | BlockOpened | InvokeOpened | ParameterOpened | ParameterClosed | InvokeClosed | Fault


class Marks:
    """The literals of a dialect as units, for one vocabulary."""

    def __init__(self, dialect: Dialect, unit_map: UnitMap) -> None:
        self.eos = unit_map.find(dialect.eos)
        self.think_open = unit_map.find(dialect.think_open)
        self.think_close = unit_map.find(dialect.think_close)
        self.dsml = unit_map.find(dialect.dsml)
        self.control = re.compile("[" + "".join(map(unit_map.find, dialect.control_tokens)) + "]")
        self.block, self.invoke, self.parameter = dialect.block_name, dialect.invoke_name, dialect.parameter_name
        self.names = (self.block, self.invoke, self.parameter)
        self.blocks = (self.block, *dialect.block_aliases)

    def opener(self, name: str, rest: str = "") -> str:
        """Units of `<｜DSML｜NAME` and what follows."""
        return f"<{self.dsml}{name}{rest}"

    def closer(self, name: str, rest: str = ">") -> str:
        """Units of `</｜DSML｜NAME` and what follows."""
        return f"</{self.dsml}{name}{rest}"


class Scanner(ABC):
    """Feed units, then take events until there is none; `finish` when the turn is over."""

    def __init__(self, marks: Marks, *, thinking: bool) -> None:
        self._marks = marks
        self._thinking = thinking
        self._units = ""
        self._at = 0
        self._base = 0
        self._finished = False
        self._block_end = -1
        self._events: deque[Event] = deque()
        self._state: Callable[[], bool] = self._reasoning if thinking else self._content

    @abstractmethod
    def _reasoning(self) -> bool: ...

    @abstractmethod
    def _content(self) -> bool: ...

    def feed(self, units: str) -> None:
        """Add input."""
        self._base += self._at
        self._units = self._units[self._at :] + units
        self._at = 0

    def finish(self) -> None:
        """Say that no more input comes: what was held back is decided."""
        self._finished = True

    def stop(self) -> None:
        """Say that the turn failed outside of the scanner: nothing more is read, and nothing held."""
        self._events.clear()
        self._state = self._over
        self._units, self._base, self._at = "", self._base + len(self._units), 0

    def next_event(self) -> Event | None:
        """The next event, or None when more input is needed (or, after `finish`, when all is said)."""
        while not self._events and self._state():
            pass
        return self._events.popleft() if self._events else None

    @property
    def decided_count(self) -> int:
        """Units of the turn that are decided; no later event starts before this offset."""
        return self._base + self._at

    @property
    def undecided_count(self) -> int:
        """Units that are held back because more input must decide what they are."""
        return len(self._units) - self._at

    @property
    def ends_with_block(self) -> bool:
        """Whether a tool block was closed by the very last unit so far."""
        return self._block_end == self._base + len(self._units)

    def _offset(self, at: int) -> int:
        return self._base + at

    def _emit(self, place: Place, end: int) -> None:
        """Hand out the text up to `end` and consume it."""
        if end > self._at:
            self._events.append(Chunk(place, self._units[self._at : end], self._offset(self._at)))
            self._at = end

    def _next_control(self, start: int) -> int | None:
        """Where the next control token that means something to this dialect stands."""
        match = self._marks.control.search(self._units, start)
        return match.start() if match is not None else None

    def _emit_decided(self, place: Place) -> None:
        """Hand out all text but a suffix that could be the beginning of a tag."""
        self._emit(place, self._decided_end())

    def _decided_end(self) -> int:
        """Where a suffix starts that could be the beginning of a tag (the end, if there is none)."""
        end = len(self._units)
        if self._finished:
            return end
        tail = self._units[max(self._at, end - _LEAD_UNITS_MAX) :]
        lead = _LEAD.search(tail)
        return end - len(tail) + lead.start() if lead else end

    def _spelled_next(self, start: int, literals: tuple[str, ...]) -> str | None:
        """Which literal stands at `start`: itself, "" for none, None while that is undecided."""
        rest = self._units[start : start + max(map(len, literals))]
        for literal in literals:
            if rest.startswith(literal):
                return literal
        undecided = not self._finished and any(literal.startswith(rest) for literal in literals)
        return None if undecided else ""

    def _header_end(self) -> int | None:
        """Where a tag header that starts here ends at the latest (newline, control token, bound), None if unseen."""
        limit = self._at + HEADER_UNITS_MAX
        stop = HEADER_STOP.search(self._units, self._at, limit)
        if stop is not None:
            return stop.start()
        return min(limit, len(self._units)) if self._finished or len(self._units) >= limit else None

    def _fault(self, rule: str, at: int) -> bool:
        self._events.append(Fault(rule, self._offset(at)))
        self._state = self._over
        return True

    def _over(self) -> bool:
        self._at = len(self._units)
        return False
