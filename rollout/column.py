"""A sequence that never changes and is cheap to lengthen: what the open turn of a rollout is kept in.

A state is folded for every chunk of tokens, and a tuple that grows by a few items is copied whole each time, which
a long turn pays for with the square of its length.

Invariants:
1. A column's items never change, whatever it was lengthened to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar, overload

T = TypeVar("T")


class Column(Sequence[T]):
    """The first items of a list that only grows, and that a longer column may share.  Equal to any equal sequence."""

    __slots__ = ("_items", "_length")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._items = list(items)
        self._length = len(self._items)

    def __add__(self, more: Sequence[T]) -> Column[T]:
        """Both, one after the other; the time is that of `more`, unless another column was made of this one before."""
        length, items = self._length, self._items
        if not length or length < len(items):  # the list is shared, by those that begin or went on otherwise
            items = items[:length]
        items.extend(more)
        longer: Column[T] = Column.__new__(Column)
        longer._items, longer._length = items, len(items)
        return longer

    def __radd__(self, before: tuple[T, ...]) -> tuple[T, ...]:
        return before + tuple(self)

    def first(self, count: int) -> Column[T]:
        """The first `count` items, or all if there are fewer; nothing is copied."""
        column: Column[T] = Column.__new__(Column)
        column._items, column._length = self._items, min(count, self._length)
        return column

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return islice(self._items, self._length)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(map(self._items.__getitem__, range(*index.indices(self._length))))
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of a column of {self._length}")
        return self._items[index % self._length]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column | tuple | list) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Column({tuple(self)!r})"
