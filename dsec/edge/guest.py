"""The client of one guest (pid 1 of a sandbox): start commands, kill them, learn how they ended.

See: dsec/native/protocol.h, dsec/native/guest.c.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence

import msgspec

from dsec.edge.native_wire import (
    EXEC_BODY_IN_FD,
    EXEC_HAS_STDIN,
    EXEC_KILL_OTHERS,
    EXEC_MERGE_STDERR,
    INLINE_BODY_BYTES_MAX,
    MalformedMessageError,
    MessageReader,
    MessageType,
    Stage,
    encode_u32,
)
from dsec.edge.packets import PacketSocket, make_memory_file
from dsec.edge.spawner import step_error
from dsec.errors import SandboxLostError, SpawnError
from dsec.types import Command


class Exited(msgspec.Struct, frozen=True):
    """A command ended: wait status as of wait(2), and EXIT_* flags."""

    wait_status: int
    flags: int


class Refused(msgspec.Struct, frozen=True):
    """A command did not start."""

    stage: Stage
    errno: int


class Guest:
    """The connection to a guest.  `on_lost()` is called once if it ends before `close`."""

    def __init__(self, connection: socket.socket, on_lost: Callable[[], None]) -> None:
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers: dict[int, asyncio.Future[Exited | Refused]] = {}
        self._exec_id = 0
        self._on_lost = on_lost
        self._packets = PacketSocket(connection, self._on_packet, self._on_close)

    async def ready(self) -> None:
        """Wait until the sandbox is set up.  SpawnError names the failing step."""
        await self._ready

    async def start(self, command: Command, body: bytes, fds: Sequence[int]) -> int:
        """Send a command with its pipes (stdin if any, stdout, stderr unless merged); returns its exec id.

        SandboxLostError if the guest is gone.
        """
        self._exec_id = exec_id = (self._exec_id + 1) & 0xFFFFFFFF
        flags = EXEC_HAS_STDIN * bool(command.stdin) | EXEC_MERGE_STDERR * command.merge_stderr
        flags |= EXEC_KILL_OTHERS * command.kill_others
        self._answers[exec_id] = asyncio.get_running_loop().create_future()
        try:
            if len(body) <= INLINE_BODY_BYTES_MAX:
                await self._packets.send(encode_u32(MessageType.EXEC, exec_id, flags) + body, fds)
            else:
                await self._start_with_file(exec_id, flags, body, fds)
        except BaseException as error:
            self._answers.pop(exec_id, None)
            if isinstance(error, ConnectionError):
                raise SandboxLostError("the sandbox is gone") from error
            raise
        return exec_id

    async def _start_with_file(self, exec_id: int, flags: int, body: bytes, fds: Sequence[int]) -> None:
        file = make_memory_file("exec", body)
        try:
            head = encode_u32(MessageType.EXEC, exec_id, flags | EXEC_BODY_IN_FD)
            await self._packets.send(head, [file, *fds])
        finally:
            os.close(file)

    async def answer(self, exec_id: int) -> Exited | Refused:
        """How the command ended; a cancelled wait kills its process tree.  SandboxLostError."""
        try:
            return await self._answers[exec_id]
        except asyncio.CancelledError:
            self._packets.send_now(encode_u32(MessageType.KILL, exec_id))
            raise
        finally:
            self._answers.pop(exec_id, None)

    def close(self) -> None:
        """Close the connection (which ends the guest) and fail what waits."""
        self._packets.close()
        self._fail_all()

    def _on_packet(self, data: bytes, _fds: list[int]) -> None:
        reader = MessageReader(data)
        kind = reader.u32()
        if kind in (MessageType.READY, MessageType.FAILED) and not self._ready.done():
            self._settle_ready(kind, reader)
        elif kind in (MessageType.EXITED, MessageType.REFUSED):
            self._settle_answer(reader.u32(), _answer(kind, reader))
        else:
            raise MalformedMessageError(f"a guest sent a message of type {kind}")

    def _settle_ready(self, kind: int, reader: MessageReader) -> None:
        if kind == MessageType.READY:
            self._ready.set_result(None)
            return
        reader.u32()
        self._ready.set_exception(SpawnError(step_error(reader)))
        self._ready.exception()

    def _settle_answer(self, exec_id: int, answer: Exited | Refused) -> None:
        waiting = self._answers.get(exec_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _on_close(self) -> None:
        self._fail_all()
        self._on_lost()

    def _fail_all(self) -> None:
        if not self._ready.done():
            self._ready.set_exception(SpawnError("the guest ended during its setup"))
            self._ready.exception()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(SandboxLostError("the sandbox ended while the command ran"))
                waiting.exception()


def _answer(kind: int, reader: MessageReader) -> Exited | Refused:
    first = reader.u32()
    if kind == MessageType.EXITED:
        return Exited(first, reader.u32())
    if first not in set(Stage):
        raise MalformedMessageError(f"a guest refused a command at stage {first}")
    return Refused(Stage(first), reader.errno())
