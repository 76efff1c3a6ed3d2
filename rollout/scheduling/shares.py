"""Who has had how much: the virtual time of projects, in sampled tokens over weight.  Pure.

The project with the lowest virtual time is served first, so over any span in which two of them want more
than they get, tokens go to them in proportion to their weights, but for what one grant may sample (start-time
fair queueing).  A project competes while it samples or waits to.  One that comes back after a rest stands no
more than a bound before the others: rest saves up no right to shut them out.  One that used an idle machine
alone owes nothing for it, since whoever comes is set to where the least served competitor stands.

Invariants:
1. The virtual time of a project that competes never falls.
2. A project begins to compete at most `credit_tokens / weight` before the least served competitor.
3. At most `projects_count_max` are remembered beside those that compete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_NEWEST = 1 / 8
"""The weight of the newest turn in what is expected of the next."""


class Shares:
    """Projects that compete, or did a short while ago."""

    def __init__(self, weights: Mapping[str, float], credit_tokens: int, projects_count_max: int) -> None:
        """Weights are above 0; a project without one has 1."""
        self._weights = weights
        self._credit_tokens = credit_tokens
        self._projects_count_max = projects_count_max
        self._virtual: dict[str, float] = {}
        self._turn: dict[str, float] = {}
        self._competing: Counter[str] = Counter()
        self._floor = 0.0

    def enter(self, project: str) -> None:
        """One more rollout of the project competes."""
        self._rise()
        if not self._competing[project]:
            self._virtual[project] = self.time_of(project)
        self._competing[project] += 1

    def leave(self, project: str, tokens: int) -> None:
        """It does no longer, and has sampled so many tokens."""
        self._virtual[project] += tokens / self.weight(project)
        if tokens:
            mean = self._turn.get(project, tokens)
            self._turn[project] = mean + (tokens - mean) * _NEWEST
        self._rise()
        self._competing[project] -= 1
        if not self._competing[project]:
            del self._competing[project]
            self._forget()

    def expected(self, project: str, tokens_max: int) -> int:
        """How many tokens its next turn will likely have, by those before it."""
        return min(tokens_max, round(self._turn.get(project, tokens_max)))

    def weight(self, project: str) -> float:
        """Its part, beside the others'."""
        return self._weights.get(project, 1.0)

    def time_of(self, project: str, tokens_under_way: int = 0) -> float:
        """Where the project stands, or would if it began to compete, once it also got those tokens."""
        weight = self.weight(project)
        if self._competing[project]:
            return self._virtual[project] + tokens_under_way / weight
        earliest = self._floor - self._credit_tokens / weight
        return max(self._virtual.get(project, self._floor), earliest) + tokens_under_way / weight

    def _rise(self) -> None:
        """The floor is where the least served competitor stands; it never falls."""
        if self._competing:
            self._floor = max(self._floor, min(self._virtual[project] for project in self._competing))

    def _forget(self) -> None:
        """The longest served debt is kept longest: a project without one is as good as new."""
        resting = self._virtual.keys() - self._competing.keys()
        if len(resting) > self._projects_count_max:
            forgotten = min(resting, key=lambda project: (self._virtual[project], project))
            del self._virtual[forgotten]
            self._turn.pop(forgotten, None)
