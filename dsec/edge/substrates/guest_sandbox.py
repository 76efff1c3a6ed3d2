"""A sandbox whose pid 1 is our guest: everything about commands, whoever made the place that they run in.

What a kind of sandbox adds: how it is made, stopped and let go on (`_freeze`, `_thaw`), and ended (`_release`).

Invariants:
    1. A sandbox that cannot be used any more is destroyed by itself; every later call says so (SandboxLostError).
    2. A command closes every pipe it opened, however it ends.
    3. A message is sent to a guest that runs: whoever wants to tell it something resumes it first.
    4. Time that a sandbox is paused for counts neither for timeouts (the guest's, ours for its answer) nor as duration.

See: docs/architecture.md "Sandbox", dsec/native/guest.c.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from dsec.edge.commands import encode_command
from dsec.edge.config import SubstrateConfig
from dsec.edge.guest import Answer, Guest, Refused, Remembered
from dsec.edge.packets import is_hung_up
from dsec.edge.substrates.processes import GuestProcess
from dsec.edge.substrates.streams import Keeping, Streams
from dsec.errors import InvalidArgumentError, OutcomeUnknownError, SandboxLostError
from dsec.types import Command, ExecResult, SandboxId

NUMBER_MAX = 0xFFFFFFFF
PAUSED_POLL_S = 0.1
_PAUSED = (0, "paused")
_UNREAD_TTY = "unread-tty"
_T = TypeVar("_T")


class GuestSandbox(ABC):
    """The half of a sandbox that talks to its guest."""

    def __init__(self, config: SubstrateConfig, keeping: Keeping) -> None:
        self._id = SandboxId("")
        self._config = config
        self._keeping = keeping
        self._host_pid = 0
        self._guest: Guest | None = None
        self._destroying: asyncio.Task[None] | None = None
        self._execs = asyncio.Semaphore(config.execs_in_flight_max)
        self._processes: dict[int, GuestProcess] = {}
        self._known: WeakValueDictionary[int, GuestProcess] = WeakValueDictionary()
        self._last_number = 0
        self._unrun: set[int] = set()  # numbers of which it is certain that nothing ran
        self._first_number = NUMBER_MAX  # of those that this process started
        self._is_adopted = False
        self._remembered: Remembered | None = None
        self._gate = asyncio.Lock()
        self._paused_at: float | None = None
        self._paused_s = 0.0
        self._pause_note: tuple[str, int] | None = None
        self._on_end: Callable[[], None] = lambda: None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def id(self) -> SandboxId:
        """Unique on this host."""
        return self._id

    @property
    def host_pid(self) -> int:
        """Process id of the guest on the host."""
        return self._host_pid

    def open_guest(self) -> int:
        """A pidfd of the guest, the taker's.  SandboxLostError if it is gone.

        A dead process has no socket, and a living one its number: so the number was the guest's when it was looked up.
        """
        guest = self._living()
        try:
            pidfd = os.pidfd_open(self._host_pid)
        except OSError as error:
            raise SandboxLostError(f"sandbox {self._id} is gone: {error.strerror}") from error
        if is_hung_up(guest.fileno()):
            os.close(pidfd)
            raise SandboxLostError(f"sandbox {self._id} is gone")
        return pidfd

    # -- what a kind of sandbox adds -------------------------------------------------------------

    @abstractmethod
    async def _freeze(self) -> None:
        """Stop every process in it, the guest too.  ResourceExhaustedError; what was stopped then is let go on."""

    @abstractmethod
    async def _thaw(self) -> None:
        """Let every process go on.  ResourceExhaustedError; they stand still then."""

    @abstractmethod
    async def _reclaim(self) -> None:
        """Give back memory that processes which stand still do not need."""

    @abstractmethod
    async def _release(self) -> None:
        """Kill everything inside, free every resource, and close the guest."""

    # -- the guest -------------------------------------------------------------------------------

    async def _connect(self, connection: socket.socket) -> None:
        """Talk to a fresh guest, and wait until it has set itself up.  SpawnError."""
        self._guest = Guest(connection, self._on_lost, self._on_terminal)
        await self._guest.ready()

    def _adopt(self, connection: socket.socket, files: Mapping[str, int]) -> None:
        """Talk to the guest of an earlier process; `files` are what that kept of its commands."""
        self._is_adopted = True
        self._keeping.adopt(files)
        self._guest = Guest(connection, self._on_lost, self._on_terminal)
        self._paused_at = self._keeping.left_since(*_PAUSED)
        self._pause_note = self._keeping.take(*_PAUSED)

    def _living(self) -> Guest:
        if self._guest is None or self._destroying is not None:
            raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")
        return self._guest

    def _on_terminal(self, number: int, master: int) -> None:
        process = self._processes.get(number)
        if process is not None:
            process.attach(master)
            return
        # Sent to an earlier process, which did not live to read it.
        self._keeping.adopt({f"{number}/{_UNREAD_TTY}/{round(time.monotonic() * 1000)}": master})
        keeping = asyncio.create_task(self._keeping.keep_left(number, _UNREAD_TTY), name=f"keep terminal {number}")
        self._tasks.add(keeping)
        keeping.add_done_callback(self._tasks.discard)

    def watch(self, on_end: Callable[[], None]) -> None:
        """See `dsec.sandbox.Watched`."""
        self._on_end = on_end
        if self._destroying is not None:
            on_end()

    def _on_lost(self) -> None:
        self._start_destroying()

    def give_up(self, reason: str) -> SandboxLostError:
        """See `ProcessOwner`."""
        self._start_destroying()
        return SandboxLostError(f"sandbox {self._id} no longer works: {reason}")

    async def awake(self) -> Guest:
        """See `ProcessOwner`."""
        await self.resume()
        return self._living()

    async def answer(self, number: int, timeout_s: float) -> Answer:
        """See `ProcessOwner`."""
        guest = self._living()
        waiting = guest.answer(number)
        until_s = time.monotonic() + timeout_s + self._config.answer_grace_s - self._paused_in_all_s()
        watch = AnswerWatch(waiting, lambda: until_s + self._paused_in_all_s() - time.monotonic(), self.give_up)
        try:
            answer = await waiting
            if isinstance(answer, Refused):
                self._unrun.add(number)
            return answer
        finally:
            watch.stop()
            guest.forget(number)

    # -- commands --------------------------------------------------------------------------------

    async def exec(self, command: Command) -> ExecResult:
        """See `dsec.sandbox.Sandbox.exec`."""
        async with self._execs:
            process = await self.start(command)
            try:
                if command.tty is not None or command.keep_stdin_open:
                    await process.close_stdin()  # nobody else can
                return await process.wait()
            except asyncio.CancelledError:
                if self._guest is not None:
                    self._guest.kill_now(process.number)
                raise

    async def start(self, command: Command, number: int | None = None) -> GuestProcess:
        """See `dsec.sandbox.Sandbox.start`."""
        body = encode_command(command)
        number = await self._take_number(number)
        streams = Streams(number, command, self._keeping)
        self._unrun.add(number)
        await streams.open()
        try:
            async with self._gate:
                guest = self._living()
                await self._resume()
                await guest.start(number, command, body, streams.theirs)
        except BaseException:
            streams.close()
            raise
        self._unrun.discard(number)
        streams.begin()
        process = self._follow(GuestProcess(self, number, command, streams))
        if command.tty is not None:
            await self._attached(process)
        return process

    async def _attached(self, process: GuestProcess) -> None:
        try:
            await process.attached()
        except asyncio.CancelledError:
            if self._guest is not None:
                self._guest.kill_now(process.number)
            raise

    def _follow(self, process: GuestProcess) -> GuestProcess:
        number = process.number
        self._processes[number] = self._known[number] = process
        process.on_end(lambda: self._processes.pop(number, None))
        return process

    async def _take_number(self, number: int | None) -> int:
        self._living()
        if number is None:
            await self._remember()
            number = self._last_number + 1
        if not 1 <= number <= NUMBER_MAX or number in self._known:
            raise InvalidArgumentError(f"{number} cannot be the number of a new command")
        self._last_number = max(self._last_number, number)
        self._first_number = min(self._first_number, number)
        return number

    async def _remember(self) -> Remembered:
        """What the guest knows of an earlier process's commands; asked for once, of a guest that runs."""
        if self._remembered is None and self._is_adopted:
            async with self._gate:
                guest, was_paused = self._living(), self._paused_at is not None
                await self._resume()
                self._remembered = self._remembered or await guest.sync()
                if was_paused:
                    await self._pause()
            self._last_number = max(self._last_number, *self._remembered.running, *self._remembered.ended, 0)
        self._remembered = self._remembered or Remembered()
        return self._remembered

    async def resume_process(self, number: int, command: Command) -> GuestProcess | None:
        """See `dsec.sandbox.Sandbox.resume_process`."""
        if number in self._unrun:
            return None
        if (process := self._known.get(number)) is not None:
            return process
        guest, remembered = self._living(), await self._remember()
        if (process := self._known.get(number)) is not None:  # another caller was faster
            return process
        if number not in remembered.running and number not in remembered.ended:
            is_forgotten = remembered.is_full or number >= self._first_number
            if number > self._last_number or not is_forgotten:
                return None
            raise OutcomeUnknownError(f"command {number} ended longer ago than sandbox {self._id} remembers")
        guest.resume(number)
        streams = Streams(number, command, self._keeping)
        is_whole = streams.resume()
        process = self._follow(GuestProcess(self, number, command, streams, is_cut=not is_whole))
        if streams.lacks_terminal and (unread := self._keeping.take(number, _UNREAD_TTY)) is not None:
            process.attach(unread[1], unread[0])
        return process

    # -- pausing ---------------------------------------------------------------------------------

    async def pause(self) -> None:
        """See `dsec.sandbox.Sandbox.pause`."""
        async with self._gate:
            self._living()
            await self._pause()
            await self._reclaim()

    @asynccontextmanager
    async def _standing_still(self) -> AsyncIterator[None]:
        """Nothing inside runs, and nothing makes it run, in this block."""
        async with self._gate:
            self._living()
            was_paused = self._paused_at is not None
            await self._pause()
            try:
                yield
            finally:
                if not was_paused:
                    await self._resume()

    async def resume(self) -> None:
        """See `dsec.sandbox.Sandbox.resume`."""
        self._living()
        if self._paused_at is not None or self._gate.locked():
            async with self._gate:
                self._living()
                await self._resume()

    async def _pause(self) -> None:
        if self._paused_at is not None:
            return
        self._paused_at = time.monotonic()
        try:
            await whole(self._freeze())
            key = self._keeping.key(*_PAUSED)
            self._pause_note = key, os.dup(self._living().fileno())
            await self._keeping.keep(dict([self._pause_note]))
        except BaseException:
            await self._resume()
            raise

    async def _resume(self) -> None:
        """The guest finds EXTEND before it looks at its clock again.  What cannot go on is paused still."""
        if self._paused_at is None:
            return
        now_s = time.monotonic()
        await self._living().extend(now_s - self._paused_at)
        self._paused_s += now_s - self._paused_at
        self._paused_at = now_s
        await whole(self._go_on())

    async def _go_on(self) -> None:
        await self._thaw()
        self._paused_at = None
        self._release_note()

    def _release_note(self) -> None:
        note, self._pause_note = self._pause_note, None
        if note is not None:
            self._keeping.release(dict([note]))

    def _paused_in_all_s(self) -> float:
        return self._paused_s + (0.0 if self._paused_at is None else time.monotonic() - self._paused_at)

    # -- the end ---------------------------------------------------------------------------------

    async def destroy(self) -> None:
        """See `dsec.sandbox.Sandbox.destroy`."""
        await asyncio.shield(self._start_destroying())

    def _start_destroying(self) -> asyncio.Task[None]:
        if self._destroying is None:
            self._destroying = asyncio.create_task(self._destroy(), name=f"destroy {self._id}")
            self._on_end()
        return self._destroying

    async def _destroy(self) -> None:
        await self._release()
        for process in list(self._processes.values()):
            await process.ended()
        self._release_note()
        await self._keeping.close()

    def detach(self) -> None:
        """Leave it to the next process."""
        self._keeping.detach()
        self._release_note()
        if self._guest is not None:
            self._guest.close("the command was left to the next process")
            self._guest = None


class AnswerWatch:
    """Gives up on a guest that has not answered when no time is left."""

    def __init__(
        self, waiting: asyncio.Future[Answer], left_s: Callable[[], float], give_up: Callable[[str], SandboxLostError]
    ) -> None:
        self._waiting = waiting
        self._left_s = left_s
        self._give_up = give_up
        self._timer = asyncio.get_running_loop().call_later(left_s(), self._look)

    def _look(self) -> None:
        if (left_s := self._left_s()) > 0:  # the sandbox is paused, or was
            self._timer = asyncio.get_running_loop().call_later(max(left_s, PAUSED_POLL_S), self._look)
        elif not self._waiting.done():
            self._waiting.set_exception(self._give_up("its guest stopped answering"))

    def stop(self) -> None:
        """It has answered."""
        self._timer.cancel()


async def whole(work: Coroutine[None, None, _T]) -> _T:
    """Do all of it, also if the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
