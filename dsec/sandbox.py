"""The sandbox port: what every substrate, the remote client and the test double offer.

Only `exec` touches the inside; files go in and out through commands with stdin and stdout,
so that everything that changes a sandbox is a command and can be logged, keyed and replayed.

See: docs/architecture.md, "Sandbox"; `dsec.testing.check_sandbox` for the conformance suite.
"""

from __future__ import annotations

from typing import Protocol

from dsec.types import Command, ExecResult, SandboxId, SandboxSpec


class Sandbox(Protocol):
    """One isolated machine-like place with a writable file system of its own."""

    @property
    def id(self) -> SandboxId:
        """Unique on this host for as long as the substrate is open."""
        ...

    async def exec(self, command: Command) -> ExecResult:
        """Run a command to its end; several may run at once.

        Ends when the command's own process ends, even if a child still holds its pipes, or when
        `timeout_s` has passed (the command's whole tree is killed then).  Cancelling the awaiting
        task kills the command.  A sandbox full of its own processes answers with exit code 126.
        Raises InvalidArgumentError (nothing ran), ResourceExhaustedError (nothing ran; the host lacks
        something) or SandboxLostError (also when the sandbox can start no command any more).
        """
        ...

    async def destroy(self) -> None:
        """Kill everything inside and free every resource; safe to call twice."""
        ...


class Substrate(Protocol):
    """A way of making sandboxes on this host."""

    async def open(self) -> None:
        """Start; sweeps what an earlier, killed substrate of this host left behind.  HostUnfitError."""
        ...

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A fresh sandbox, ready for commands.  SpawnError, ResourceExhaustedError."""
        ...

    async def close(self) -> None:
        """Destroy every sandbox and stop."""
        ...
