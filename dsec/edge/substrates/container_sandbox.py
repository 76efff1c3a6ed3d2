"""One container: the meeting of the guest's answers, the command's pipes and the caller's patience.

Invariants:
    1. A sandbox that cannot be used any more is destroyed by itself; every later call says so (SandboxLostError).
    2. An exec closes every pipe it opened, however it ends.

See: docs/architecture.md "Sandbox", dsec/native/guest.c, dsec/edge/substrates/container.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from errno import E2BIG
from pathlib import Path
from typing import Protocol

import msgspec

from dsec.edge.commands import encode_command
from dsec.edge.config import SubstrateConfig
from dsec.edge.guest import Exited, Guest, Refused
from dsec.edge.keeper import Keeper
from dsec.edge.native_wire import EXIT_OOM_KILLED, EXIT_TIMED_OUT, Stage
from dsec.edge.network.gateway import Gateway, environment
from dsec.edge.substrates.processes import Pipes, crowded, exit_code_of
from dsec.edge.substrates.seats import Seat
from dsec.errors import DsecError, InvalidArgumentError, ResourceExhaustedError, SandboxLostError
from dsec.types import Command, ExecResult, NetworkPolicy, SandboxId, SandboxSpec

_LOST_STAGES = (Stage.REQUEST, Stage.GROUP, Stage.ALONE)


class SandboxHost(Protocol):
    """What a container needs of its substrate."""

    config: SubstrateConfig
    scratch: bytearray
    gateway: Gateway
    keeper: Keeper | None
    state_dir: Path | None

    async def release(self, sandbox: ContainerSandbox, *, had_network: bool) -> None:
        """End what is in the sandbox's slot and free it."""
        ...


class ContainerSandbox:
    """One container; made by `ContainerSubstrate.create`.  Implements `dsec.sandbox.Sandbox`."""

    def __init__(self, substrate: SandboxHost, seat: Seat) -> None:
        self.seat = seat
        self._substrate = substrate
        self._id = SandboxId("")
        self._spec = SandboxSpec()
        self._guest: Guest | None = None
        self._host_pid = 0
        self._destroying: asyncio.Task[None] | None = None
        self._execs = asyncio.Semaphore(substrate.config.execs_in_flight_max)

    @property
    def id(self) -> SandboxId:
        """Unique on this host; empty until the sandbox is handed out."""
        return self._id

    @property
    def spec(self) -> SandboxSpec:
        """What it is, with its present network."""
        return self._spec

    @property
    def host_pid(self) -> int:
        """Process id of the guest on the host."""
        return self._host_pid

    async def set_up(self, spec: SandboxSpec) -> None:
        """Make the container in our slot, without a network; on any failure the slot is given back.  SpawnError."""
        try:
            connection, self._host_pid = await self.seat.create(spec)
            self._guest = Guest(connection, self._on_lost)
            await self._guest.ready()
        except BaseException:
            self._start_destroying()
            raise
        self._spec = msgspec.structs.replace(spec, network=NetworkPolicy())

    async def hand_out(self, sandbox_id: SandboxId, spec: SandboxSpec) -> None:
        """Give it its id and network; from here on it outlives this process.  It is destroyed if that fails."""
        self._id = sandbox_id
        try:
            await self._apply_network(spec.network)
            await self.seat.keep(sandbox_id, self._spec)
        except BaseException:
            self._start_destroying()
            raise

    async def adopt(
        self, connection: socket.socket, host_pid: int, sandbox_id: SandboxId, spec: SandboxSpec, files: dict[str, int]
    ) -> None:
        """Go on with a container that an earlier process made; `files` are its running commands' descriptors.

        On any failure it is destroyed.  SandboxLostError.
        """
        self._id, self._spec, self._host_pid = sandbox_id, spec, host_pid
        self._guest = Guest(connection, self._on_lost)
        try:
            await self._apply_network(spec.network)
        except BaseException:
            self._start_destroying()
            raise

    def detach(self) -> None:
        """Leave it to the next process."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    async def exec(self, command: Command) -> ExecResult:
        """See `dsec.sandbox.Sandbox.exec`."""
        command = msgspec.structs.replace(command, env=environment(self._spec.network) | command.env)
        body = encode_command(command)
        async with self._execs:
            if self._guest is None or self._destroying is not None:
                raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")
            return await self._run(self._guest, command, body)

    async def _run(self, guest: Guest, command: Command, body: bytes) -> ExecResult:
        started = time.monotonic()
        pipes = Pipes(command, self._substrate.scratch)
        try:
            try:
                exec_id = await guest.start(command, body, pipes.theirs)
            finally:
                pipes.close_theirs()
            answer = await self._answer(guest, exec_id, command.timeout_s)
            if isinstance(answer, Refused):
                if answer.stage == Stage.CROWDED:
                    return crowded(command, time.monotonic() - started)
                raise self._refusal(answer, command)
            stdout, stderr = pipes.finish()
        finally:
            pipes.close()
        timed_out = bool(answer.flags & EXIT_TIMED_OUT)
        return ExecResult(
            exit_code=137 if timed_out else exit_code_of(answer.wait_status),
            stdout=stdout,
            stderr=stderr,
            timed_out=timed_out,
            oom_killed=bool(answer.flags & EXIT_OOM_KILLED),
            duration_s=time.monotonic() - started,
        )

    async def _answer(self, guest: Guest, exec_id: int, timeout_s: float) -> Exited | Refused:
        try:
            async with asyncio.timeout(timeout_s + self._substrate.config.answer_grace_s):
                return await guest.answer(exec_id)
        except TimeoutError as error:
            self._start_destroying()
            raise SandboxLostError(f"the guest of sandbox {self._id} stopped answering") from error

    def _refusal(self, answer: Refused, command: Command) -> DsecError:
        """Whose fault it was that the command did not start; a sandbox that cannot start commands is destroyed."""
        text = os.strerror(answer.errno)
        if answer.stage == Stage.CWD:
            return InvalidArgumentError(f"cwd {command.cwd!r}: {text}")
        if answer.stage == Stage.EXEC and answer.errno == E2BIG:
            return InvalidArgumentError(f"argv and env: {text}")
        what = f"the command could not be started ({answer.stage.name.lower()}): {text}"
        if answer.stage in _LOST_STAGES:
            self._start_destroying()
            return SandboxLostError(f"sandbox {self._id} no longer works: {what}")
        return ResourceExhaustedError(what)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See `dsec.sandbox.Sandbox.update_network`.  StateError if a process of the sandbox has the proxy's port."""
        await self._apply_network(policy)
        await self.seat.keep(self._id, self._spec)

    async def _apply_network(self, policy: NetworkPolicy) -> None:
        if self._guest is None or self._destroying is not None:
            raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")
        await self._substrate.gateway.apply(self._id, self._host_pid, policy)
        self._spec = msgspec.structs.replace(self._spec, network=policy)

    async def destroy(self) -> None:
        """See `dsec.sandbox.Sandbox.destroy`."""
        await asyncio.shield(self._start_destroying())

    def _on_lost(self) -> None:
        self._start_destroying()

    def _start_destroying(self) -> asyncio.Task[None]:
        if self._destroying is None:
            self._destroying = asyncio.create_task(self._destroy(), name=f"destroy {self._id}")
        return self._destroying

    async def _destroy(self) -> None:
        had_network = await self._substrate.gateway.detach(self._id)
        await self._substrate.release(self, had_network=had_network)
        if self._guest is not None:
            self._guest.close()
