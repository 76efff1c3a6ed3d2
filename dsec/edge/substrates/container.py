"""Container sandboxes: namespaces, overlayfs, cgroups and seccomp, made by our own spawner.

The work is done in C (`dsec/native`): here are slots, bounds and the meeting of three streams, the
guest's answers, the command's pipes and the caller's patience.  A slot is a number below
`sandboxes_count_max`; it stands for a range of uids and a cgroup name, and is used again only
after the spawner has said that nothing of its last sandbox is left.

Invariants:
    1. A create that fails or is cancelled leaves nothing: its slot is destroyed like any other.
    2. An exec closes every pipe it opened, however it ends.

See: docs/architecture.md "Sandbox", docs/threat_model.md, dsec/native/protocol.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import time
from errno import E2BIG
from pathlib import Path

from dsec.edge.capture import READ_BYTES_MAX, OutputBuffer, PipeReader, PipeWriter
from dsec.edge.commands import check_spec, encode_command
from dsec.edge.config import SubstrateConfig
from dsec.edge.guest import Exited, Guest, Refused
from dsec.edge.linux import cgroup, skeleton
from dsec.edge.linux.host import require_fit_host
from dsec.edge.native_wire import EXIT_OOM_KILLED, EXIT_TIMED_OUT, Stage
from dsec.edge.spawner import Spawner
from dsec.errors import (
    DsecError,
    HostUnfitError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SandboxLostError,
    SpawnError,
)
from dsec.types import Command, ExecResult, Output, SandboxId, SandboxSpec

CROWDED_MESSAGE = b"cannot start: Resource temporarily unavailable (too many processes in this sandbox)\n"
_LOST_STAGES = (Stage.REQUEST, Stage.GROUP, Stage.ALONE)


class ContainerSandbox:
    """One container; made by `ContainerSubstrate.create`.  Implements `dsec.sandbox.Sandbox`."""

    def __init__(self, substrate: ContainerSubstrate, spawner: Spawner, slot: int, sandbox_id: SandboxId) -> None:
        self._substrate = substrate
        self._spawner = spawner
        self._slot = slot
        self._id = sandbox_id
        self._guest: Guest | None = None
        self._host_pid = 0
        self._destroying: asyncio.Task[None] | None = None
        self._execs = asyncio.Semaphore(substrate.config.execs_in_flight_max)

    @property
    def id(self) -> SandboxId:
        """Unique on this host."""
        return self._id

    @property
    def host_pid(self) -> int:
        """Process id of the guest on the host."""
        return self._host_pid

    async def set_up(self, spec: SandboxSpec) -> None:
        """Make the container in our slot; on any failure the slot is given back.  SpawnError."""
        try:
            plan = cgroup.plan_sandbox(self._substrate.hierarchies, self._slot, spec)
            connection, self._host_pid = await self._spawner.create(self._slot, spec, plan)
            self._guest = Guest(connection, self._on_lost)
            await self._guest.ready()
        except BaseException:
            self._start_destroying()
            raise

    async def exec(self, command: Command) -> ExecResult:
        """See `dsec.sandbox.Sandbox.exec`."""
        body = encode_command(command)
        async with self._execs:
            if self._guest is None or self._destroying is not None:
                raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")
            return await self._run(self._guest, command, body)

    async def _run(self, guest: Guest, command: Command, body: bytes) -> ExecResult:
        started = time.monotonic()
        pipes = _Pipes(command, self._substrate.scratch)
        try:
            try:
                exec_id = await guest.start(command, body, pipes.theirs)
            finally:
                pipes.close_theirs()
            answer = await self._answer(guest, exec_id, command.timeout_s)
            if isinstance(answer, Refused):
                if answer.stage == Stage.CROWDED:
                    return _crowded(command, time.monotonic() - started)
                raise self._refusal(answer, command)
            stdout, stderr = pipes.finish()
        finally:
            pipes.close()
        timed_out = bool(answer.flags & EXIT_TIMED_OUT)
        return ExecResult(
            exit_code=137 if timed_out else _exit_code(answer.wait_status),
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
        if self._guest is not None:
            self._guest.close()
        await self._substrate.release(self._spawner, self._slot)


class ContainerSubstrate:
    """Containers on this host.  Implements `dsec.sandbox.Substrate`; root only."""

    def __init__(self, config: SubstrateConfig | None = None) -> None:
        self.config = config or SubstrateConfig()
        self.scratch = bytearray(READ_BYTES_MAX)
        self._spawner: Spawner | None = None
        self._hierarchies: cgroup.Hierarchies | None = None
        self._owned: list[tuple[str, str]] = []
        self._free: list[int] = []
        self._sandboxes: dict[int, ContainerSandbox] = {}
        self._created_count = 0
        self._creates = asyncio.Semaphore(self.config.creates_in_flight_max)
        self._restart = asyncio.Lock()

    @property
    def spawner(self) -> Spawner:
        """The running spawner.  SpawnError before `open` and after `close`."""
        if self._spawner is None:
            raise SpawnError("the substrate is not open")
        return self._spawner

    @property
    def hierarchies(self) -> cgroup.Hierarchies:
        """The host's cgroup hierarchies.  SpawnError before `open`."""
        if self._hierarchies is None:
            raise SpawnError("the substrate is not open")
        return self._hierarchies

    async def open(self) -> None:
        """See `dsec.sandbox.Substrate.open`.  Proves itself by one sandbox that runs one command."""
        require_fit_host(self.config)
        await asyncio.to_thread(cgroup.sweep, self.config.cgroup_parent)
        self._hierarchies = cgroup.detect()
        try:
            await self._start()
            await self._prove()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        try:
            self._owned = cgroup.make_owner_directories(self.hierarchies, self.config.cgroup_parent)
        except OSError as error:
            raise HostUnfitError(f"cannot make a cgroup: {error}") from error
        base = skeleton.encode(skeleton.entries())
        self._spawner = await Spawner.start(self.config.binary_path, self._owned, base)
        self._free = list(range(self.config.sandboxes_count_max))

    async def _stop(self) -> None:
        """End the spawner with its sandboxes, if there is one, and remove our cgroups."""
        spawner, self._spawner = self._spawner, None
        owned, self._owned = self._owned, []
        if spawner is not None:
            await spawner.close()
        for parent, name in owned:
            await asyncio.to_thread(cgroup.remove_tree, Path(parent) / name)

    async def _require_spawner(self) -> Spawner:
        """The spawner; a dead one took its sandboxes along and is replaced, with slots all free."""
        async with self._restart:
            if not self.spawner.is_alive:
                await self._stop()
                self._sandboxes.clear()
                await self._start()
            return self.spawner

    async def _prove(self) -> None:
        try:
            sandbox = await self.create(SandboxSpec())
            result = await sandbox.exec(Command(argv=("/bin/true",)))
            await sandbox.destroy()
        except DsecError as error:
            raise HostUnfitError(f"this host cannot run a sandbox: {error}") from error
        if result.exit_code != 0:
            raise HostUnfitError(f"/bin/true ended with {result.exit_code} in a sandbox on this host")

    async def create(self, spec: SandboxSpec) -> ContainerSandbox:
        """See `dsec.sandbox.Substrate.create`.  InvalidArgumentError for limits that cannot be."""
        check_spec(spec)
        async with self._creates:
            spawner = await self._require_spawner()
            if not self._free:
                raise ResourceExhaustedError(f"all {self.config.sandboxes_count_max} sandboxes of this host are in use")
            slot = heapq.heappop(self._free)
            self._created_count += 1
            owner = self._owned[0][1].removeprefix("dsec-")
            sandbox = ContainerSandbox(self, spawner, slot, SandboxId(f"{owner}.{self._created_count}"))
            self._sandboxes[slot] = sandbox
            try:
                async with asyncio.timeout(self.config.create_timeout_s):
                    await sandbox.set_up(spec)
            except TimeoutError as error:
                raise SpawnError(f"the sandbox was not ready within {self.config.create_timeout_s} s") from error
            return sandbox

    async def release(self, spawner: Spawner, slot: int) -> None:
        """End what `spawner` has in `slot` and free it; a spawner that died ended everything by itself."""
        with contextlib.suppress(SpawnError):
            await spawner.destroy(slot)
        if spawner is self._spawner and spawner.is_alive:
            heapq.heappush(self._free, slot)
            self._sandboxes.pop(slot, None)

    async def close(self) -> None:
        """See `dsec.sandbox.Substrate.close`.  Safe to call twice."""
        await asyncio.gather(*(sandbox.destroy() for sandbox in list(self._sandboxes.values())))
        self._sandboxes.clear()
        await self._stop()


class _Pipes:
    """The pipes of one command: our ends on the event loop, the command's ends until they are sent."""

    def __init__(self, command: Command, scratch: bytearray) -> None:
        self.theirs: list[int] = []
        self._writer: PipeWriter | None = None
        self._readers: list[PipeReader] = []
        try:
            if command.stdin:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                self._writer = PipeWriter(ours, command.stdin)
            for _ in range(1 if command.merge_stderr else 2):
                ours, theirs = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                self._readers.append(PipeReader(ours, OutputBuffer(command.output_bytes_max), scratch))
        except OSError as error:
            self.close()
            raise ResourceExhaustedError(f"no pipes for a command: {error}") from error

    def close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def finish(self) -> tuple[Output, Output]:
        """What came on stdout and stderr until now."""
        outputs = [reader.finish() for reader in self._readers]
        return outputs[0], outputs[1] if len(outputs) == 2 else Output()

    def close(self) -> None:
        self.close_theirs()
        if self._writer is not None:
            self._writer.close()
        for reader in self._readers:
            reader.close()


def _exit_code(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def _crowded(command: Command, duration_s: float) -> ExecResult:
    """What a shell would say of a program that it cannot fork for."""
    message = OutputBuffer(command.output_bytes_max)
    message.add(memoryview(CROWDED_MESSAGE))
    said = message.output()
    stdout, stderr = (said, Output()) if command.merge_stderr else (Output(), said)
    return ExecResult(exit_code=126, stdout=stdout, stderr=stderr, duration_s=duration_s)
