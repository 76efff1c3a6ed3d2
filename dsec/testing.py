"""Doubles of the sandbox port for other rooms' tests, and the conformance suite for real substrates.

`FakeSubstrate` runs nothing: a script (a function) answers each command.  It is honest about the
port: the same commands and limits are refused, output is bounded, a destroyed sandbox is lost, and a
cancelled exec is cancelled.  It does not measure time: a script that wants a timeout returns one.

See: dsec/sandbox.py, dsec/conformance.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Awaitable, Callable

import msgspec

from dsec.conformance.suite import SANDBOX_CHECKS, Outcome, check_sandbox
from dsec.edge.capture import OutputBuffer
from dsec.edge.commands import check_spec, encode_command
from dsec.errors import SandboxLostError, SpawnError
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec

__all__ = ["SANDBOX_CHECKS", "FakeSandbox", "FakeSubstrate", "Outcome", "Script", "check_sandbox"]

Script = Callable[["FakeSandbox", Command], ExecResult | Awaitable[ExecResult]]

def succeed(_sandbox: FakeSandbox, _command: Command) -> ExecResult:
    """The script of a sandbox in which everything works and says nothing."""
    return ExecResult(exit_code=0)


class FakeSandbox:
    """A sandbox that a script answers for; `commands` holds what was run, in order."""

    def __init__(self, sandbox_id: SandboxId, spec: SandboxSpec, script: Script) -> None:
        self._id = sandbox_id
        self._script = script
        self.spec = spec
        self.commands: list[Command] = []
        self.is_destroyed = False

    @property
    def id(self) -> SandboxId:
        """Unique within its substrate."""
        return self._id

    async def exec(self, command: Command) -> ExecResult:
        """Ask the script.  InvalidArgumentError and SandboxLostError as in a real sandbox."""
        encode_command(command)
        self._require_alive()
        self.commands.append(command)
        answer = self._script(self, command)
        result = await answer if inspect.isawaitable(answer) else answer
        self._require_alive()
        limit = command.output_bytes_max
        return msgspec.structs.replace(
            result, stdout=_bounded(result.stdout, limit), stderr=_bounded(result.stderr, limit)
        )

    async def destroy(self) -> None:
        """Every later exec is lost."""
        self.is_destroyed = True

    def _require_alive(self) -> None:
        if self.is_destroyed:
            raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")


class FakeSubstrate:
    """Sandboxes answered for by one script; `sandboxes` holds all that were made."""

    def __init__(self, script: Script = succeed) -> None:
        self._script = script
        self._numbers = itertools.count(1)
        self._is_open = False
        self.sandboxes: list[FakeSandbox] = []

    async def open(self) -> None:
        """Start."""
        self._is_open = True

    async def create(self, spec: SandboxSpec) -> FakeSandbox:
        """A fresh sandbox.  InvalidArgumentError for limits that cannot be, SpawnError if not open."""
        check_spec(spec)
        if not self._is_open:
            raise SpawnError("the substrate is not open")
        sandbox = FakeSandbox(SandboxId(f"fake-{next(self._numbers)}"), spec, self._script)
        self.sandboxes.append(sandbox)
        return sandbox

    async def close(self) -> None:
        """Destroy every sandbox."""
        for sandbox in self.sandboxes:
            await sandbox.destroy()
        self._is_open = False


def _bounded(whole: Output, bytes_max: int) -> Output:
    """Scripted output cut as a real sandbox would; what a script cut itself stays."""
    if whole.is_truncated:
        return whole
    buffer = OutputBuffer(bytes_max)
    buffer.add(memoryview(whole.data))
    return buffer.output()
