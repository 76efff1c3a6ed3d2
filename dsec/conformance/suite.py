"""The whole list of behaviours, and the runner that tells which of them a substrate lacks.

See: dsec/conformance/check.py for what a check is.
"""

from __future__ import annotations

import msgspec

from dsec.conformance import execution, isolation, output, port, resources
from dsec.conformance.check import Check, NotConformingError
from dsec.errors import DsecError
from dsec.sandbox import Substrate

SANDBOX_CHECKS: tuple[Check, ...] = (
    *port.CHECKS,
    *execution.CHECKS,
    *output.CHECKS,
    *isolation.CHECKS,
    *resources.CHECKS,
)


class Outcome(msgspec.Struct, frozen=True):
    """What came of one check; `problem` is empty if it passed."""

    name: str
    problem: str = ""


async def check_sandbox(substrate: Substrate) -> list[Outcome]:
    """Run every check of the suite against an open substrate, one after the other."""
    outcomes = []
    for check in SANDBOX_CHECKS:
        try:
            await check.run(substrate)
        except (NotConformingError, DsecError) as error:
            outcomes.append(Outcome(check.name, f"{type(error).__name__}: {error}"))
        else:
            outcomes.append(Outcome(check.name))
    return outcomes
