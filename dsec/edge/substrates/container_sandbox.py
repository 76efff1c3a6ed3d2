"""One container of the native spawner: made in a slot, handed out under an id, stopped and packed through its cgroups.

See: docs/architecture.md "Sandbox", dsec/edge/substrates/guest_sandbox.py, dsec/edge/substrates/container.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from dsec.edge.commands import completed
from dsec.edge.config import SubstrateConfig
from dsec.edge.keeper import Keeper
from dsec.edge.linux import skeleton
from dsec.edge.native_wire import FD_DISK
from dsec.edge.network.gateway import Gateway, environment
from dsec.edge.spool import Spool
from dsec.edge.substrates.guest_sandbox import GuestSandbox, whole
from dsec.edge.substrates.layer_mounts import Layers
from dsec.edge.substrates.processes import GuestProcess
from dsec.edge.substrates.seats import Seat
from dsec.edge.substrates.streams import Keeping
from dsec.errors import HostUnfitError, ResourceExhaustedError, SandboxLostError, StateError
from dsec.types import Command, Defaults, LayerId, NetworkPolicy, SandboxId, SandboxSpec

log = logging.getLogger(__name__)


Kind = tuple[str, tuple[LayerId, ...]]


def kind_of(spec: SandboxSpec) -> Kind:
    """What of a spec can be no other once a sandbox is made.

    The root is built of base and layers, and pid 1 stands in it and may enter no other.  All else is attached when it
    is handed out.
    """
    return spec.base, spec.layers


def _limits_of(spec: SandboxSpec) -> SandboxSpec:
    """What the kernel has to know of a spec when it is attached: commands and the gateway read the rest from it."""
    return msgspec.structs.replace(spec, network=NetworkPolicy(), defaults=Defaults())


class SandboxHost(Protocol):
    """What a container needs of its substrate."""

    config: SubstrateConfig
    scratch: bytearray
    gateway: Gateway
    keeper: Keeper | None
    layers: Layers | None
    state_dir: Path | None

    async def release(self, sandbox: ContainerSandbox, *, had_network: bool) -> None:
        """End what is in the sandbox's slot and free it."""
        ...


class ContainerSandbox(GuestSandbox):
    """One container; made by `ContainerSubstrate.create`.  Implements `dsec.sandbox.Sandbox`."""

    def __init__(self, substrate: SandboxHost, seat: Seat) -> None:
        super().__init__(substrate.config, Keeping(SandboxId(""), substrate.scratch))
        self.seat = seat
        self._substrate = substrate
        self._spec = SandboxSpec()

    @property
    def spec(self) -> SandboxSpec:
        """What it is, with its present network."""
        return self._spec

    # -- birth -----------------------------------------------------------------------------------

    async def set_up(self, spec: SandboxSpec) -> None:
        """Make the container in our slot, without a network; on any failure the slot is given back.  SpawnError."""
        try:
            connection, self._host_pid = await self.seat.create(spec)
            await self._connect(connection)
        except BaseException:
            self._start_destroying()
            raise
        self._spec = msgspec.structs.replace(spec, network=NetworkPolicy())

    async def hand_out(self, sandbox_id: SandboxId, spec: SandboxSpec) -> None:
        """Give it its id, and what of the spec it was not made with; from here on it outlives this process.

        It was made for a spec of the same `kind_of`.  It is destroyed if that fails.
        """
        self._name(sandbox_id)
        try:
            if _limits_of(spec) != _limits_of(self._spec):
                await self.seat.attach(spec)
            self._spec = msgspec.structs.replace(spec, network=NetworkPolicy())
            await self._apply_network(spec.network)
            await self.seat.keep(sandbox_id, self._spec)
        except BaseException:
            self._start_destroying()
            raise

    async def adopt(
        self,
        connection: socket.socket,
        host_pid: int,
        sandbox_id: SandboxId,
        spec: SandboxSpec,
        files: Mapping[str, int],
    ) -> None:
        """Go on with a container that an earlier process made; `files` are its running commands' descriptors.

        On any failure it is destroyed.  SandboxLostError.
        """
        self._name(sandbox_id)
        self._spec, self._host_pid = spec, host_pid
        self._adopt(connection, files)
        try:
            await self._apply_network(spec.network)
        except StateError as error:  # a process of it has the proxy's port: no way out then, but no end either
            log.warning("sandbox %s has no network any more: %s", sandbox_id, error)
            self._spec = msgspec.structs.replace(spec, network=NetworkPolicy())
        except BaseException:
            self._start_destroying()
            raise

    def _name(self, sandbox_id: SandboxId) -> None:
        self._id = sandbox_id
        spool, config = None, self._config
        if self._substrate.state_dir is not None:
            directory = self._substrate.state_dir / "spool" / sandbox_id
            spool = Spool(directory, config.spool_bytes_max, config.spool_sandbox_bytes_max)
        self._keeping = Keeping(sandbox_id, self._substrate.scratch, self._substrate.keeper, spool)

    # -- life ------------------------------------------------------------------------------------

    async def start(self, command: Command, number: int | None = None) -> GuestProcess:
        """See `dsec.sandbox.Sandbox.start`."""
        shaped = completed(command, self._spec.defaults, environment(self._spec.network))
        return await super().start(shaped, number)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See `dsec.sandbox.Sandbox.update_network`.  StateError if a process of the sandbox has the proxy's port."""
        await self._apply_network(policy)
        await self.seat.keep(self._id, self._spec)

    async def _apply_network(self, policy: NetworkPolicy) -> None:
        self._living()
        await self._substrate.gateway.apply(self._id, self.open_guest, policy)
        self._spec = msgspec.structs.replace(self._spec, network=policy)

    async def snapshot(self) -> LayerId:
        """See `dsec.sandbox.Sandbox.snapshot`."""
        layers = self._substrate.layers
        if layers is None:
            raise HostUnfitError("snapshots need a store of layers, and this substrate was made without one")
        # Without layers the skeleton lies on the disk itself, and what was removed of it left no whiteout.
        is_plain = self._spec.base == "host" and not self._spec.layers
        beneath = [entry.path for entry in skeleton.entries()] if is_plain else []
        async with self._standing_still():
            with self._disk() as disk:
                return await whole(layers.pack(disk, self.seat.first_uid, parents=self._spec.layers, beneath=beneath))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[Path]:
        """What was written below /, for as long as the block; the guest's, whoever has its number later."""
        try:
            fd = os.open(f"/proc/{self._host_pid}/fd/{FD_DISK}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SandboxLostError(f"sandbox {self._id} is gone: {error.strerror}") from error
        try:
            os.close(self.open_guest())  # it lives still, so the number was its own
            yield Path(f"/proc/self/fd/{fd}/root")
        finally:
            os.close(fd)

    async def _freeze(self) -> None:
        if not await asyncio.to_thread(self.seat.box.freeze):
            raise ResourceExhaustedError(f"the processes of sandbox {self._id} cannot be stopped now")

    async def _thaw(self) -> None:
        with contextlib.suppress(OSError):  # its cgroups went with it
            self.seat.box.thaw()

    async def _reclaim(self) -> None:
        await asyncio.to_thread(self.seat.box.reclaim)

    def detach(self) -> None:
        """Leave it to the next process."""
        super().detach()
        self.seat.detach()

    async def _release(self) -> None:
        had_network = await self._substrate.gateway.detach(self._id)
        await self._substrate.release(self, had_network=had_network)
        if self._guest is not None:
            self._guest.close()
