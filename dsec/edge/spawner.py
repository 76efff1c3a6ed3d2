"""The client of the spawner: the root process that makes and ends sandboxes.

One spawner serves one substrate.  Requests are matched to answers by slot, since a slot has at
most one request under way.

See: dsec/native/protocol.h, dsec/native/spawner.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from pathlib import Path

from dsec.edge.native_wire import (
    NO_SLOT,
    CgroupPlan,
    MalformedMessageError,
    MessageReader,
    MessageType,
    encode_create,
    encode_init,
    encode_u32,
)
from dsec.edge.packets import PacketSocket, make_memory_file
from dsec.errors import HostUnfitError, SpawnError
from dsec.types import SandboxSpec


def step_error(reader: MessageReader) -> str:
    """Step and error text of a FAILED message, whose type and slot were read."""
    step, number = reader.string(), reader.errno()
    return f"{step}: {os.strerror(number)} (errno {number})"


class Spawner:
    """A running spawner.  Start it with `start`; `close` ends it and every sandbox it made."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._packets: PacketSocket | None = None
        loop = asyncio.get_running_loop()
        self._inited: asyncio.Future[None] = loop.create_future()
        self._created: dict[int, asyncio.Future[tuple[socket.socket, int]]] = {}
        self._gone: dict[int, asyncio.Future[None]] = {}

    @classmethod
    async def start(cls, binary: Path, hierarchies: list[tuple[str, str]], skeleton: bytes) -> Spawner:
        """Start the process and wait until its file system stands.  HostUnfitError names the failing step."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = str(theirs.fileno())
            try:
                process = subprocess.Popen(  # noqa: ASYNC220  (fork and exec of a small static binary: a millisecond)
                    [str(binary), "spawner", number],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    env={},
                )
            except OSError as error:
                ours.close()
                raise HostUnfitError(f"{binary} cannot be started: {error}") from error
        spawner = cls(process)
        spawner._packets = PacketSocket(ours, spawner._on_packet, spawner._on_close)
        file = make_memory_file("skeleton", skeleton)
        try:
            await spawner._packets.send(encode_init(hierarchies), [file])
            await spawner._inited
        except ConnectionError as error:
            await spawner.close()
            raise HostUnfitError(f"{binary} ended at once") from error
        except BaseException:
            await spawner.close()
            raise
        finally:
            os.close(file)
        return spawner

    @property
    def is_alive(self) -> bool:
        """False once the control socket is closed."""
        return self._packets is not None and self._packets.is_open

    @property
    def pid(self) -> int:
        """Process id of the spawner on the host."""
        return self._process.pid

    async def create(self, slot: int, spec: SandboxSpec, plan: CgroupPlan) -> tuple[socket.socket, int]:
        """Our end of the guest's socket and its pid on the host; the guest then sets itself up.  SpawnError.

        `gone(slot)` resolves when the slot is free again, also after an error.
        """
        loop = asyncio.get_running_loop()
        gone = self._gone[slot] = loop.create_future()
        try:
            await self._send(encode_create(slot, spec.disk_bytes, spec.hostname, plan))
        except BaseException:
            gone.set_result(None)  # the spawner never heard of it
            raise
        created = self._created[slot] = loop.create_future()
        try:
            return await asyncio.shield(created)
        except asyncio.CancelledError:
            created.add_done_callback(_discard)
            raise

    async def destroy(self, slot: int) -> None:
        """Kill the sandbox in `slot` and return when nothing is left of it.  SpawnError if the spawner is gone."""
        gone = self._gone[slot]
        if not gone.done():
            await self._send(encode_u32(MessageType.DESTROY, slot))
        await asyncio.shield(gone)

    def gone(self, slot: int) -> asyncio.Future[None]:
        """Resolves when the slot's last sandbox has left nothing behind (SpawnError: the spawner died)."""
        return self._gone[slot]

    async def close(self) -> None:
        """End the spawner and wait for it; it kills all sandboxes and removes its cgroups first."""
        if self._packets is not None:
            self._packets.close()
        self._fail_all("the spawner was closed")
        await asyncio.to_thread(self._process.wait)

    async def _send(self, data: bytes) -> None:
        if self._packets is None:
            raise SpawnError("the spawner was not started")
        try:
            await self._packets.send(data)
        except ConnectionError as error:
            raise SpawnError("the spawner is gone: open a new substrate") from error

    def _on_packet(self, data: bytes, fds: list[int]) -> None:
        reader = MessageReader(data)
        kind, slot = reader.u32(), reader.u32()
        if kind == MessageType.INITED and not self._inited.done():
            self._inited.set_result(None)
        elif kind == MessageType.CREATED and slot in self._created and fds:
            pid = reader.u32()
            self._created.pop(slot).set_result((socket.socket(fileno=fds.pop(0)), pid))
        elif kind == MessageType.GONE and slot in self._gone and not self._gone[slot].done():
            self._gone[slot].set_result(None)
        elif kind == MessageType.FAILED and slot == NO_SLOT and not self._inited.done():
            self._inited.set_exception(HostUnfitError(f"the spawner cannot start: {step_error(reader)}"))
        elif kind == MessageType.FAILED and slot in self._created:
            self._created.pop(slot).set_exception(SpawnError(step_error(reader)))
        else:
            raise MalformedMessageError(f"the spawner sent a message of type {kind} for slot {slot}")

    def _on_close(self) -> None:
        self._fail_all("the spawner died")

    def _fail_all(self, reason: str) -> None:
        if not self._inited.done():
            self._inited.set_exception(HostUnfitError(reason))
            self._inited.exception()
        for created in self._created.values():
            if not created.done():
                created.set_exception(SpawnError(reason))
                created.exception()
        for gone in self._gone.values():
            if not gone.done():
                gone.set_exception(SpawnError(reason))
                gone.exception()


def _discard(created: asyncio.Future[tuple[socket.socket, int]]) -> None:
    """Nobody waits for this guest any more: closing its socket ends it."""
    with contextlib.suppress(SpawnError, asyncio.CancelledError):
        created.result()[0].close()
