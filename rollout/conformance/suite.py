"""The whole list of behaviours of engines, and the runner that tells which of them one lacks.

See: rollout/conformance/check.py for what a check is.
"""

from __future__ import annotations

from dsec.conformance.check import Outcome, outcome_of
from rollout.conformance import pauses, sampling, states, weights
from rollout.conformance.check import Check, Subject
from rollout.errors import RolloutError

ENGINE_CHECKS: tuple[Check, ...] = (*sampling.CHECKS, *states.CHECKS, *weights.CHECKS, *pauses.CHECKS)


def checks_for(subject: Subject) -> tuple[Check, ...]:
    """The checks that an engine with these traits must pass."""
    return tuple(check for check in ENGINE_CHECKS if check.needs <= subject.traits)


async def check_engine(subject: Subject) -> list[Outcome]:
    """Run every check for an engine with these traits, each against new ones that it makes, one after the other."""
    return [await outcome_of(check.name, check.run(subject), RolloutError) for check in checks_for(subject)]
