"""The tolerant grammar: the repairs that serving engines make, each marked as recovered.

A tag counts wherever it stands, blank lines around it or not; other spellings of the block, a
missing block, missing closers and a missing `string` attribute are repaired.  What no repair
covers is text.  A call that the turn's end cuts off is a `Fault` and never a call.

See: docs/formats/toolcall_dsl.md, "Tolerant policy".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from toolcall_dsl.scanner import (
    HEADER_STOP,
    HEADER_UNITS_MAX,
    BlockOpened,
    InvokeClosed,
    InvokeOpened,
    Marks,
    ParameterClosed,
    ParameterOpened,
    Place,
    ReasoningClosed,
    Scanner,
)


class _Role(Enum):
    BLOCK = "block"
    BLOCK_END = "block end"
    INVOKE = "invoke"
    INVOKE_END = "invoke end"
    PARAMETER = "parameter"
    PARAMETER_END = "parameter end"


@dataclass(frozen=True)
class _Tag:
    """A tag between two buffer positions; `exact` when it is spelled as the format says."""

    role: _Role
    start: int
    end: int
    name: str = ""
    is_string: bool | None = None
    exact: bool = True


_TEXT = _Tag(_Role.BLOCK_END, -1, -1)
"""Stands for: this control token is no part of a tag."""


class TolerantScanner(Scanner):
    """Accepts what a person would read as a call; `recovered` marks each departure."""

    def __init__(self, marks: Marks, *, thinking: bool) -> None:
        super().__init__(marks, thinking=thinking)
        blocks = "|".join(map(re.escape, marks.blocks))
        invoke, parameter = re.escape(marks.invoke), re.escape(marks.parameter)
        self._openers = (
            (_Role.BLOCK, re.compile(f"(?P<name>{blocks})>")),
            (_Role.INVOKE, re.compile(f'{invoke} name="(?P<name>[^\n]*?)">')),
            (
                _Role.PARAMETER,
                re.compile(f'{parameter} name="(?P<name>[^\n]*?)"(?: string="(?P<flag>[^"\n]*)")?>'),
            ),
        )
        self._closers = (
            (_Role.BLOCK_END, re.compile(f"(?:{blocks})(?P<mark>>|(?=\n))")),
            (_Role.INVOKE_END, re.compile(f"{invoke}(?P<mark>>|(?=\n))")),
            (_Role.PARAMETER_END, re.compile(f"{parameter}(?P<mark>>|(?=\n))")),
        )
        self._body_is_recovered = False
        self._has_stray_tag = False

    def _reasoning(self) -> bool:
        return self._prose(Place.REASONING)

    def _content(self) -> bool:
        return self._prose(Place.CONTENT)

    def _prose(self, place: Place) -> bool:
        """Reasoning or content up to what ends it."""
        search_from = self._at
        while (at := self._next_control(search_from)) is not None:
            search_from = at + 1
            unit = self._units[at]
            if unit == self._marks.eos:
                self._emit(place, at)
                return self._end()
            if unit in {self._marks.think_open, self._marks.think_close} and self._thinking:
                return self._think_tag(place, at)
            tag = self._tag(at)
            if tag is None:
                self._emit(place, self._lead_start(at))
                return False
            opens_call = tag.role is _Role.BLOCK or (tag.role is _Role.INVOKE and place is Place.CONTENT)
            if tag is not _TEXT and opens_call:
                return self._open_calls(place, tag)
        self._emit_decided(place)
        return False

    def _think_tag(self, place: Place, at: int) -> bool:
        """A closing tag ends reasoning; every other thinking tag is absorbed."""
        self._emit(place, at)
        self._at = at + 1
        if place is Place.REASONING and self._units[at] == self._marks.think_close:
            self._events.append(ReasoningClosed(self._offset(self._at)))
            self._state = self._content
        return True

    def _open_calls(self, place: Place, tag: _Tag) -> bool:
        start = self._lead_start(tag.start + 1)
        self._emit(place, start)
        if place is Place.REASONING:
            self._events.append(ReasoningClosed(self._offset(start), implied=True))
        self._events.append(BlockOpened(self._offset(start)))
        self._state = self._between
        self._at = tag.start
        if tag.role is _Role.BLOCK:
            self._at = tag.end
            self._body_is_recovered = not tag.exact or place is Place.REASONING
        else:
            self._body_is_recovered = True
        return True

    def _between(self) -> bool:
        """Around calls, inside and behind a block: calls are read, text is dropped."""
        tag = self._next_tag()
        if tag is None:
            return False
        self._at = tag.end
        if tag.role is _Role.INVOKE:
            self._events.append(InvokeOpened(tag.name, self._offset(tag.start), self._body_is_recovered))
            self._state = self._invoke
        elif tag.role is _Role.BLOCK:
            self._body_is_recovered = not tag.exact
        elif tag.role is _Role.BLOCK_END:
            self._block_end = self._offset(tag.end)
            self._body_is_recovered = True
        return True

    def _invoke(self) -> bool:
        """Inside a call, between its parameters."""
        tag = self._next_tag(Place.BODY)
        if tag is None:
            return False
        if tag.role is _Role.PARAMETER:
            self._events.append(ParameterOpened(tag.name, tag.is_string, self._offset(tag.end)))
            self._state = self._value
            self._at = tag.end
        elif tag.role is _Role.INVOKE_END:
            self._close_invoke(recovered=not tag.exact)
            self._at = tag.end
        elif tag.role is _Role.PARAMETER_END:
            self._has_stray_tag = True
            self._at = tag.end
        else:
            self._close_invoke(recovered=True)
        return True

    def _value(self) -> bool:
        tag = self._next_tag(Place.VALUE)
        if tag is None:
            return False
        closes = tag.role is _Role.PARAMETER_END
        self._events.append(ParameterClosed(recovered=not closes or not tag.exact))
        self._state = self._invoke
        self._at = tag.end if closes else tag.start
        return True

    def _close_invoke(self, *, recovered: bool) -> None:
        self._events.append(InvokeClosed(recovered or self._has_stray_tag))
        self._has_stray_tag = False
        self._state = self._between

    def _next_tag(self, place: Place | None = None) -> _Tag | None:
        """The next tag; the text before it goes to `place` or is dropped.  None: no tag yet, or the turn is over."""
        search_from = self._at
        while (at := self._next_control(search_from)) is not None:
            search_from = at + 1
            if self._units[at] == self._marks.eos:
                self._pass_text(place, at)
                self._end()
                return None
            tag = self._tag(at)
            if tag is None:
                self._pass_text(place, at - 1 - (self._units[at - 2 : at] == "</"))
                return None
            if tag is not _TEXT:
                self._pass_text(place, tag.start)
                return tag
        if place is None:
            self._at = self._decided_end()
        else:
            self._emit_decided(place)
        if self._finished:
            self._end()
        return None

    def _lead_start(self, at: int) -> int:
        """Where an opening tag starts whose control token stands at `at`, its blank line included."""
        blank = self._units[max(self._at, at - 3) : at] == "\n\n<"
        return at - 3 if blank else at - 1

    def _pass_text(self, place: Place | None, end: int) -> None:
        if place is None:
            self._at = end
        else:
            self._emit(place, end)

    def _end(self) -> bool:
        """The turn is over here; an open call is cut off."""
        if self._state in (self._invoke, self._value):
            return self._fault("truncated-call", self._at)
        self._state = self._over
        return self._over()

    def _tag(self, at: int) -> _Tag | None:
        """The tag whose control token stands at `at`, `_TEXT` if it is none, None if undecided."""
        before = self._units[max(self._at, at - 2) : at]
        if self._units[at] != self._marks.dsml or not before.endswith(("<", "</")):
            return _TEXT
        closes = before == "</"
        end_max = at + 1 + HEADER_UNITS_MAX
        stop = HEADER_STOP.search(self._units, at + 1, end_max)
        end = stop.start() if stop is not None else min(len(self._units), end_max)
        for role, pattern in self._closers if closes else self._openers:
            match = pattern.match(self._units, at + 1, end + 1 if stop is not None else end)
            if match is not None:
                return self._read(role, match, at - (2 if closes else 1))
        decided = stop is not None or self._finished or end == end_max
        return _TEXT if decided else None

    def _read(self, role: _Role, match: re.Match[str], start: int) -> _Tag:
        found = match.groupdict()
        name = found.get("name") or ""
        is_string = {"true": True, "false": False}.get(found.get("flag") or "")
        exact = found.get("mark", ">") == ">" and (role is not _Role.BLOCK or name == self._marks.block)
        return _Tag(role, start, match.end(), name, is_string, exact)
