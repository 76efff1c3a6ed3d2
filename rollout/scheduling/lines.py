"""Lines of those who wait: one for each class and shape, the lowest number first.  Pure.

A class is a project and a priority.  A shape is what its things need, so that whoever looks for something that fits
looks at the head of each line, not at ten thousand rows.  A class that gets nothing ages: it rises by levels.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")
Class = tuple[str, int]
"""Project and priority."""
Shape = tuple[int, ...]


class _Line(Generic[T]):
    def __init__(self) -> None:
        self.things: dict[int, T] = {}
        self._numbers: list[int] = []

    def put(self, number: int, thing: T) -> None:
        self.things[number] = thing
        heapq.heappush(self._numbers, number)

    def head(self) -> int:
        while self._numbers[0] not in self.things:
            heapq.heappop(self._numbers)
        return self._numbers[0]


class Lines(Generic[T]):
    """Things that wait, each under a number of its own, in some class and shape."""

    def __init__(self, ageing_s: float) -> None:
        """A class rises a level for every `ageing_s` in which it got nothing."""
        self._ageing_s = ageing_s
        self._lines: dict[Class, dict[Shape, _Line[T]]] = {}
        self._since: dict[Class, float] = {}

    @property
    def classes(self) -> tuple[Class, ...]:
        """Those in which something waits."""
        return tuple(self._lines)

    def put(self, of: Class, shape: Shape, number: int, thing: T, now: float) -> None:
        """Begin to wait: the place in the line is the number's, whenever it comes."""
        self._since.setdefault(of, now)
        self._lines.setdefault(of, {}).setdefault(shape, _Line()).put(number, thing)

    def take(self, of: Class, shape: Shape, number: int) -> None:
        """No longer wait."""
        line = self._lines[of][shape]
        del line.things[number]
        if not line.things:
            del self._lines[of][shape]
            if not self._lines[of]:
                del self._lines[of], self._since[of]

    def serve(self, of: Class, now: float) -> None:
        """The class got something: it begins to age anew."""
        if of in self._since:
            self._since[of] = now

    def level(self, of: Class, now: float) -> int:
        """Its priority, and what it rose above that."""
        return of[1] + max(0, int((now - self._since[of]) / self._ageing_s))

    def heads(self, of: Class) -> list[T]:
        """The first of each shape, the oldest of them first."""
        heads = sorted((line.head(), shape) for shape, line in self._lines[of].items())
        return [self._lines[of][shape].things[number] for number, shape in heads]

    def oldest(self, of: Class) -> int:
        """The lowest number in the class."""
        return min(line.head() for line in self._lines[of].values())

    def count(self, of: Class) -> int:
        """How many things of the class wait."""
        return sum(len(line.things) for line in self._lines[of].values())
