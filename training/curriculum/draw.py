"""Names, words, numbers and lines, drawn so that a seed gives the same tasks on every machine.

Only `Random.random()` seeded with a string is used: of Python's generator that is the part whose
values are promised not to change between versions.  Words are identifiers and words that occur in
Python's standard library (words.txt, sorted, one a line); a few are made of random letters, as in
the text that the checkpoint was taught.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDS = ("txt", "txt", "txt", "txt", "log", "md", "cfg", "csv")
CONFIG_ENDS = ("ini", "env")


@cache
def words() -> tuple[str, ...]:
    """The word list: lower case, three letters or more, no Python keywords, builtins or module names."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())


class Draw:
    """A stream of draws for one task; words and names that it gave are not given again."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)  # noqa: S311 - tasks, not secrets
        self._used: set[str] = set()

    def below(self, count: int) -> int:
        """An int from 0 to count - 1."""
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """An int from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of a hundred draws."""
        return self.below(100) < percent

    def one(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in another order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in values]

    def number(self) -> int:
        """An int from 0 to 9999, short ones as likely as long ones."""
        return self.below(10 ** self.between(1, 4))

    def word(self) -> str:
        """A fresh word; one in ten is made of random letters."""
        while True:
            word = self._gibberish() if self.chance(10) else self.known_word()
            if all(word not in other and other not in word for other in self._used):
                self._used.add(word)
                return word

    def known_word(self) -> str:
        """A word of the list, fresh or not."""
        return self.one(words())

    def file(self, ends: Sequence[str] = ENDS) -> str:
        """A fresh file name such as `payload.txt` or `order_marker.log`."""
        stem = self.word() if self.chance(75) else f"{self.word()}_{self.word()}"
        return f"{stem}.{self.one(ends)}"

    def line(self) -> str:
        """One to five words and numbers."""
        return " ".join(self._token() for _ in range(self.between(1, 5)))

    def lines(self, low: int, high: int) -> list[str]:
        """`low` to `high` lines."""
        return [self.line() for _ in range(self.between(low, high))]

    def value(self) -> str:
        """A word or a number, as the value of a setting."""
        return self.word() if self.chance(50) else str(self.number())

    def _token(self) -> str:
        if self.chance(18):
            return str(self.number())
        return self._gibberish() if self.chance(6) else self.known_word()

    def _gibberish(self) -> str:
        return "".join(self.one(LETTERS) for _ in range(self.between(3, 8)))
