"""The fields of a JSON object that somebody else wrote, each checked as it is taken.

See: `config.py`, which reads a model's config with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from rollout.errors import EngineError


class Fields(msgspec.Struct, frozen=True):
    """`values`, and how errors call them: `source` is the file, `prefix` comes before each name."""

    source: str
    values: Mapping[str, Any]
    prefix: str = ""

    def refused(self, name: str, bound: str) -> EngineError:
        """What to raise for a field: file, name, value and the bound."""
        given = f"is {self.values[name]!r}" if name in self.values else "is missing"
        return EngineError(f"{self.source}: {self.prefix}{name:.100} {given:.200}: {bound}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def know(self, names: Collection[str]) -> None:
        """EngineError for a field that is none of these."""
        for name in self.values:
            if name not in names:
                raise self.refused(name, "this engine does not know the field; remove it if it changes no result")

    def count(self, name: str, low: int, high: int, step: int = 1, default: int | None = None) -> int:
        """A multiple of `step` from `low` to `high`."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high or value % step:
            multiple = "" if step == 1 else f"a multiple of {step} "
            raise self.refused(name, f"must be {multiple or 'an integer '}from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number from `low` to `high`."""
        value: Any = self.values.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refused(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def one_of(self, name: str, accepted: tuple[Any, ...], default: Any = None) -> Any:
        """One of the accepted values; an absent field has the default, or is refused where there is none."""
        value = self.values.get(name, default)
        if not any(type(value) is type(choice) and value == choice for choice in accepted):
            raise self.refused(name, f"must be {' or '.join(repr(choice) for choice in accepted)}")
        return value
