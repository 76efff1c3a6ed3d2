"""Container sandboxes on this host: slots and bounds, over the spawner that does the work in C (`dsec/native`).

A slot is a number below `sandboxes_count_max`; it stands for a range of uids and a cgroup name, and
is used again only after the spawner has said that nothing of its last sandbox is left.

Invariants:
    1. A create that fails or is cancelled leaves nothing: its slot is destroyed like any other.

See: docs/architecture.md "Sandbox", docs/threat_model.md, dsec/native/protocol.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from pathlib import Path

from dsec.edge.capture import READ_BYTES_MAX
from dsec.edge.commands import check_spec
from dsec.edge.config import SubstrateConfig
from dsec.edge.linux import cgroup, skeleton
from dsec.edge.linux.host import require_fit_host
from dsec.edge.network.gateway import Gateway
from dsec.edge.spawner import Spawner
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.errors import DsecError, HostUnfitError, ResourceExhaustedError, SpawnError
from dsec.types import Command, SandboxId, SandboxSpec


class ContainerSubstrate:
    """Containers on this host.  Implements `dsec.sandbox.Substrate`; root only."""

    def __init__(self, config: SubstrateConfig | None = None) -> None:
        self.config = config or SubstrateConfig()
        self.scratch = bytearray(READ_BYTES_MAX)
        self.gateway = Gateway()
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
        await self.gateway.close()
        await self._stop()
