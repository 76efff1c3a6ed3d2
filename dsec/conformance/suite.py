"""The whole list of behaviours, and the runner that tells which of them a substrate lacks.

See: dsec/conformance/check.py for what a check is.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dsec.conformance import (
    archives,
    execution,
    files,
    isolation,
    lifecycle,
    network,
    output,
    port,
    processes,
    resources,
    terminals,
    users,
)
from dsec.conformance.check import Check, Outcome, outcome_of
from dsec.sandbox import Substrate
from dsec.types import Feature

SANDBOX_CHECKS: tuple[Check, ...] = (
    *port.CHECKS,
    *execution.CHECKS,
    *output.CHECKS,
    *processes.CHECKS,
    *terminals.CHECKS,
    *users.CHECKS,
    *lifecycle.CHECKS,
    *files.CHECKS,
    *archives.CHECKS,
    *network.CHECKS,
    *isolation.CHECKS,
    *resources.CHECKS,
)


def checks_for(lacks: AbstractSet[Feature] = frozenset()) -> tuple[Check, ...]:
    """The checks that a substrate must pass which says that it lacks these features."""
    return tuple(check for check in SANDBOX_CHECKS if not check.needs & lacks)


async def check_sandbox(
    substrate: Substrate, lacks: AbstractSet[Feature] = frozenset(), *, patience_s: float = 300.0
) -> list[Outcome]:
    """Run every check for a substrate without these features against it, open, one after the other.

    Each has an outcome, whatever it raises; one that has not ended after `patience_s` has failed.
    """
    return [await outcome_of(check.name, check.run(substrate), patience_s) for check in checks_for(lacks)]
