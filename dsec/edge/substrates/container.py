"""Container sandboxes on this host: slots and bounds, over the spawner that does the work in C (`dsec/native`).

A slot is a number below `sandboxes_count_max`; it stands for a range of uids and a cgroup name, and
is used again only after the spawner has said that nothing of its last sandbox is left.

With a `state_dir`, sandboxes outlive this process: a keeper holds copies of every descriptor that
matters, and the next substrate of that directory goes on with them (`adoption.py`).

Invariants:
    1. A create that fails or is cancelled leaves nothing: its slot is destroyed like any other.
    2. A sandbox that a create has given out is with the keeper; one that is not dies with this process.

See: docs/architecture.md "Sandbox", docs/threat_model.md, dsec/native/protocol.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from dsec.edge import spool
from dsec.edge.capture import READ_BYTES_MAX
from dsec.edge.commands import check_spec, name_sandbox
from dsec.edge.config import SubstrateConfig
from dsec.edge.keeper import Keeper
from dsec.edge.linux import cgroup, skeleton
from dsec.edge.linux.host import raise_files_limit, require_fit_host
from dsec.edge.network.gateway import Gateway
from dsec.edge.spawner import Spawner
from dsec.edge.substrates.adoption import GUEST_PREFIX, Kept, KeptSandbox, parse_spawner_key, sort_kept, spawner_key
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.edge.substrates.layer_mounts import LayerMounts, Layers
from dsec.edge.substrates.seats import Seats
from dsec.edge.substrates.warm_pool import WarmPool
from dsec.errors import DsecError, HostUnfitError, SandboxLostError, SpawnError, StateError
from dsec.sandbox import Hold, hold_nothing
from dsec.types import Command, Composition, LayerId, SandboxId, SandboxSpec

FILES_PER_SANDBOX = 3  # the guest's socket, its facts, a listener
FILES_FOR_THE_REST = 1024
log = logging.getLogger(__name__)


class ContainerSubstrate:
    """Containers on this host.  Implements `dsec.sandbox.Substrate`; root only.

    `layers` is an open store of layers, for specs that name some.  One living process has a `state_dir`.
    """

    def __init__(
        self, config: SubstrateConfig | None = None, *, layers: Layers | None = None, state_dir: Path | None = None
    ) -> None:
        self.config = config or SubstrateConfig()
        self.layers = layers
        self.state_dir = state_dir
        self.scratch = bytearray(READ_BYTES_MAX)
        self.gateway = Gateway()
        self.keeper: Keeper | None = None
        self._seats: Seats | None = None
        self._hierarchies: cgroup.Hierarchies | None = None
        self._sandboxes: dict[int, ContainerSandbox] = {}  # by slot: every one
        self._given: dict[SandboxId, ContainerSandbox] = {}
        self._asked: set[SandboxId] = set()
        self._adopted: dict[SandboxId, ContainerSandbox] = {}
        self._warm = WarmPool(self.config.warm_count, self._make)
        self._creates = asyncio.Semaphore(self.config.creates_in_flight_max)
        self._restart = asyncio.Lock()

    @property
    def seats(self) -> Seats:
        """The slots of the running spawner.  SpawnError before `open` and after `close`."""
        if self._seats is None:
            raise SpawnError("the substrate is not open")
        return self._seats

    @property
    def spawner(self) -> Spawner:
        """The running spawner.  SpawnError before `open` and after `close`."""
        return self.seats.spawner

    # -- open and close --------------------------------------------------------------------------

    async def open(self) -> None:
        """See `dsec.sandbox.Substrate.open`.  A new spawner proves itself by one sandbox that runs one command."""
        require_fit_host(self.config)
        raise_files_limit(self.config.sandboxes_count_max * FILES_PER_SANDBOX + FILES_FOR_THE_REST)
        self._hierarchies = cgroup.detect()
        try:
            if self.state_dir is not None:
                await self._open_keeper(self.state_dir)
            await asyncio.to_thread(cgroup.sweep, self.config.cgroup_parent)
            if self._seats is None:
                await self._start()
                await self._prove()
        except BaseException:
            await self.detach()
            raise

    def adopted(self) -> Mapping[SandboxId, ContainerSandbox]:
        """See `dsec.sandbox.Substrate.adopted`."""
        return self._adopted

    async def detach(self) -> None:
        """See `dsec.sandbox.Substrate.detach`: with a `state_dir`, what was given out lives on.

        With nothing given out nothing is left: whoever comes next has no use for an empty spawner.
        """
        if self.keeper is None or self._seats is None or not self.keeper.has(GUEST_PREFIX):
            await self.close()
            return
        await self._warm.close()
        for sandbox in self._sandboxes.values():
            sandbox.detach()
        self._forget_sandboxes()
        await self.gateway.close()
        seats, self._seats = self._seats, None
        await seats.detach()
        await self.keeper.close()

    async def close(self) -> None:
        """See `dsec.sandbox.Substrate.close`.  Safe to call twice."""
        await self._warm.close()
        await asyncio.gather(*(sandbox.destroy() for sandbox in list(self._sandboxes.values())))
        await self.gateway.close()
        await self._stop()
        if self.keeper is not None:
            await self.keeper.close()

    def _found(self) -> cgroup.Hierarchies:
        if self._hierarchies is None:
            raise SpawnError("the substrate is not open")
        return self._hierarchies

    async def _start(self) -> None:
        base = skeleton.encode(skeleton.entries())
        spawner = await Spawner.start(self.config, self._found(), base, is_kept=self.keeper is not None)
        self._seats = self._make_seats(spawner)
        if self.keeper is not None:
            await self.keeper.put(spawner_key(spawner.pid, spawner.name), spawner.connection.fileno())

    def _make_seats(self, spawner: Spawner) -> Seats:
        mounts = LayerMounts(spawner, self.layers, self.keeper, self.config.layer_idle_s)
        parent, count_max = self.config.cgroup_parent, min(self.config.sandboxes_count_max, spawner.slots_count)
        return Seats(spawner, self._found(), parent, mounts, self.keeper, count_max)

    async def _stop(self) -> None:
        """End the spawner with its sandboxes, if there is one."""
        seats, self._seats = self._seats, None
        self._forget_sandboxes()
        if seats is not None:
            await seats.close()

    def _forget_sandboxes(self) -> None:
        self._sandboxes.clear()
        self._given.clear()
        self._adopted.clear()
        self._warm.forget()

    async def _require_spawner(self) -> Spawner:
        """One that lives: a dead one took its sandboxes along and is replaced, with slots all free."""
        async with self._restart:
            if not self.spawner.is_alive:
                await self._stop()
                await self._start()
            return self.spawner

    async def _prove(self) -> None:
        try:
            sandbox = await self._make(SandboxSpec())
            result = await sandbox.exec(Command(argv=("/bin/true",)))
            await sandbox.destroy()
        except DsecError as error:
            raise HostUnfitError(f"this host cannot run a sandbox: {error}") from error
        if result.exit_code != 0:
            raise HostUnfitError(f"/bin/true ended with {result.exit_code} in a sandbox on this host")

    # -- create ----------------------------------------------------------------------------------

    async def composed(self, references: Sequence[str]) -> Composition:
        """See `dsec.sandbox.Layered`."""
        if self.layers is None:
            return Composition(layers=tuple(map(LayerId, references)))
        return await self.layers.composed(references)

    def holding(self) -> AbstractContextManager[Hold]:
        """See `dsec.sandbox.Layered`."""
        return contextlib.nullcontext(hold_nothing) if self.layers is None else self.layers.holding()

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> ContainerSandbox:
        """See `dsec.sandbox.Substrate.create`.

        Also InvalidArgumentError for limits that cannot be, and StateError for an id that is in use.  If the spawner
        dies meanwhile the next one makes it.
        """
        check_spec(spec)
        name = name_sandbox(sandbox_id)
        if name in self._given or name in self._asked:
            raise StateError(f"there is a sandbox {name} already")
        self._asked.add(name)
        try:
            with self._warm.asking():
                async with self._creates:
                    spawner = await self._require_spawner()
                    try:
                        return await self._give(spec, name)
                    except (SpawnError, SandboxLostError):
                        if spawner.is_alive:
                            raise
                    await self._require_spawner()  # that one died meanwhile, and nothing has run yet
                    return await self._give(spec, name)
        finally:
            self._asked.discard(name)

    async def _give(self, spec: SandboxSpec, name: SandboxId) -> ContainerSandbox:
        """One that was made ahead, or a new one."""
        self._warm.ask(spec)
        while (warm := self._warm.take(spec)) is not None:
            with contextlib.suppress(SandboxLostError, SpawnError):  # it died while it waited, or cannot be this
                return await self._hand_out(warm, spec, name)
        if self.seats.free_count == 0:
            await self._warm.evict()
        return await self._hand_out(await self._make(spec), spec, name)

    async def _hand_out(self, sandbox: ContainerSandbox, spec: SandboxSpec, name: SandboxId) -> ContainerSandbox:
        try:
            await sandbox.hand_out(name, spec)
        except DsecError:
            await sandbox.destroy()  # its name is free again when the next one is to have it
            raise
        self._given[name] = sandbox
        return sandbox

    async def _make(self, spec: SandboxSpec) -> ContainerSandbox:
        seat = self.seats.take()
        sandbox = self._sandboxes[seat.number] = ContainerSandbox(self, seat)
        try:
            async with asyncio.timeout(self.config.create_timeout_s):
                await sandbox.set_up(spec)
        except TimeoutError as error:
            raise SpawnError(f"the sandbox was not ready within {self.config.create_timeout_s} s") from error
        except DsecError:
            await sandbox.destroy()  # its slot is free again when the caller learns of it
            raise
        return sandbox

    async def release(self, sandbox: ContainerSandbox, *, had_network: bool) -> None:
        """End what is in the slot of `sandbox` and free it."""
        await sandbox.seat.release(had_network=had_network)
        if self._sandboxes.get(sandbox.seat.number) is sandbox:
            del self._sandboxes[sandbox.seat.number]
        if self._given.get(sandbox.id) is sandbox:
            del self._given[sandbox.id]
        self._adopted.pop(sandbox.id, None)

    # -- adoption --------------------------------------------------------------------------------

    async def _open_keeper(self, state_dir: Path) -> None:
        """Find the keeper of this directory, or start one; take back what it has."""
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostUnfitError(f"{state_dir} cannot be made: {error}") from error
        self.keeper = await Keeper.open(self.config.binary_path, state_dir / "keeper.sock", self.config.keep_s)
        kept = sort_kept(self.keeper.kept)
        spawner = await self._adopt_spawner(self.keeper, kept)
        living: list[KeptSandbox] = []
        if spawner is not None:
            living = [one for one in kept.sandboxes if spawner.alive.get(one.slot) == one.host_pid]
        await self.gateway.adopt(self.keeper, kept.strays, [one.id for one in living])
        if spawner is not None:
            self._seats = self._make_seats(spawner)
            await self._adopt_sandboxes(self._seats, living, kept.layers)
            kept.layers = {}
        dead = [one for one in kept.sandboxes if one not in living]
        left = kept.strays | kept.layers | {key: fd for one in dead for key, fd in one.descriptors().items()}
        for key, fd in left.items():
            await self.keeper.drop(key)
            os.close(fd)
        await asyncio.to_thread(spool.sweep, state_dir / "spool", set(self._given))

    async def _adopt_spawner(self, keeper: Keeper, kept: Kept) -> Spawner | None:
        """The one that lives, if there is one."""
        adopted = None
        places = cgroup.parents(self._found(), self.config.cgroup_parent)
        for key, fd in kept.spawners.items():
            pid, name = parse_spawner_key(key)
            spawner = await Spawner.adopt(socket.socket(fileno=fd), pid, name, places)
            if spawner is None:
                await keeper.drop(key)
            elif adopted is not None:
                raise HostUnfitError(f"two spawners of {self.state_dir} are alive: {adopted.pid} and {spawner.pid}")
            adopted = spawner or adopted
        return adopted

    async def _adopt_sandboxes(self, seats: Seats, living: list[KeptSandbox], layers: Mapping[str, int]) -> None:
        await seats.mounts.adopt(layers, [one.spec.layers for one in living])
        await asyncio.gather(*(self._adopt_sandbox(seats, one) for one in living))
        known = {one.slot for one in living}
        await asyncio.gather(*(seats.clear(slot) for slot in seats.spawner.alive if slot not in known))

    async def _adopt_sandbox(self, seats: Seats, kept: KeptSandbox) -> None:
        sandbox = self._sandboxes[kept.slot] = ContainerSandbox(self, seats.take_back(kept))
        try:
            await sandbox.adopt(socket.socket(fileno=kept.connection), kept.host_pid, kept.id, kept.spec, kept.files)
        except DsecError as error:
            log.warning("sandbox %s did not live on: %s", kept.id, error)
            return
        self._given[kept.id] = self._adopted[kept.id] = sandbox
