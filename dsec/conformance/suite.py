"""The whole list of behaviours, and the runner that tells which of them a substrate lacks.

See: dsec/conformance/check.py for what a check is.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import msgspec

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
from dsec.conformance.check import Check, NotConformingError
from dsec.errors import DsecError
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


class Outcome(msgspec.Struct, frozen=True):
    """What came of one check; `problem` is empty if it passed."""

    name: str
    problem: str = ""


def checks_for(lacks: AbstractSet[Feature] = frozenset()) -> tuple[Check, ...]:
    """The checks that a substrate must pass which says that it lacks these features."""
    return tuple(check for check in SANDBOX_CHECKS if not check.needs & lacks)


async def check_sandbox(substrate: Substrate, lacks: AbstractSet[Feature] = frozenset()) -> list[Outcome]:
    """Run every check for a substrate without these features against it, open, one after the other."""
    outcomes = []
    for check in checks_for(lacks):
        try:
            await check.run(substrate)
        except (NotConformingError, DsecError) as error:
            outcomes.append(Outcome(check.name, f"{type(error).__name__}: {error}"))
        else:
            outcomes.append(Outcome(check.name))
    return outcomes
