"""What a process does with what another one left: one table over the log's tail, the engine, and the command under way.

A kill, a crash, a preemption and an adoption by another worker leave the same thing, a prefix of a log, so there is one
answer for all of them.  The first row that fits decides; every combination is enumerated in the test beside it.

Invariants:
1. No row samples a token that is logged again, and none runs a command again on a state that it may have changed.
2. A rollout that the log does not call done is gone on with, ended, or refused with a reason: never dropped.

See: docs/architecture.md, "Recovery".
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from rollout.engine import OnUpdate
from rollout.state import Phase

UNOPENED = "unopened"
"""The tail of a rollout that a job asks for and the log does not know yet."""
Tail = Phase | str
_SAMPLED = frozenset({Phase.SAMPLE, Phase.TOOLS})
"""The model's context is not at its end: it will be continued."""
_MAY_SAMPLE = _SAMPLED | {Phase.PREPARE}
_MAY_RUN = frozenset({Phase.PREPARE, Phase.TOOLS, Phase.SOLVE, Phase.JUDGE})
"""A command of the sandbox is, or will be, asked for."""


class Weights(StrEnum):
    """The engine's weights, beside those that drew last."""

    SAME = "same"
    """The same, or none drew yet."""
    UPDATED = "updated"
    """Others, of a newer version."""
    OTHER = "other"
    """Others, of the same version or an older one."""
    UNKNOWN = "unknown"
    """Nobody knows which drew last: somebody changed the engine's behind the service."""


class Pending(StrEnum):
    """The command that the wanted effect asks for."""

    NEW = "new"
    FINISHED = "finished"
    RUNNING = "running"
    """Begun in a sandbox that lives and knows it."""
    UNKNOWN = "unknown"
    """Begun in a sandbox that lives, and nobody can say how it ended."""
    LOST = "lost"
    """Begun in a sandbox that is gone, and had no way out of it."""
    LOST_OUTSIDE = "lost outside"
    """Begun in a sandbox that is gone, with a way to the outside."""


class Action(StrEnum):
    """What becomes of the rollout."""

    OPEN = "open"
    GO_ON = "go on"
    NOTHING = "nothing"
    END_CANCELLED = "end as CANCELLED"
    END_STALE = "end as STALE"
    REFUSE = "refuse"


class Kv(StrEnum):
    """Where the engine's state comes from."""

    NOT_NEEDED = "not needed"
    RESTORE = "restore"
    PREFILL = "prefill"


class Run(StrEnum):
    """What becomes of the command."""

    NOTHING = "nothing"
    RUN = "run"
    ANSWER = "answer from the log"
    COLLECT = "collect its result"
    REBUILD = "rebuild on a fresh sandbox, then run there"
    REFUSE = "refuse"


class Recovery(NamedTuple):
    """A decision."""

    action: Action
    kv: Kv
    run: Run


class Found(NamedTuple):
    """What a process finds."""

    tail: Tail
    is_cancelled: bool = False
    weights: Weights = Weights.SAME
    on_update: OnUpdate = "keep"
    has_saved_kv: bool = False
    pending: Pending = Pending.NEW


_RUNS: dict[Pending, Run] = {
    Pending.NEW: Run.RUN,
    Pending.FINISHED: Run.ANSWER,
    Pending.RUNNING: Run.COLLECT,
    Pending.UNKNOWN: Run.REBUILD,
    Pending.LOST: Run.REBUILD,
    Pending.LOST_OUTSIDE: Run.REFUSE,
}


def decide(found: Found) -> Recovery:
    """The first row that fits."""
    match found:
        case Found(tail=Phase.DONE):
            return Recovery(Action.NOTHING, Kv.NOT_NEEDED, Run.NOTHING)
        case Found(is_cancelled=True):
            return Recovery(Action.END_CANCELLED, Kv.NOT_NEEDED, Run.NOTHING)
        case Found(tail="unopened"):
            return Recovery(Action.OPEN, Kv.NOT_NEEDED, Run.NOTHING)
        case Found(weights=Weights.OTHER) if found.tail in _MAY_SAMPLE:
            return Recovery(Action.REFUSE, Kv.NOT_NEEDED, Run.NOTHING)
        case Found(weights=Weights.UPDATED, on_update="pin") if found.tail in _SAMPLED:
            return Recovery(Action.END_STALE, Kv.NOT_NEEDED, Run.NOTHING)  # its weights went with the process
        case Found(weights=Weights.UNKNOWN) if found.tail in _SAMPLED:
            return Recovery(Action.END_STALE, Kv.NOT_NEEDED, Run.NOTHING)
    return Recovery(Action.GO_ON, _kv(found), decide_run(found.pending) if found.tail in _MAY_RUN else Run.NOTHING)


def decide_run(pending: Pending) -> Run:
    """What becomes of a command of a rollout that goes on."""
    return _RUNS[pending]


def _kv(found: Found) -> Kv:
    """A saved state is of the weights that drew last: others compute it again."""
    if found.tail not in _SAMPLED:
        return Kv.NOT_NEEDED
    return Kv.RESTORE if found.has_saved_kv and found.weights is Weights.SAME else Kv.PREFILL
