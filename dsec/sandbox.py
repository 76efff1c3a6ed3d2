"""The sandbox port: what every substrate, the remote client and the test double offer.

Only commands touch the inside; files go in and out through them (`dsec.files`), so that everything
that changes a sandbox is a command and can be logged, keyed and replayed.

See: docs/architecture.md, "Sandbox"; `dsec.testing.check_sandbox` for the conformance suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from dsec.types import (
    Command,
    Composition,
    ExecResult,
    LayerId,
    NetworkPolicy,
    SandboxId,
    SandboxSpec,
    Stream,
)


class Process(Protocol):
    """A command that was started.  Every call but `wait` and `read_output` is without effect after its end."""

    @property
    def number(self) -> int:
        """Which command of its sandbox this is; unique there for ever."""
        ...

    async def wait(self) -> ExecResult:
        """Its result; any number of callers, any number of times.  Cancelling a waiter does not touch the command.

        Raises as `Sandbox.exec` does.
        """
        ...

    async def kill(self) -> None:
        """Kill its whole process tree; `wait` then gives 137."""
        ...

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group.  InvalidArgumentError for a number outside 1..64."""
        ...

    async def write_stdin(self, data: bytes) -> None:
        """Send more input; returns when it is in the pipe, so a command that does not read slows its writer only.

        InvalidArgumentError if the command was started without `keep_stdin_open` or `tty`.
        """
        ...

    async def close_stdin(self) -> None:
        """The command sees end of file (on a terminal: the end-of-transmission character)."""
        ...

    async def resize(self, rows: int, columns: int) -> None:
        """Change the terminal's size.  InvalidArgumentError if the command has none."""
        ...

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """Output from byte `offset` on: waits for the first byte there, gives at most `bytes_max`; b"" at the end.

        OutOfRangeError if those bytes were dropped (see the substrate's bound of what is kept whole).
        """
        ...


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

    async def start(self, command: Command, number: int | None = None) -> Process:
        """Start a command and return at once.  Raises as `exec` does, here or from `Process.wait`.

        Numbers are given by the sandbox (1, 2, ...) or by its caller, who then gives each once.
        """
        ...

    async def resume_process(self, number: int, command: Command) -> Process | None:
        """The command that was started under `number`, by this process or by an earlier one of the host agent.

        None if the sandbox never heard of it, or refused it: it did not run.  OutcomeUnknownError if it ended
        longer ago than the sandbox remembers.
        """
        ...

    async def pause(self) -> None:
        """Stop every process in the sandbox and give memory back; safe to call twice.

        A paused sandbox keeps its state for as long as it lives; time in it does not count for
        the timeouts of running commands.  `exec` and `start` resume it.
        """
        ...

    async def resume(self) -> None:
        """Let a paused sandbox go on; safe to call twice."""
        ...

    async def snapshot(self) -> LayerId:
        """What was written in the sandbox, as a layer: put it in front of `spec.layers` to go on from here.

        Nothing in the sandbox runs while it is packed; the layer is read back and compared before its
        name is given.  /dev/shm and processes are not in it.  HostUnfitError, ResourceExhaustedError.
        """
        ...

    async def update_network(self, policy: NetworkPolicy) -> None:
        """Replace the allowlist; connections that it no longer allows are closed.  InvalidArgumentError."""
        ...

    async def destroy(self) -> None:
        """Kill everything inside and free every resource; safe to call twice."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A sandbox that says when it died; of any other the next command finds out."""

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` when its end has begun: it was destroyed, or died; at once if that was before."""
        ...


Hold = Callable[[Sequence[LayerId]], Awaitable[None]]
"""Makes these layers stay, all or none.  NotFoundError if one is gone."""


async def hold_nothing(_layers: Sequence[LayerId]) -> None:
    """A `Hold` where no layer ever goes."""


@runtime_checkable
class Layered(Protocol):
    """A substrate whose layers have names, and may go to make room; of any other a spec must say their ids."""

    async def composed(self, references: Sequence[str]) -> Composition:
        """What these stand for now, images by name and layers by id, the topmost first.  NotFoundError."""
        ...

    def holding(self) -> AbstractContextManager[Hold]:
        """A block until whose end no layer goes that is made meanwhile, or is given to what this yields."""
        ...


class Substrate(Protocol):
    """A way of making sandboxes on this host."""

    async def open(self) -> None:
        """Start; sweeps what an earlier, killed substrate of this host left behind.  HostUnfitError."""
        ...

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> Sandbox:
        """A fresh sandbox, ready for commands, with the caller's id or one of its own.

        SpawnError, ResourceExhaustedError, NotFoundError (a layer that is not there).
        """
        ...

    def adopted(self) -> Mapping[SandboxId, Sandbox]:
        """Sandboxes that lived on from an earlier process and are ours since `open`."""
        ...

    async def detach(self) -> None:
        """Stop, and leave the sandboxes to the next `open` where the substrate keeps them; else `close`."""
        ...

    async def close(self) -> None:
        """Destroy every sandbox and stop."""
        ...
