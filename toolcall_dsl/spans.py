"""Which tokens of a turn are thinking, text and calls, found while the turn is read.

A section border is a unit offset; a token belongs to the section of its first unit.  The reader
of the turn tells a border late (what a tag is shows at its end), so the starts of the tokens
that are not decided yet are remembered, and no others.

Invariants:
1. The spans cover all tokens in order, without gap or overlap; none is empty.

See: docs/formats/toolcall_dsl.md, "Parsing".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from toolcall_dsl.types import Span, SpanKind


class SpanReader:
    """Counts tokens and cuts them at the borders it is told; borders come in order."""

    def __init__(self, *, thinking: bool) -> None:
        self._kind = SpanKind.SAMPLED_THINK if thinking else SpanKind.SAMPLED_TEXT
        self._start = 0
        self._closed: list[Span] = []
        self._tokens_count = 0
        self._units_count = 0
        self._open_starts: list[int] = []

    def add(self, tokens: Iterable[str]) -> None:
        """More tokens, each as its units."""
        starts = self._open_starts
        self._tokens_count -= len(starts)
        starts += accumulate(map(len, tokens), initial=self._units_count)
        self._units_count = starts.pop()
        self._tokens_count += len(starts)

    def border(self, offset: int, kind: SpanKind) -> None:
        """The section of `kind` begins at unit `offset`."""
        starts = self._open_starts
        index = self._tokens_count - len(starts) + bisect_left(starts, offset)
        if index > self._start:
            self._closed.append(Span(self._start, index - self._start, self._kind))
        self._start, self._kind = index, kind

    def forget(self, offset: int) -> None:
        """No border will come before unit `offset`."""
        del self._open_starts[: bisect_left(self._open_starts, offset)]

    def forget_all(self) -> None:
        """No border will come before the next token."""
        self._open_starts.clear()

    def spans(self) -> tuple[Span, ...]:
        """The spans of all tokens so far."""
        length = self._tokens_count - self._start
        return (*self._closed, Span(self._start, length, self._kind)) if length else tuple(self._closed)
