"""The life of a sandbox: one table of states and events, and nothing else decides what is allowed.

The Edge asks `after` before it acts and the fold of its journal asks it again when it reads the
record, so a log that was written by one cannot be refused by the other.  The diagram in
docs/lifecycle.md is `diagram()`; a test keeps it so.

Invariants:
1. ENDED has no way out.
2. A sandbox that is not STOPPING or ENDED can be stopped.
"""

from __future__ import annotations

from enum import StrEnum

from dsec.errors import SandboxLostError, StateError


class State(StrEnum):
    """What a sandbox is in; a STOPPING one is no longer reachable, and may still hold resources."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    ENDED = "ended"


class Happening(StrEnum):
    """What happens to a sandbox.  USE is any request that needs it awake."""

    READY = "ready"
    USE = "use"
    PAUSE = "pause"
    RESUME = "resume"
    SNAPSHOT = "snapshot"
    STOP = "stop"
    GONE = "gone"


class EndReason(StrEnum):
    """Why a sandbox ended.  FAILED: it never was ready, nobody saw it, and its request id may be used again."""

    DESTROYED = "destroyed"
    EXPIRED_IDLE = "expired_idle"
    EXPIRED_LIFETIME = "expired_lifetime"
    LEASE_LAPSED = "lease_lapsed"
    CANCELLED = "cancelled"
    LOST = "lost"
    FAILED = "failed"


_S, _H = State, Happening
TRANSITIONS: dict[tuple[State, Happening], State] = {
    (_S.CREATING, _H.READY): _S.RUNNING,
    (_S.CREATING, _H.USE): _S.CREATING,  # a branch runs its past before it is ready
    (_S.CREATING, _H.STOP): _S.STOPPING,
    (_S.RUNNING, _H.USE): _S.RUNNING,
    (_S.RUNNING, _H.SNAPSHOT): _S.RUNNING,
    (_S.RUNNING, _H.RESUME): _S.RUNNING,
    (_S.RUNNING, _H.PAUSE): _S.PAUSED,
    (_S.RUNNING, _H.STOP): _S.STOPPING,
    (_S.PAUSED, _H.USE): _S.RUNNING,
    (_S.PAUSED, _H.SNAPSHOT): _S.PAUSED,
    (_S.PAUSED, _H.PAUSE): _S.PAUSED,
    (_S.PAUSED, _H.RESUME): _S.RUNNING,
    (_S.PAUSED, _H.STOP): _S.STOPPING,
    (_S.STOPPING, _H.STOP): _S.STOPPING,
    (_S.STOPPING, _H.GONE): _S.ENDED,
    (_S.ENDED, _H.STOP): _S.ENDED,
}


def after(state: State, happening: Happening, name: str = "the sandbox") -> State:
    """The state that follows.  SandboxLostError where it has ended, StateError where the table has no way."""
    following = TRANSITIONS.get((state, happening))
    if following is not None:
        return following
    if state in (State.STOPPING, State.ENDED):
        raise SandboxLostError(f"{name} has ended")
    raise StateError(f"{name} is {state}: {happening} is not possible")


def diagram() -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.CREATING}"]
    arrows: dict[tuple[State, State], list[str]] = {}
    for (state, happening), following in TRANSITIONS.items():
        arrows.setdefault((state, following), []).append(happening)
    lines += [f"    {state} --> {following}: {', '.join(events)}" for (state, following), events in arrows.items()]
    return "\n".join([*lines, f"    {State.ENDED} --> [*]"])
