"""The whole list of behaviours of engines, and the runner that tells which of them one lacks.

What the port promises, and nothing here can ask of every engine, since it cannot be seen from outside how many
requests one draws at once, or what an engine does that keeps nothing:

- of requests that wait those of a higher `priority` go first;
- a stream that is closed early draws no more (asked of those that keep states).

Whoever writes an engine tests these two with its own means.

See: rollout/conformance/check.py for what a check is.
"""

from __future__ import annotations

from dsec.conformance.check import Outcome, outcome_of
from rollout.conformance import pauses, sampling, states, weights
from rollout.conformance.check import Check, Subject

ENGINE_CHECKS: tuple[Check, ...] = (*sampling.CHECKS, *states.CHECKS, *weights.CHECKS, *pauses.CHECKS)


def checks_for(subject: Subject) -> tuple[Check, ...]:
    """The checks that an engine with these traits must pass."""
    return tuple(check for check in ENGINE_CHECKS if check.needs <= subject.traits)


async def check_engine(subject: Subject) -> list[Outcome]:
    """Run every check for an engine with these traits, each against new ones that it makes, one after the other.

    Each has an outcome, whatever the engine raises; one that has not ended after `patience_s` has failed.
    """
    return [await outcome_of(check.name, check.run(subject), subject.patience_s) for check in checks_for(subject)]
