"""What the scheduler is told and what it answers, as frozen values.

See: rollout/scheduling/scheduler.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout.scheduling.lines import Class


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What there may be at once: engine slots, sandboxes that run and that sleep, tokens of contexts.

    And what may wait: rollouts and projects.
    """

    slots: int
    sandboxes: int
    asleep: int
    tokens: int
    queued: int
    projects: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How it is shared out."""

    ageing_s: float
    credit_tokens: int
    preemptions_count_max: int
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Rollouts that start together; each then holds so many tokens and (0 or 1) sandboxes."""

    members: tuple[str, ...]
    project: str = "default"
    priority: int = 0
    tokens: int = 0
    sandboxes: int = 1

    @property
    def of(self) -> Class:
        """Its class."""
        return self.project, self.priority

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and sandboxes of the whole."""
        return len(self.members) * self.tokens, len(self.members) * self.sandboxes


@dataclass(frozen=True, slots=True)
class Start:
    """Begin these rollouts, or go on with them."""

    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """The rollout has the slot that it waited for."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class Yield:
    """The rollout shall give its slot back at the next token boundary; it may ask for one again."""

    rollout_id: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """The rollout shall stop, give back its slot and its tokens, and put its sandbox to sleep."""

    rollout_id: str


Decision = Start | Grant | Yield | Preempt
