"""Where a task's sandbox may connect to in each phase, and how much of that an operator allows.  Pure.

The phases are `setup` (the environment is laid out), `agent` (the model's calls, or the solution) and `verifier`
(the tests).  Which of them a command belongs to is a function of its key, so a command that is run again after a
kill, or replayed on another sandbox, gets the network that it had.

Invariants:
1. Nothing is open that the task did not ask for and the operator did not allow.
2. The command that ends what the agent left running still has the agent's network: nobody but the verifier gets
   the verifier's.

See: docs/formats/task.md, "Network"; docs/adr/0016-networks-by-phase.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from dsec.client.policy import parse_policy
from dsec.edge.network.rules import Allowlist
from dsec.errors import InvalidArgumentError
from dsec.types import NetworkPolicy, NetworkRule

TaskPhase = Literal["setup", "agent", "verifier"]
PHASES: tuple[TaskPhase, ...] = ("setup", "agent", "verifier")
PUBLIC = NetworkPolicy(rules=(NetworkRule(host="*"), NetworkRule(cidr="0.0.0.0/0"), NetworkRule(cidr="::/0")))
"""Every name and every address that is public; what is guarded stays closed."""


class Networks(msgspec.Struct, frozen=True, kw_only=True):
    """An allowlist for each phase; nowhere, if nothing is said."""

    setup: NetworkPolicy = NetworkPolicy()
    agent: NetworkPolicy = NetworkPolicy()
    verifier: NetworkPolicy = NetworkPolicy()

    def of(self, phase: TaskPhase) -> NetworkPolicy:
        """The allowlist of a phase."""
        policies: dict[TaskPhase, NetworkPolicy] = {
            "setup": self.setup,
            "agent": self.agent,
            "verifier": self.verifier,
        }
        return policies[phase]

    @property
    def are_off(self) -> bool:
        """True if no phase has a way out."""
        return not any(self.of(phase).rules for phase in PHASES)

    def may_repeat(self, key: str) -> bool:
        """Whether a command may run once more on another sandbox: it could reach nothing, or is the task's set-up."""
        phase = phase_of(key)
        return phase == "setup" or not self.of(phase).rules


def phase_of(key: str) -> TaskPhase:
    """The phase of the command with this key (docs/formats/events.md)."""
    part, _, rest = key.partition("/")
    if part == "setup":
        return "setup"
    is_clean = rest.endswith("/0")  # the first command of a verdict: it kills what the agent left running
    return "verifier" if part == "judge" and not is_clean else "agent"


def parse_rules(rules: Iterable[str]) -> NetworkPolicy:
    """An allowlist of rules as `dsec create --allow` takes them.  ValueError names the one that makes no sense."""
    try:
        policy = parse_policy(rules)
        Allowlist(policy)
    except InvalidArgumentError as error:
        raise ValueError(str(error)) from error
    return policy


def parse_ceiling(text: str) -> NetworkPolicy:
    """An operator's word: `public`, or rules with blanks between.  ValueError."""
    return PUBLIC if text.strip() == "public" else parse_rules(text.split())


def refusals(asked: Networks, allowed: Networks) -> Iterator[str]:
    """What a task asks for and may not have, as `phase: rules: way out`."""
    for phase in PHASES:
        ceiling = Allowlist(allowed.of(phase))
        refused = [_text(rule) for rule in asked.of(phase).rules if not ceiling.covers(rule)]
        if refused:
            yield (
                f"the {phase} network: {', '.join(refused[:5])}{' ...' if len(refused) > 5 else ''}: not allowed here: "
                f"whoever runs this service can allow it with DSEC_{phase.upper()}_NETWORK"
            )


def _text(rule: NetworkRule) -> str:
    where = rule.host or (f"[{rule.cidr}]" if ":" in rule.cidr else rule.cidr)
    return f"{where}:{','.join(map(str, rule.ports))}" if rule.ports else where
