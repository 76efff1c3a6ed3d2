"""The whole list of behaviours of engines.

See: rollout/conformance/check.py for what a check is.
"""

from __future__ import annotations

from rollout.conformance import pauses, sampling, states, weights
from rollout.conformance.check import Check, Subject

ENGINE_CHECKS: tuple[Check, ...] = (*sampling.CHECKS, *states.CHECKS, *weights.CHECKS, *pauses.CHECKS)


def checks_for(subject: Subject) -> tuple[Check, ...]:
    """The checks that an engine with these traits must pass."""
    return tuple(check for check in ENGINE_CHECKS if check.needs <= subject.traits)
