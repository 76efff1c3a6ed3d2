"""Durable, keyed exec: the log knows a command before the sandbox does, and its result before the caller.

The recovery table (docs/architecture.md) is decided here and in `dsec.replay`: a finished key is
answered from the log; a key that started on an *earlier* incarnation, or that the sandbox never heard
of, runs for the first time; a key that started on *this* incarnation and whose end nobody knows is
never run again.  A command belongs to the log, not to its caller: a caller that goes away leaves it
running, and the next one that asks under the same key waits for the same end.

Invariants:
1. *started* is durable before the command runs, *finished* before the result is returned.
2. A key with another command is a DivergedError and runs nothing.
3. However many callers ask under one key at once, the command runs once.
4. A command that was started is *refused* only if its sandbox says that it does not know it; whatever else
   goes wrong leaves its outcome unknown, or (an Edge that does not answer) open for the next process to collect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from dsec.edge.commands import encode_command
from dsec.errors import (
    DivergedError,
    DsecError,
    NotFoundError,
    OutcomeUnknownError,
    OutOfRangeError,
    SandboxLostError,
    UnreachableError,
)
from dsec.sandbox import Process, Sandbox
from dsec.trajectory import (
    CommandFinished,
    CommandRefused,
    CommandStarted,
    CommandUnknown,
    Entry,
    Record,
    Trajectory,
    TrajectoryRecord,
    digest_of,
)
from dsec.types import Command, ExecResult, Output

KILLED_CODE = 137
Recall = Callable[[int], Awaitable[TrajectoryRecord]]
"""The trajectory record of an lsn, read back."""


class Running:
    """A command between its request and its durable end.

    `process` is done once the sandbox runs it, or (None) once it is certain that it never will.
    """

    def __init__(self, key: str, number: int, command: Command, digest: bytes) -> None:
        self.key, self.number, self.command, self.digest = key, number, command, digest
        self.process: asyncio.Future[Process | None] = asyncio.get_running_loop().create_future()
        self.end: asyncio.Task[ExecResult] | None = None
        self.is_killed = False
        self.is_starting = False

    async def wait(self) -> ExecResult:
        """The result, once it is durable; a caller that is cancelled leaves the command alone.

        UnreachableError if the host agent lets go of the command: its next process may be asked again.
        """
        if self.end is None:
            raise AssertionError(self.key)
        try:
            return await asyncio.shield(self.end)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self.end.cancelled() and caller is not None and not caller.cancelling():
                raise let_go(self.key) from None
            raise

    async def started(self) -> Process | None:
        """The running process, None if it was killed before it ran; raises what kept it from starting."""
        return await asyncio.shield(self.process)

    def kill_early(self) -> bool:
        """Whether it has no process yet; then it gets none, or one that is killed at once."""
        if self.process.done():
            return False
        self.is_killed = True
        if self.is_starting and self.end is not None:
            self.is_starting = False
            self.end.cancel()  # `_start` knows what that means
        return True


def let_go(key: str) -> UnreachableError:
    """What those hear who wait for a command when the host agent stops."""
    return UnreachableError(f"the host agent stops while {key!r} is under way: ask the next one, under the same key")


class DurableSandbox:
    """One incarnation of a session: a real sandbox together with the session's trajectory."""

    def __init__(
        self,
        sandbox: Sandbox,
        trajectory: Trajectory,
        record: Record,
        *,
        recall: Recall | None = None,
        wake: Callable[[], Awaitable[None]] | None = None,
        on_lost: Callable[[], None] | None = None,
        now: Callable[[], float] = time.time,
        shape: Callable[[Command], Command] = lambda command: command,
        keep: Callable[[Process], None] = lambda _process: None,
    ) -> None:
        """Wrap a sandbox whose incarnation is already in the trajectory.

        `recall` reads what a trajectory without contents points to; `wake` is awaited right before a
        command starts; `on_lost` hears that the sandbox died under a command; `shape` is how a
        command is run, where that differs from how it was asked for and logged (bounds); `keep` gets each
        process that ended.
        """
        self.sandbox = sandbox
        self.trajectory = trajectory
        self.record = record
        self.running: dict[str, Running] = {}
        self._recall = recall
        self._wake = wake
        self._on_lost = on_lost
        self.now = now
        self.last_number = trajectory.last_number
        """Of the commands that were ever begun, also those that were not recorded yet."""
        self._shape = shape
        self._keep = keep

    async def exec(self, key: str, command: Command, number: int | None = None) -> ExecResult:
        """Run `command` once under `key`, or answer from the log.

        Raises DivergedError (the key belongs to another command), OutcomeUnknownError (it started
        on this incarnation and its end is not known), and what `Process.wait` raises.
        """
        running = self.begin(key, command, number)
        return await self.result(key) if running is None else await running.wait()

    def begin(self, key: str, command: Command, number: int | None = None) -> Running | None:
        """The command under way under `key`, begun now if the key is new; None if it has finished.

        An empty key is a new one, `#` and the command's number, which is the next if none is given.
        Raises as `exec` does before anything runs.
        """
        encode_command(command)
        digest = digest_of(command)
        if key:
            running = self.running.get(key)
            entry = self.trajectory.entries.get(key)
            known = running or entry
            if known is not None and known.digest != digest:
                raise DivergedError(f"{self.trajectory.session}: key {key!r} was used for another command")
            if running is not None:
                return running
            if entry is not None:
                if entry.state == "finished":
                    return None
                if self.trajectory.is_open_here(entry):
                    raise self._unknown(key)
        number = self.take_number(number)
        running = Running(key or f"#{number}", number, command, digest)
        self._begin(running, self._run(running))
        return running

    def take_number(self, number: int | None = None) -> int:
        """The next command's number, or one above all before."""
        self.last_number = self.last_number + 1 if number is None else max(self.last_number, number)
        return self.last_number if number is None else number

    async def result(self, key: str) -> ExecResult:
        """The durable result of a finished key; waits for one that runs.  NotFoundError, OutcomeUnknownError."""
        if (running := self.running.get(key)) is not None:
            return await running.wait()
        entry = self.entry(key)
        if entry.state != "finished" or entry.result is None:
            raise self._unknown(key)
        if self.trajectory.keeps_contents or self._recall is None:
            return entry.result
        finished = await self._recall(entry.finished_lsn)
        if not isinstance(finished, CommandFinished):
            raise DivergedError(f"lsn {entry.finished_lsn} does not hold the end of key {key!r}")
        return finished.result

    async def command(self, key: str) -> Command:
        """What was asked for under a key.  NotFoundError."""
        if (running := self.running.get(key)) is not None:
            return running.command
        entry = self.entry(key)
        if self.trajectory.keeps_contents or self._recall is None:
            return entry.command
        started = await self._recall(entry.started_lsn)
        if not isinstance(started, CommandStarted):
            raise DivergedError(f"lsn {entry.started_lsn} does not hold the start of key {key!r}")
        return started.command

    def entry(self, key: str) -> Entry:
        """What the trajectory knows of a key.  NotFoundError."""
        entry = self.trajectory.entries.get(key)
        if entry is not None and entry.state == "refused":
            raise NotFoundError(f"{self.trajectory.session}: {key!r} did not run ({entry.refusal})")
        if entry is None:
            raise NotFoundError(f"{self.trajectory.session} has no command with key {key!r}")
        return entry

    async def attach(self) -> None:
        """Take up what an earlier process of the host agent left open: collect, run for the first time, or give up."""
        await asyncio.gather(
            *(
                self._attach(key, entry)
                for key, entry in list(self.trajectory.entries.items())
                if entry.state == "running" and self.trajectory.is_open_here(entry) and key not in self.running
            )
        )

    async def resume_process(self, key: str) -> Process | None:
        """The command of a key as the sandbox knows it; see the port."""
        return await self.sandbox.resume_process(self.entry(key).number, self._shape(await self.command(key)))

    async def _attach(self, key: str, entry: Entry) -> None:
        command = await self.command(key)
        running = Running(key, entry.number, command, entry.digest)
        try:
            process = await self.resume_process(key)
        except OutcomeUnknownError:
            await self.record(CommandUnknown(*self._session, key, self.now()))
            return
        except SandboxLostError:
            self._lose()
            return
        if entry.state == "running" and key not in self.running:  # nobody else was faster
            self._begin(running, self._perform(running, process))

    def _begin(self, running: Running, work: Awaitable[ExecResult]) -> None:
        async def to_its_end() -> ExecResult:
            try:
                return await work
            except BaseException as error:
                if not running.process.done():
                    running.process.set_exception(error if isinstance(error, DsecError) else let_go(running.key))
                    running.process.exception()  # seen: who waits for the end hears of it too
                raise
            finally:
                del self.running[running.key]

        self.running[running.key] = running
        running.end = asyncio.create_task(to_its_end(), name=f"command {running.key}")
        running.end.add_done_callback(_see)

    async def _run(self, running: Running) -> ExecResult:
        await self.record(CommandStarted(*self._session, running.key, running.command, running.number, self.now()))
        return await self._perform(running, None)

    async def _perform(self, running: Running, process: Process | None) -> ExecResult:
        """From a durable start to a durable end; `process` is the one that runs already, if there is one."""
        try:
            process = await self._start(running) if process is None else process
            if process is not None:
                result = await self._end_of(running, process)
            else:
                running.process.set_result(None)
                result = ExecResult(exit_code=KILLED_CODE)
        except OutcomeUnknownError:
            await self.record(CommandUnknown(*self._session, running.key, self.now()))
            raise
        except SandboxLostError:
            self._lose()
            raise
        except DsecError as error:
            if error.command_started == "no":
                await self.record(CommandRefused(*self._session, running.key, f"{error.code}: {error}", self.now()))
            raise
        ran = process is not None
        await self.record(CommandFinished(*self._session, running.key, result, self.now(), ran=ran))
        return result

    async def _start(self, running: Running) -> Process | None:
        """Start it, or find it started; None if it was killed before it ran."""
        if running.is_killed:
            return None
        command, is_asked = self._shape(running.command), False
        running.is_starting = True
        try:
            if self._wake is not None:
                await self._wake()
            is_asked = True
            return await self.sandbox.start(command, running.number)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not running.is_killed or task is None or task.uncancel() > 0:
                raise
        finally:
            running.is_starting = False
        return await self._find(running) if is_asked else None

    async def _end_of(self, running: Running, process: Process) -> ExecResult:
        """Its result.  OutcomeUnknownError for a failure after the start, unless the sandbox says that nothing ran."""
        try:
            if running.is_killed:
                await process.kill()
            running.process.set_result(process)
            result = await process.wait()
        except (DsecError, OSError) as error:
            is_refusal = isinstance(error, DsecError) and error.command_started == "no"
            if isinstance(error, OSError) or (is_refusal and await self._find(running) is not None):
                raise OutcomeUnknownError(f"{running.key!r} started, and its end cannot be told: {error}") from error
            raise
        self._keep(process)
        return result

    async def _find(self, running: Running) -> Process | None:
        """A command that may have started, as the sandbox knows it; None if it never ran.  OutcomeUnknownError."""
        try:
            return await self.sandbox.resume_process(running.number, self._shape(running.command))
        except DsecError as error:
            if error.command_started == "no":  # that is said of the question
                raise OutcomeUnknownError(f"nobody can say whether {running.key!r} ran: {error}") from error
            raise

    async def stop(self) -> None:
        """Let go of every command without touching it or logging anything: for a host agent that detaches."""
        tasks = [running.end for running in self.running.values() if running.end is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def destroy(self) -> None:
        """Free the real sandbox; the trajectory stays."""
        await self.sandbox.destroy()

    @property
    def _session(self) -> tuple[str, int]:
        return self.trajectory.session, self.trajectory.incarnation

    def _lose(self) -> None:
        if self._on_lost is not None:
            self._on_lost()

    def _unknown(self, key: str) -> OutcomeUnknownError:
        return OutcomeUnknownError(f"{self.trajectory.session}: {key!r} started here and its end is unknown")


def _see(task: asyncio.Task[ExecResult]) -> None:
    """A command that nobody waits for may fail; what came of it is in the log."""
    if not task.cancelled():
        task.exception()


def slice_of(output: Output, offset: int, bytes_max: int) -> bytes:
    """Bytes of a bounded output by their offset in the whole; b"" at its end.  OutOfRangeError if dropped."""
    head, tail_offset = output.head, len(output.head) + output.dropped_bytes
    if offset < len(head):
        return head[offset : offset + bytes_max]
    if offset < tail_offset:
        raise OutOfRangeError(f"bytes {offset} to {tail_offset - 1} were counted, not kept")
    return output.tail[offset - tail_offset : offset - tail_offset + bytes_max]
