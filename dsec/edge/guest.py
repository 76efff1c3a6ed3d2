"""The client of one guest (pid 1 of a sandbox): start commands, reach them, learn how they ended.

Commands are told apart by their number, which the sandbox or its caller gives once.  A guest outlives its client
where somebody else holds the socket too; the next client asks it by `sync` what there is.

See: dsec/native/protocol.h, dsec/native/guest.c.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dsec.edge.native_wire import (
    ENDED_COUNT_MAX,
    EXEC_BODY_IN_FD,
    EXEC_HAS_STDIN,
    EXEC_KILL_OTHERS,
    EXEC_MERGE_STDERR,
    EXEC_TTY,
    INLINE_BODY_BYTES_MAX,
    MalformedMessageError,
    MessageReader,
    MessageType,
    Stage,
    encode_u32,
    encode_u64,
)
from dsec.edge.packets import PacketSocket, make_memory_file
from dsec.edge.spawner import step_error
from dsec.errors import SandboxLostError, SpawnError
from dsec.types import Command

_ENDED = "the sandbox ended while the command ran"
_ANSWERS = (MessageType.EXITED, MessageType.REFUSED)


class Exited(msgspec.Struct, frozen=True):
    """A command ended: wait status as of wait(2), EXIT_* flags, and how long it took."""

    wait_status: int
    flags: int
    duration_s: float


class Refused(msgspec.Struct, frozen=True):
    """A command did not start."""

    stage: Stage
    errno: int


Answer = Exited | Refused


class Remembered(msgspec.Struct):
    """What a guest knows: the numbers of the commands that run, and how the last ones ended, the oldest first.

    `is_full`: there may have been more, which it has forgotten.
    """

    running: set[int] = msgspec.field(default_factory=set)
    ended: dict[int, Answer] = msgspec.field(default_factory=dict)
    is_full: bool = False


class Guest:
    """The connection to a guest.

    `on_lost()` is called once if it ends before `close`.  `on_terminal(number, master)` owns the master of the
    terminal of a command, and is called before that command's answer.
    """

    def __init__(
        self, connection: socket.socket, on_lost: Callable[[], None], on_terminal: Callable[[int, int], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._remembered = Remembered()
        self._synced: asyncio.Future[None] | None = None
        self._on_lost = on_lost
        self._on_terminal = on_terminal
        self._packets = PacketSocket(connection, self._on_packet, self._on_close)

    def fileno(self) -> int:
        """Of the connection."""
        return self._packets.fileno()

    async def ready(self) -> None:
        """Wait until the sandbox is set up.  SpawnError names the failing step."""
        await asyncio.shield(self._ready)  # a caller that gives up must not settle it

    async def start(self, number: int, command: Command, body: bytes, fds: Sequence[int]) -> None:
        """Send a command with its pipes: stdin if any, stdout, stderr unless merged; none for a terminal.

        `answer` tells its end.  SandboxLostError if the guest is gone.
        """
        has_stdin = bool(command.stdin) or command.keep_stdin_open
        flags = EXEC_MERGE_STDERR * command.merge_stderr | EXEC_KILL_OTHERS * command.kill_others
        flags |= EXEC_HAS_STDIN * (has_stdin and not command.tty) | EXEC_TTY * bool(command.tty)
        self._await_answer(number)
        try:
            if len(body) <= INLINE_BODY_BYTES_MAX:
                await self._send(encode_u32(MessageType.EXEC, number, flags) + body, fds)
            else:
                await self._start_with_file(number, flags, body, fds)
        except BaseException:
            self._answers.pop(number, None)
            raise

    async def _start_with_file(self, number: int, flags: int, body: bytes, fds: Sequence[int]) -> None:
        file = make_memory_file("exec", body)
        try:
            await self._send(encode_u32(MessageType.EXEC, number, flags | EXEC_BODY_IN_FD), [file, *fds])
        finally:
            os.close(file)

    async def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            await self._packets.send(data, fds)
        except ConnectionError as error:
            raise SandboxLostError("the sandbox is gone") from error

    def _await_answer(self, number: int) -> asyncio.Future[Answer]:
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        return answer

    def answer(self, number: int) -> asyncio.Future[Answer]:
        """How a command that was started, or resumed, will have ended.  SandboxLostError."""
        return self._answers[number]

    def forget(self, number: int) -> None:
        """The command's end was heard."""
        self._answers.pop(number, None)

    async def sync(self) -> Remembered:
        """Ask what there is; the answers of commands that an earlier client started can then be had by `resume`."""
        self._remembered = Remembered()
        self._synced = asyncio.get_running_loop().create_future()
        await self._send(encode_u32(MessageType.SYNC))
        await self._synced
        return self._remembered

    def resume(self, number: int) -> None:
        """Make `answer` right for a command that `sync` told of."""
        waiting = self._await_answer(number)
        if (answer := self._remembered.ended.get(number)) is not None:
            waiting.set_result(answer)

    async def kill(self, number: int) -> None:
        """Kill a command's whole tree.  SandboxLostError."""
        await self._send(encode_u32(MessageType.KILL, number))

    def kill_now(self, number: int) -> None:
        """The same where nothing can be awaited."""
        self._packets.send_now(encode_u32(MessageType.KILL, number))

    async def signal(self, number: int, signal_number: int) -> None:
        """Send a signal to a command's process group.  SandboxLostError."""
        await self._send(encode_u32(MessageType.SIGNAL, number, signal_number))

    async def extend(self, span_s: float) -> None:
        """Move every deadline: the guest was frozen for so long.  SandboxLostError."""
        await self._send(encode_u32(MessageType.EXTEND) + encode_u64(max(0, round(span_s * 1000))))

    def close(self, why: str = _ENDED) -> None:
        """Close the connection (which ends the guest, unless somebody else holds it) and fail what waits."""
        self._packets.close()
        self._fail_all(why)

    def _on_packet(self, data: bytes, fds: list[int]) -> None:
        reader = MessageReader(data)
        kind = reader.u32()
        if kind in (MessageType.READY, MessageType.FAILED) and not self._ready.done():
            self._settle_ready(kind, reader)
        elif kind in _ANSWERS:
            self._settle_answer(reader.u32(), _answer(kind, reader))
        elif kind == MessageType.TTY and fds:
            self._on_terminal(reader.u32(), fds.pop(0))
        elif kind == MessageType.RUNNING:
            self._remembered.running.add(reader.u32())
        elif kind == MessageType.SYNCED and self._synced is not None and not self._synced.done():
            self._remembered.is_full = len(self._remembered.ended) >= ENDED_COUNT_MAX
            self._synced.set_result(None)
        else:
            raise MalformedMessageError(f"a guest sent a message of type {kind}")

    def _settle_ready(self, kind: int, reader: MessageReader) -> None:
        if kind == MessageType.READY:
            self._ready.set_result(None)
            return
        reader.u32()
        self._ready.set_exception(SpawnError(step_error(reader)))
        self._ready.exception()

    def _settle_answer(self, number: int, answer: Answer) -> None:
        is_synced = self._synced is None or self._synced.done()
        if not is_synced or number in self._remembered.running:  # of an earlier client, and not resumed yet
            self._remembered.running.discard(number)
            self._remembered.ended[number] = answer
        waiting = self._answers.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _on_close(self) -> None:
        self._fail_all(_ENDED)
        self._on_lost()

    def _fail_all(self, why: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(SpawnError("the guest ended during its setup"))
            self._ready.exception()
        for waiting in self._answers.values():
            _lose(waiting, why)
        if self._synced is not None:
            _lose(self._synced, "the sandbox ended")


def _lose(waiting: asyncio.Future[Any], reason: str) -> None:
    if not waiting.done():
        waiting.set_exception(SandboxLostError(reason))
        waiting.exception()


def _answer(kind: int, reader: MessageReader) -> Answer:
    first = reader.u32()
    if kind == MessageType.EXITED:
        return Exited(first, reader.u32(), reader.u64() / 1e6)
    if first not in set(Stage):
        raise MalformedMessageError(f"a guest refused a command at stage {first}")
    return Refused(Stage(first), reader.errno())
