"""One container of Docker's, with our guest in it.

Everything about commands is in guest_sandbox.py, and Docker is asked by docker.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from dsec.edge.commands import completed
from dsec.edge.config import SubstrateConfig
from dsec.edge.keeper import Keeper, short_name
from dsec.edge.network.gateway import Gateway, environment
from dsec.edge.substrates.adoption import KeptSandbox, facts_key, guest_key, make_facts
from dsec.edge.substrates.guest_sandbox import GuestSandbox
from dsec.edge.substrates.processes import GuestProcess
from dsec.edge.substrates.streams import Keeping
from dsec.errors import SpawnError
from dsec.types import Command, LayerId, NetworkPolicy, SandboxId, SandboxSpec

STARTED_POLL_S = 2.0
_NO_SLOT = 0


class DockerHost(Protocol):
    """What a container needs of its substrate; every call may raise ResourceExhaustedError, with Docker's reason."""

    gateway: Gateway
    keeper: Keeper | None
    directory: Path

    @property
    def config(self) -> SubstrateConfig:
        """Its bounds."""
        ...

    def keeping(self, sandbox_id: SandboxId) -> Keeping:
        """What of the sandbox's commands outlives this process."""
        ...

    async def make(self, name: str, spec: SandboxSpec, control: Path) -> None:
        """Create and start a container whose pid 1 connects to `control`.  SpawnError."""
        ...

    async def end_of(self, name: str) -> str:
        """How the container has ended; empty while it runs."""
        ...

    async def pause(self, name: str) -> None:
        """Freeze it."""
        ...

    async def resume(self, name: str) -> None:
        """Let it go on."""
        ...

    async def commit(self, name: str, spec: SandboxSpec) -> LayerId:
        """What it wrote, as a layer."""
        ...

    async def forget(self, sandbox: DockerSandbox) -> None:
        """Remove the container."""
        ...


async def accepted(listener: socket.socket, end: Callable[[], Awaitable[str]]) -> socket.socket:
    """The first connection.  SpawnError once the container that was to connect has an `end`."""
    accepting = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
    try:
        while not accepting.done():  # one that is cut short could lose the connection that just came
            await asyncio.wait([accepting], timeout=STARTED_POLL_S)
            if not accepting.done() and (why := await end()):
                raise SpawnError(f"the container ended before it connected: {why}")
        return accepting.result()[0]
    finally:
        accepting.cancel()


class DockerSandbox(GuestSandbox):
    """One container; made by `DockerSubstrate.create`.  Implements `dsec.sandbox.Sandbox`."""

    def __init__(self, substrate: DockerHost, sandbox_id: SandboxId, spec: SandboxSpec) -> None:
        super().__init__(substrate.config, substrate.keeping(sandbox_id))
        self._id = sandbox_id
        self._substrate = substrate
        self._spec = spec
        self._making: asyncio.Task[None] | None = None
        self._facts = -1

    @property
    def name(self) -> str:
        """Of the container."""
        return f"dsec-{self._id}"

    # -- made, or taken over ---------------------------------------------------------------------

    async def set_up(self) -> None:
        """Make the container, start it and take its connection.  If it fails, destroy it.  SpawnError."""
        path = self._substrate.directory / secrets.token_hex(8)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                with short_name(path) as name:
                    listener.bind(name)
                path.chmod(0o666)  # root of the container may be nobody here; the directory is ours
                listener.listen(1)
                listener.setblocking(False)
                self._making = asyncio.create_task(self._substrate.make(self.name, self._spec, path))
                await asyncio.shield(self._making)
                with await accepted(listener, lambda: self._substrate.end_of(self.name)) as meeting:
                    connection = self._meet(meeting)
            await self._connect(connection)
            await self._apply_network(self._spec.network)
            await self._keep()
        finally:
            path.unlink(missing_ok=True)

    def _meet(self, meeting: socket.socket) -> socket.socket:
        """Give the guest its end of a control socket; ours comes back."""
        self._host_pid = struct.unpack("3i", meeting.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(meeting, [b"\0"], [theirs.fileno()])
        return ours

    async def take_over(self, kept: KeptSandbox) -> None:
        """Go on with a container that an earlier process made.  On any failure it is destroyed.  SandboxLostError."""
        self._host_pid, self._facts = kept.host_pid, kept.facts
        self._adopt(socket.socket(fileno=kept.connection), kept.files)
        try:
            await self._apply_network(self._spec.network)
        except BaseException:
            self._start_destroying()
            raise

    async def _keep(self) -> None:
        """From here on it outlives this process; once more where the facts have changed."""
        keeper, old = self._substrate.keeper, self._facts
        if keeper is None:
            return
        self._facts = make_facts(self._spec)
        files = {facts_key(self._id): self._facts}
        if old < 0:
            files[guest_key(self._id, _NO_SLOT, self._host_pid)] = self._living().fileno()
        await keeper.put_all(files)
        if old >= 0:
            os.close(old)

    async def _forget(self) -> None:
        if self._substrate.keeper is not None and self._facts >= 0:
            await self._substrate.keeper.drop(guest_key(self._id, _NO_SLOT, self._host_pid), facts_key(self._id))
            os.close(self._facts)
            self._facts = -1

    def detach(self) -> None:
        """Leave it to the next process."""
        super().detach()
        if self._facts >= 0:
            os.close(self._facts)
            self._facts = -1

    # -- the port --------------------------------------------------------------------------------

    async def start(self, command: Command, number: int | None = None) -> GuestProcess:
        """See `dsec.sandbox.Sandbox.start`."""
        shaped = completed(command, self._spec.defaults, environment(self._spec.network))
        return await super().start(shaped, number)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See `dsec.sandbox.Sandbox.update_network`."""
        await self._apply_network(policy)
        await self._keep()

    async def _apply_network(self, policy: NetworkPolicy) -> None:
        self._living()
        await self._substrate.gateway.apply(self._id, self.open_guest, policy)
        self._spec = msgspec.structs.replace(self._spec, network=policy)

    async def snapshot(self) -> LayerId:
        """See `dsec.sandbox.Sandbox.snapshot`.  The layer is an image of Docker's."""
        async with self._standing_still():
            return await self._substrate.commit(self.name, self._spec)

    async def _freeze(self) -> None:
        await self._substrate.pause(self.name)

    async def _thaw(self) -> None:
        await self._substrate.resume(self.name)

    async def _reclaim(self) -> None:
        """Docker has no call for it: the memory stays until the host needs it."""

    async def _release(self) -> None:
        await self._substrate.gateway.detach(self._id)
        await self._forget()
        if self._guest is not None:
            self._guest.close()
        if self._making is not None:
            await asyncio.wait([self._making])
        await self._substrate.forget(self)
