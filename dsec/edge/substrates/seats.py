"""Slots of a spawner, each with what its sandbox needs of the host: cgroups, layers, keys in the keeper.

A seat is one slot from the moment when it was taken until nothing of its sandbox is left.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import socket

from dsec.edge.keeper import Keeper
from dsec.edge.linux import cgroup
from dsec.edge.native_wire import UIDS_PER_SLOT, CgroupPlan
from dsec.edge.spawner import Spawner
from dsec.edge.substrates.adoption import KeptSandbox, facts_key, guest_key, make_facts, spawner_key
from dsec.edge.substrates.layer_mounts import LayerMounts
from dsec.errors import ResourceExhaustedError, SpawnError
from dsec.types import LayerId, SandboxId, SandboxSpec


class Seats:
    """The slots of one spawner.  `close` or `detach` ends their use."""

    def __init__(
        self,
        spawner: Spawner,
        found: cgroup.Hierarchies,
        cgroup_parent: str,
        mounts: LayerMounts,
        keeper: Keeper | None,
        count_max: int,
    ) -> None:
        self.spawner = spawner
        self.mounts = mounts
        self.keeper = keeper
        self._found = found
        self._cgroup_parent = cgroup_parent
        self._count_max = count_max
        self._free = [number for number in range(count_max) if number not in spawner.alive]

    @property
    def free_count(self) -> int:
        """How many sandboxes can still be made."""
        return len(self._free)

    def take(self) -> Seat:
        """A free seat.  ResourceExhaustedError."""
        if not self._free:
            raise ResourceExhaustedError(f"all {self._count_max} sandboxes of this host are in use")
        return Seat(self, heapq.heappop(self._free))

    def take_back(self, kept: KeptSandbox) -> Seat:
        """The seat of a sandbox that lives on."""
        seat = Seat(self, kept.slot)
        seat.adopt(kept)
        return seat

    async def clear(self, number: int) -> None:
        """End whatever has a slot, and free it."""
        await Seat(self, number).release(had_network=True)

    def plan(self, number: int, spec: SandboxSpec) -> CgroupPlan:
        """The cgroups of a sandbox."""
        return cgroup.plan_sandbox(self._found, number, spec)

    def box(self, number: int) -> cgroup.Box:
        """The cgroups of a sandbox that lives."""
        return cgroup.box_of(self._found, self._cgroup_parent, self.spawner.name, number)

    def free(self, number: int) -> None:
        """A slot has nothing in it."""
        if number < self._count_max:
            heapq.heappush(self._free, number)

    async def close(self) -> None:
        """End the spawner, with all its sandboxes."""
        await self.mounts.close(is_over=True)
        if self.keeper is not None:
            await self.keeper.drop(spawner_key(self.spawner.pid, self.spawner.name))
        await self.spawner.close()

    async def detach(self) -> None:
        """Leave the spawner and its sandboxes to the next process."""
        await self.mounts.close(is_over=False)
        self.spawner.detach()


class Seat:
    """A slot, and what its sandbox holds."""

    def __init__(self, seats: Seats, number: int) -> None:
        self.number = number
        self._seats = seats
        self._layers: tuple[LayerId, ...] = ()
        self._connection = -1  # the guest's socket, which is the sandbox's
        self._host_pid = 0
        self._id = SandboxId("")  # with the keeper under this id
        self._facts = -1

    @property
    def first_uid(self) -> int:
        """Which user of the host is root inside."""
        return self._seats.spawner.first_uid + self.number * UIDS_PER_SLOT

    @property
    def box(self) -> cgroup.Box:
        """Its cgroups."""
        return self._seats.box(self.number)

    async def create(self, spec: SandboxSpec) -> tuple[socket.socket, int]:
        """Our end of the guest's socket and its pid on the host; the guest then sets itself up.

        SpawnError, NotFoundError (a layer), ResourceExhaustedError.
        """
        numbers = await self._seats.mounts.acquire(spec.layers)
        self._layers = spec.layers
        plan = self._seats.plan(self.number, spec)
        connection, self._host_pid = await self._seats.spawner.create(self.number, spec, plan, numbers)
        self._connection = connection.fileno()
        return connection, self._host_pid

    async def attach(self, spec: SandboxSpec) -> None:
        """Make of the sandbox, which has run nothing, one of this spec, of the same kind (`kind_of`).  SpawnError."""
        await self._seats.spawner.attach(self.number, spec, self._seats.plan(self.number, spec))

    def adopt(self, kept: KeptSandbox) -> None:
        """It is with the keeper already."""
        self._layers = kept.spec.layers
        self._connection, self._host_pid = kept.connection, kept.host_pid
        self._id, self._facts = kept.id, kept.facts

    async def keep(self, sandbox_id: SandboxId, spec: SandboxSpec) -> None:
        """From here on the sandbox outlives this process; once more where the facts have changed."""
        keeper = self._seats.keeper
        if keeper is None:
            return
        old, self._id, self._facts = self._facts, sandbox_id, make_facts(spec)
        files = {facts_key(sandbox_id): self._facts}
        if old < 0:
            files[guest_key(sandbox_id, self.number, self._host_pid)] = self._connection
        await keeper.put_all(files)
        if old >= 0:
            os.close(old)

    async def release(self, *, had_network: bool) -> None:
        """End what is in the slot and free it; a spawner that died ended everything by itself.

        The guest's socket must be open until then: the keeper may be given it again.
        """
        await self._forget()
        with contextlib.suppress(SpawnError):
            await self._seats.spawner.destroy(self.number, had_network=had_network)
        self._seats.mounts.release(self._layers)
        if self._seats.spawner.is_alive:
            self._seats.free(self.number)

    async def _forget(self) -> None:
        if self._seats.keeper is not None and self._facts >= 0:
            await self._seats.keeper.drop(guest_key(self._id, self.number, self._host_pid), facts_key(self._id))
            self.detach()

    def detach(self) -> None:
        """Close our copy of the facts: the keeper has its own."""
        if self._facts >= 0:
            os.close(self._facts)
            self._facts = -1
