"""The client of the spawner: the root process that makes and ends sandboxes.

One spawner serves one substrate at a time.  Requests are matched to answers by slot (or layer number), since
each has at most one request under way.  Its cgroup directories are named after its process.

See: dsec/native/protocol.h, dsec/native/spawner.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from errno import EAGAIN
from pathlib import Path

from dsec.edge.config import SubstrateConfig
from dsec.edge.linux import cgroup
from dsec.edge.native_process import NativeProcess
from dsec.edge.native_wire import (
    DESTROY_NETWORK,
    INIT_KEPT,
    NO_SLOT,
    PROTOCOL_VERSION,
    CgroupPlan,
    MalformedMessageError,
    MessageReader,
    MessageType,
    encode_attach,
    encode_create,
    encode_init,
    encode_u32,
)
from dsec.edge.packets import PacketSocket, make_memory_file
from dsec.errors import DsecError, HostUnfitError, ResourceExhaustedError, SpawnError
from dsec.types import SandboxSpec

_LAYER_ANSWERS = (MessageType.MOUNTED, MessageType.UNMOUNTED, MessageType.MOUNT_FAILED)


def step_error(reader: MessageReader) -> str:
    """Step and error text of a FAILED message, whose type and slot were read."""
    step, number = reader.string(), reader.errno()
    return f"{step}: {os.strerror(number)} (errno {number})"


def create_error(reader: MessageReader) -> DsecError:
    """What a FAILED message says of a create: a host without room for another process is full, not unfit."""
    step, number = reader.string(), reader.errno()
    said = f"{step}: {os.strerror(number)} (errno {number})"
    return ResourceExhaustedError(f"the host gives no more processes: {said}") if number == EAGAIN else SpawnError(said)


class Spawner:
    """A running spawner; `start` one, or `adopt` one that lived on.  `close` ends it and every sandbox it made.

    It has `slots_count` slots; `first_uid` is the user of the host that is root in slot 0.  After `adopt`,
    `alive` has the pid of the guest in each slot that is not free (0: it is being removed), and `mounted` the
    numbers of the layers that are mounted.
    """

    def __init__(self, process: NativeProcess, name: str, places: Sequence[Path], connection: socket.socket) -> None:
        self.name = name
        self.first_uid = self.slots_count = 0
        self.alive: dict[int, int] = {}
        self.mounted: set[int] = set()
        self._process = process
        self._places = tuple(places)
        loop = asyncio.get_running_loop()
        self._inited: asyncio.Future[None] = loop.create_future()
        self._synced: asyncio.Future[None] | None = None
        self._created: dict[int, asyncio.Future[tuple[socket.socket, int]]] = {}
        self._attached: dict[int, asyncio.Future[None]] = {}
        self._gone: dict[int, asyncio.Future[None]] = {}
        self._layers: dict[int, asyncio.Future[None]] = {}
        self.connection = connection
        self._packets = PacketSocket(connection, self._on_packet, self._on_close)

    @classmethod
    async def start(
        cls, config: SubstrateConfig, found: cgroup.Hierarchies, skeleton: bytes, *, is_kept: bool = False
    ) -> Spawner:
        """Start the process and wait until its file system stands.  HostUnfitError names the failing step.

        `is_kept`: it outlives this process, as long as somebody has `connection`.
        """
        binary, places = config.binary_path, cgroup.parents(found, config.cgroup_parent)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = NativeProcess.start(binary, "spawner", [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        spawner = cls(process, cgroup.owner_name(process.pid), places, ours)
        file = make_memory_file("skeleton", skeleton)
        try:
            cgroup.make_owner_directories(found, config.cgroup_parent, spawner.name)
            hierarchies = [(str(place), spawner.name) for place in places]
            await spawner._packets.send(
                encode_init(hierarchies, config.sandboxes_count_max, INIT_KEPT * is_kept), [file]
            )
            await spawner._inited
        except OSError as error:
            await spawner.close()
            reason = "it ended at once" if isinstance(error, ConnectionError) else f"cannot make a cgroup: {error}"
            raise HostUnfitError(f"{binary} cannot serve: {reason}") from error
        except BaseException:
            await spawner.close()
            raise
        finally:
            os.close(file)
        return spawner

    @classmethod
    async def adopt(cls, connection: socket.socket, pid: int, name: str, places: Sequence[Path]) -> Spawner | None:
        """Go on with a spawner of an earlier process; None if it has ended.  Takes ownership of `connection`."""
        try:
            process = NativeProcess(pid)
        except ProcessLookupError:
            connection.close()
            return None
        if cgroup.owner_name(pid) != name:  # another process has its pid
            process.forget()
            connection.close()
            return None
        spawner = cls(process, name, places, connection)
        spawner._inited.set_result(None)
        spawner._synced = asyncio.get_running_loop().create_future()
        try:
            await spawner._packets.send(encode_u32(MessageType.SYNC))
            await spawner._synced
        except (ConnectionError, SpawnError):
            await spawner.close()
            return None
        finally:
            spawner._synced = None
        return spawner

    @property
    def is_alive(self) -> bool:
        """False once the control socket is closed."""
        return self._packets.is_open

    @property
    def pid(self) -> int:
        """Process id of the spawner on the host."""
        return self._process.pid

    async def create(
        self, slot: int, spec: SandboxSpec, plan: CgroupPlan, layers: Sequence[int] = ()
    ) -> tuple[socket.socket, int]:
        """Our end of the guest's socket and its pid on the host; the guest then sets itself up.

        SpawnError, ResourceExhaustedError.  `layers` are numbers of mounted ones, the topmost first.  `gone(slot)`
        resolves when the slot is free again, also after an error.
        """
        loop = asyncio.get_running_loop()
        gone = self._gone[slot] = loop.create_future()
        try:
            await self._send(encode_create(slot, spec, layers, plan))
        except BaseException:
            if not gone.done():  # it died while we waited
                gone.set_result(None)  # the spawner never heard of it
            raise
        created = self._created[slot] = loop.create_future()
        try:
            return await asyncio.shield(created)
        except asyncio.CancelledError:
            created.add_done_callback(_discard)
            raise

    async def attach(self, slot: int, spec: SandboxSpec, plan: CgroupPlan) -> None:
        """Make the sandbox in `slot`, which has run nothing, what `create` would have made of its layers.  SpawnError.

        After an error it is of no use.
        """
        attached = self._attached[slot] = asyncio.get_running_loop().create_future()
        await self._send(encode_attach(slot, spec, plan))
        await asyncio.shield(attached)

    async def destroy(self, slot: int, *, had_network: bool = False) -> None:
        """Kill the sandbox in `slot` and return when nothing is left of it.  SpawnError if the spawner is gone.

        `had_network`: it had a way out, and no other sandbox gets its network namespace.
        """
        gone = self._gone.get(slot)
        if gone is None:
            return  # it never had a sandbox
        if not gone.done():
            await self._send(encode_u32(MessageType.DESTROY, slot, DESTROY_NETWORK * had_network))
        await asyncio.shield(gone)

    def gone(self, slot: int) -> asyncio.Future[None]:
        """Resolves when the slot's last sandbox has left nothing behind (SpawnError: the spawner died)."""
        return self._gone[slot]

    async def mount(self, layer: int, image: int) -> None:
        """Mount an EROFS image, an open file, under a number that is free.  SpawnError."""
        await self._ask_layer(layer, MessageType.MOUNT, [image])
        self.mounted.add(layer)

    async def unmount(self, layer: int) -> None:
        """Free a layer's number; sandboxes that have the layer keep it.  SpawnError."""
        self.mounted.discard(layer)
        await self._ask_layer(layer, MessageType.UNMOUNT)

    async def _ask_layer(self, layer: int, kind: MessageType, fds: Sequence[int] = ()) -> None:
        answer = self._layers[layer] = asyncio.get_running_loop().create_future()
        await self._send(encode_u32(kind, layer), fds)
        await asyncio.shield(answer)

    async def close(self) -> None:
        """End the spawner and wait for it; it kills all sandboxes and removes its cgroups first.

        Nobody else may have `connection` any more.
        """
        self._packets.close()
        self._fail_all("the spawner was closed")
        await self._process.ended()
        for place in self._places:
            await asyncio.to_thread(cgroup.remove_tree, place / self.name)

    def detach(self) -> None:
        """Leave the spawner to whoever has a copy of `connection`."""
        self._packets.close()
        self._fail_all("the spawner was left to another process")
        self._process.forget()

    async def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            await self._packets.send(data, fds)
        except ConnectionError as error:
            raise SpawnError("the spawner is gone") from error

    def _on_packet(self, data: bytes, fds: list[int]) -> None:
        reader = MessageReader(data)
        kind = reader.u32()
        number = NO_SLOT if kind == MessageType.SYNCED else reader.u32()
        if kind == MessageType.CREATED and number in self._created and fds:
            pid = reader.u32()
            self._created.pop(number).set_result((socket.socket(fileno=fds.pop(0)), pid))
        elif kind == MessageType.GONE and number in self._gone and not self._gone[number].done():
            self._gone[number].set_result(None)
        elif kind == MessageType.FAILED and number in self._created:
            self._created.pop(number).set_exception(create_error(reader))
        elif kind in (MessageType.ATTACHED, MessageType.FAILED) and number in self._attached:
            self._settle(self._attached.pop(number), kind, reader)
        elif kind in _LAYER_ANSWERS and number in self._layers:
            self._settle(self._layers.pop(number), kind, reader)
        elif self._synced is not None:
            self._on_sync(kind, number, reader)
        elif not self._inited.done():
            self._on_start(kind, number, reader)
        else:
            raise MalformedMessageError(f"the spawner sent a message of type {kind} for number {number}")

    def _settle(self, answer: asyncio.Future[None], kind: int, reader: MessageReader) -> None:
        if kind in (MessageType.MOUNT_FAILED, MessageType.FAILED):
            answer.set_exception(SpawnError(step_error(reader)))
            answer.exception()
        else:
            answer.set_result(None)

    def _on_start(self, kind: int, number: int, reader: MessageReader) -> None:
        if kind == MessageType.INITED:
            self.first_uid, self.slots_count = number, reader.u32()
            version = 0 if reader.is_at_end else reader.u32()
            if version == PROTOCOL_VERSION:
                self._inited.set_result(None)
            else:
                what = f"its protocol is {version}, not {PROTOCOL_VERSION}: build dsec-sandbox again"
                self._inited.set_exception(HostUnfitError(f"the spawner is of another build: {what}"))
        elif kind == MessageType.FAILED:
            self._inited.set_exception(HostUnfitError(f"the spawner cannot start: {step_error(reader)}"))
        else:
            raise MalformedMessageError(f"a spawner that starts sent a message of type {kind}")

    def _on_sync(self, kind: int, number: int, reader: MessageReader) -> None:
        """The state; before it may come answers to the process that asked before us, of which nothing is needed."""
        if kind == MessageType.INITED:
            self.first_uid, self.slots_count = number, reader.u32()
        elif kind == MessageType.ALIVE:
            self.alive[number] = reader.u32()
            self._gone[number] = asyncio.get_running_loop().create_future()
        elif kind == MessageType.MOUNTED:
            self.mounted.add(number)
        elif kind == MessageType.UNMOUNTED:
            self.mounted.discard(number)
        elif kind == MessageType.SYNCED and self._synced is not None and not self._synced.done():
            self._synced.set_result(None)

    def _on_close(self) -> None:
        self._fail_all("the spawner died")

    def _fail_all(self, reason: str) -> None:
        if not self._inited.done():
            self._inited.set_exception(HostUnfitError(reason))
            self._inited.exception()
        kinds = (self._created, self._attached, self._gone, self._layers)
        waiting = [self._synced, *(future for kind in kinds for future in kind.values())]
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(SpawnError(reason))
                future.exception()


def _discard(created: asyncio.Future[tuple[socket.socket, int]]) -> None:
    """Nobody waits for this guest any more: closing its socket ends it."""
    with contextlib.suppress(SpawnError, asyncio.CancelledError):
        created.result()[0].close()
