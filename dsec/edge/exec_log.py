"""Durable, keyed exec: the log knows a command before the sandbox does, and its result before the caller.

The recovery table (docs/architecture.md) is decided here and in `dsec.replay`: a finished key is
answered from the log; a key that started on an *earlier* incarnation runs for the first time on
this one; a key that started on *this* incarnation and has no end is never run again.

Invariants:
1. *started* is durable before the command runs, *finished* before the result is returned.
2. A key with another command is a DivergedError and runs nothing.
"""

from __future__ import annotations

from dsec.errors import DivergedError, SandboxLostError
from dsec.sandbox import Sandbox
from dsec.trajectory import KIND, Append, CommandFinished, CommandStarted, Trajectory, TrajectoryRecord, encode
from dsec.types import Command, ExecResult
from wal import settled


class DurableSandbox:
    """One incarnation of a session: a real sandbox together with the session's trajectory.

    Commands run one after another (the caller awaits each), which is what makes a replay in the
    order of the log meet the same states.
    """

    def __init__(self, sandbox: Sandbox, trajectory: Trajectory, append: Append) -> None:
        """Wrap a sandbox whose SandboxCreated record is already in the trajectory."""
        self.sandbox = sandbox
        self.trajectory = trajectory
        self._append = append

    async def record(self, record: TrajectoryRecord) -> None:
        """Make a record durable, then fold it; a cancellation waits for both."""

        async def append_and_fold() -> None:
            await self._append(KIND, encode(record))
            self.trajectory.apply(record)

        await settled(append_and_fold())

    async def exec(self, key: str, command: Command) -> ExecResult:
        """Run `command` once under `key`, or answer from the log.

        Raises DivergedError (the key belongs to another command), SandboxLostError (the sandbox
        died, or the command started on this incarnation and its end is not known).
        """
        trajectory = self.trajectory
        if (entry := trajectory.entries.get(key)) is not None:
            if entry.command != command:
                raise DivergedError(f"{trajectory.session}: key {key!r} was used for another command")
            if entry.result is not None:
                return entry.result
            if trajectory.incarnation in entry.applied:
                raise SandboxLostError(f"{trajectory.session}: {key!r} started here and its end is unknown")
        await self.record(CommandStarted(trajectory.session, trajectory.incarnation, key, command))
        result = await self.sandbox.exec(command)
        await self.record(CommandFinished(trajectory.session, trajectory.incarnation, key, result))
        return result

    async def destroy(self) -> None:
        """Free the real sandbox; the trajectory stays."""
        await self.sandbox.destroy()
