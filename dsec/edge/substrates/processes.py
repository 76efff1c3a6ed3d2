"""A command that a guest runs, as `dsec.sandbox.Process`, and what is made of its end.

See: dsec/edge/substrates/streams.py, dsec/edge/substrates/guest_sandbox.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from errno import E2BIG, ENOENT
from typing import Protocol

from dsec.edge.capture import OutputBuffer
from dsec.edge.commands import check_tty_size
from dsec.edge.guest import Answer, Guest, Refused
from dsec.edge.native_wire import EXIT_OOM_KILLED, EXIT_TIMED_OUT, Stage
from dsec.edge.substrates.streams import Streams
from dsec.errors import (
    DsecError,
    InvalidArgumentError,
    OutcomeUnknownError,
    OutOfRangeError,
    ResourceExhaustedError,
    SandboxLostError,
)
from dsec.types import Command, ExecResult, Output, Stream

CROWDED_MESSAGE = b"cannot start: Resource temporarily unavailable (too many processes in this sandbox)\n"
SIGNAL_NUMBER_MAX = 64


class ProcessOwner(Protocol):
    """What a process needs of its sandbox."""

    async def awake(self) -> Guest:
        """The guest, which is not paused now.  SandboxLostError."""
        ...

    async def answer(self, number: int, timeout_s: float) -> Answer:
        """How the command ended.  SandboxLostError."""
        ...

    def give_up(self, reason: str) -> SandboxLostError:
        """Destroy the sandbox, which can start no command any more."""
        ...


class GuestProcess:
    """One command.  Implements `dsec.sandbox.Process`.

    `is_cut`: an earlier Edge died before all of its stdin had reached it, so nobody can say what it would have done.
    """

    def __init__(
        self,
        owner: ProcessOwner,
        number: int,
        command: Command,
        streams: Streams,
        *,
        is_cut: bool = False,
    ) -> None:
        self._owner = owner
        self._number = number
        self._command = command
        self._streams = streams
        self._is_cut = is_cut
        self._attaching: asyncio.Task[None] | None = None
        self._end = asyncio.create_task(self._run(), name=f"command {number}")
        self._end.add_done_callback(_hear)

    @property
    def number(self) -> int:
        """See `dsec.sandbox.Process`."""
        return self._number

    @property
    def command(self) -> Command:
        """What was asked for."""
        return self._command

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` once there is a result, or none to come."""
        self._end.add_done_callback(lambda _: callback())

    async def wait(self) -> ExecResult:
        """See `dsec.sandbox.Process`."""
        return await asyncio.shield(self._end)

    async def attached(self) -> None:
        """Wait until it has its terminal, or has ended."""
        waiting = asyncio.create_task(self._streams.attached())
        await asyncio.wait([waiting, self._end], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    def attach(self, master: int, old_key: str = "") -> None:
        """Its terminal came; see `Streams.attach`."""
        self._attaching = asyncio.create_task(self._streams.attach(master, old_key))

    async def ended(self) -> None:
        """Wait until nothing of it is left here, whatever came of it."""
        await asyncio.wait([self._end])

    async def kill(self) -> None:
        """See `dsec.sandbox.Process`."""
        await self._tell(lambda guest: guest.kill(self._number))

    async def signal(self, number: int) -> None:
        """See `dsec.sandbox.Process`."""
        if not 1 <= number <= SIGNAL_NUMBER_MAX:
            raise InvalidArgumentError(f"there is no signal {number}, only 1 to {SIGNAL_NUMBER_MAX}")
        await self._tell(lambda guest: guest.signal(self._number, number))

    async def _tell(self, message: Callable[[Guest], Awaitable[None]]) -> None:
        with contextlib.suppress(SandboxLostError):
            if not self._end.done():
                await message(await self._owner.awake())

    async def write_stdin(self, data: bytes) -> None:
        """See `dsec.sandbox.Process`."""
        if not (self._command.keep_stdin_open or self._command.tty):
            raise InvalidArgumentError("the command was started without keep_stdin_open or tty: its stdin is closed")
        await self._tell(lambda _: self._streams.write(data))

    async def close_stdin(self) -> None:
        """See `dsec.sandbox.Process`."""
        await self._tell(lambda _: self._streams.end_input())

    async def resize(self, rows: int, columns: int) -> None:
        """See `dsec.sandbox.Process`."""
        if self._command.tty is None:
            raise InvalidArgumentError("the command has no terminal")
        check_tty_size(rows, columns)
        self._streams.resize(rows, columns)

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """See `dsec.sandbox.Process`."""
        if offset < 0 or bytes_max < 0:
            raise InvalidArgumentError(f"offset {offset} or bytes_max {bytes_max} is negative")
        return await self._streams.read_output(stream, offset, bytes_max)

    async def _run(self) -> ExecResult:
        try:
            if self._is_cut:
                await (await self._owner.awake()).kill(self._number)
            answer = await self._owner.answer(self._number, self._command.timeout_s)
            if self._attaching is not None:
                await self._attaching
            if self._is_cut:
                raise OutcomeUnknownError("the Edge died before all of the command's stdin had reached it")
            if isinstance(answer, Refused):
                return self._refused(answer)
            stdout, stderr = self._finish()
        finally:
            self._streams.close()
        timed_out = bool(answer.flags & EXIT_TIMED_OUT)
        return ExecResult(
            exit_code=137 if timed_out else _exit_code_of(answer.wait_status),
            stdout=stdout,
            stderr=stderr,
            timed_out=timed_out,
            oom_killed=bool(answer.flags & EXIT_OOM_KILLED),
            duration_s=answer.duration_s,
        )

    def _finish(self) -> tuple[Output, Output]:
        try:
            return self._streams.finish()
        except (OSError, OutOfRangeError) as error:
            raise OutcomeUnknownError(f"command {self._number} ended, and its output is lost: {error}") from error

    def _refused(self, answer: Refused) -> ExecResult:
        """What a shell would say where the commands' doing is the cause; else an error that says whose fault it was."""
        if answer.stage == Stage.CROWDED:
            message = OutputBuffer(self._command.output_bytes_max)
            message.add(CROWDED_MESSAGE)
            said, merged = message.output(), self._command.merge_stderr or self._command.tty
            stdout, stderr = (said, Output()) if merged else (Output(), said)
            return ExecResult(exit_code=126, stdout=stdout, stderr=stderr)
        raise _refusal(self._owner, answer, self._command)


def _refusal(owner: ProcessOwner, answer: Refused, command: Command) -> DsecError:
    text = os.strerror(answer.errno)
    if answer.stage == Stage.CWD:
        return InvalidArgumentError(f"cwd {command.cwd!r}: {text}")
    if answer.stage == Stage.USER:
        why = "" if answer.errno == ENOENT else f": {text}"
        return InvalidArgumentError(f"user {command.user!r} is not known in this sandbox{why}")
    if answer.stage == Stage.EXEC and answer.errno == E2BIG:
        return InvalidArgumentError(f"argv and env: {text}")
    what = f"the command could not be started ({answer.stage.name.lower()}): {text}"
    if answer.stage in (Stage.REQUEST, Stage.GROUP, Stage.ALONE):
        return owner.give_up(what)
    return ResourceExhaustedError(what)


def _exit_code_of(wait_status: int) -> int:
    """0..255; death by signal n is 128 + n."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def _hear(end: asyncio.Task[ExecResult]) -> None:
    """An error that nobody waits for is no news: the sandbox is lost, and its next user is told."""
    if not end.cancelled():
        end.exception()
