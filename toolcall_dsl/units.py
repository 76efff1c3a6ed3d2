"""Units to text and text to units, part by part.

A unit is one byte of an ordinary token or one control token (`toolcall_dsl.tokenizer`).  Text is
handed out as soon as its characters are whole: a character that a chunk cuts in half waits for
its other bytes.  In the other direction a control token that a chunk cuts in half waits for the
rest of its spelling.  Both give, for every split, what the whole gives.

Invariants:
1. `UnitsDecoder` holds at most 3 bytes back, `SpelledUnits` less than the longest spelling.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Iterable

from toolcall_dsl.tokenizer import UnitMap

_FIRST_CONTROL = "\ue000"
_CONTROL_OR_RUN = re.compile("[\ue000-\uf8ff]|[^\ue000-\uf8ff]+")


class UnitsDecoder:
    """Text of units; bytes that are not UTF-8 become U+FFFD, control tokens their spelling."""

    def __init__(self, unit_map: UnitMap) -> None:
        self._unit_map = unit_map
        self._spelled: dict[str, bytes] = {}
        self._pending = b""

    @property
    def is_inside_character(self) -> bool:
        """Whether bytes are held back that begin a character."""
        return bool(self._pending)

    def decode(self, units: str) -> str:
        """The characters that are whole now."""
        if not self._pending and units.isascii():
            return units
        try:
            data = self._pending + units.encode("latin-1")
        except UnicodeEncodeError:
            data = self._pending + b"".join(map(self._bytes, _CONTROL_OR_RUN.findall(units)))
        text, used_count = utf_8_decode(data, "replace", False)
        self._pending = data[used_count:]
        return text

    def finish(self) -> str:
        """What half a character at the end reads as; the decoder is as new then."""
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text

    def _bytes(self, run: str) -> bytes:
        if run[0] < _FIRST_CONTROL:
            return run.encode("latin-1")
        if run not in self._spelled:
            self._spelled[run] = self._unit_map.text(run).encode()
        return self._spelled[run]


class SpelledUnits:
    """Units of text in which every control token that is spelled counts as sampled."""

    def __init__(self, unit_map: UnitMap, spellings: Iterable[str]) -> None:
        """`spellings` are those of `unit_map`."""
        self._unit_map = unit_map
        self._spellings = tuple(spellings)
        self._first = frozenset(spelling[0] for spelling in self._spellings)
        self._length_max = max(map(len, self._spellings))
        self._held = ""

    def feed(self, text: str) -> str:
        """Units of what is decided."""
        text = self._held + text
        at = self._undecided(text)
        self._held = text[at:]
        return self._unit_map.units(text[:at])

    def finish(self) -> str:
        """Units of what was held back."""
        held, self._held = self._held, ""
        return self._unit_map.units(held)

    def _undecided(self, text: str) -> int:
        """Where a spelling begins that the text's end cuts off; the text's length if none does."""
        tail_start = max(0, len(text) - self._length_max)
        for at in range(tail_start, len(text)):
            if text[at] in self._first and self._is_cut(text, at):
                return at
        return len(text)

    def _is_cut(self, text: str, at: int) -> bool:
        """Whether the rest from `at` is a true beginning of a spelling, and not the inside of a whole one."""
        rest = text[at:]
        if not any(spelling != rest and spelling.startswith(rest) for spelling in self._spellings):
            return False
        whole_end = 0
        for part in self._unit_map.split(text)[1::2]:
            start = text.index(part, whole_end)
            whole_end = start + len(part)
            if start < at < whole_end:
                return False
        return True
