"""Doubles of the sandbox port for other rooms' tests, and the conformance suite for real substrates.

`FakeSubstrate` runs nothing: a script (a function) answers each command.  It is honest about the
port: the same commands and limits are refused, output is bounded, a destroyed sandbox is lost, a
cancelled exec is killed, a paused sandbox answers nothing until it is resumed.  It does not measure
time: a script that wants a timeout returns one.

A `FakeHost` is the machine below: sandboxes stay on it when a substrate detaches, or is simply
forgotten (the host agent was killed), and the next `FakeSubstrate` on the same host adopts them.

See: dsec/sandbox.py, dsec/conformance.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import msgspec

from dsec.conformance.check import Outcome
from dsec.conformance.suite import SANDBOX_CHECKS, check_sandbox
from dsec.edge.capture import OutputBuffer
from dsec.edge.commands import check_spec, completed, encode_command
from dsec.edge.exec_log import slice_of
from dsec.errors import (
    InvalidArgumentError,
    NotFoundError,
    OutcomeUnknownError,
    SandboxLostError,
    SpawnError,
)
from dsec.sandbox import Hold
from dsec.types import Command, Composition, ExecResult, LayerId, NetworkPolicy, Output, SandboxId, SandboxSpec, Stream

__all__ = [
    "SANDBOX_CHECKS",
    "FakeClock",
    "FakeHost",
    "FakeProcess",
    "FakeSandbox",
    "FakeSubstrate",
    "Outcome",
    "Script",
    "check_sandbox",
]

Script = Callable[["FakeSandbox", Command], ExecResult | Awaitable[ExecResult]]
KILLED = 137


def succeed(_sandbox: FakeSandbox, _command: Command) -> ExecResult:
    """The script of a sandbox in which everything works and says nothing."""
    return ExecResult(exit_code=0)


class FakeProcess:
    """A command that a script answers; `stdin`, `signals` and `size` hold what was sent to it."""

    def __init__(self, sandbox: FakeSandbox, number: int, command: Command, answer: Awaitable[ExecResult]) -> None:
        self._sandbox, self._number, self.command = sandbox, number, command
        self.stdin = command.stdin
        self.is_stdin_closed = not (command.keep_stdin_open or command.tty)
        self.signals: list[int] = []
        self.size = command.tty
        self._end = asyncio.get_running_loop().create_future()
        self._end.add_done_callback(lambda end: end.exception())
        self._work = asyncio.ensure_future(self._answer(answer))
        self._work.add_done_callback(self._ended)

    @property
    def number(self) -> int:
        """See the port."""
        return self._number

    @property
    def is_running(self) -> bool:
        """Whether it has no result yet."""
        return not self._end.done()

    async def _answer(self, answer: Awaitable[ExecResult]) -> None:
        result = await answer
        await self._sandbox.awake.wait()
        self._finish(result)

    def _ended(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled() and (error := work.exception()) is not None:
            self.lose(error)

    def _finish(self, result: ExecResult) -> None:
        limit = self.command.output_bytes_max
        bounded = msgspec.structs.replace(
            result, stdout=_bounded(result.stdout, limit), stderr=_bounded(result.stderr, limit)
        )
        if self.is_running:
            self._end.set_result(bounded)

    def lose(self, error: BaseException) -> None:
        """End without a result."""
        if self.is_running:
            self._end.set_exception(error)

    async def wait(self) -> ExecResult:
        """See the port."""
        return await asyncio.shield(self._end)

    async def kill(self) -> None:
        """See the port."""
        self._work.cancel()
        self._finish(ExecResult(exit_code=KILLED))

    async def signal(self, number: int) -> None:
        """Written down; one that is not for the script to ignore kills."""
        if not 1 <= number <= 64:
            raise InvalidArgumentError(f"there is no signal {number}")
        self.signals.append(number)
        if number in (9, 15) and self.is_running:
            self._work.cancel()
            self._finish(ExecResult(exit_code=128 + number))

    async def write_stdin(self, data: bytes) -> None:
        """Written down."""
        if not (self.command.keep_stdin_open or self.command.tty):
            raise InvalidArgumentError("the command was started without keep_stdin_open or tty")
        if self.is_running and not self.is_stdin_closed:
            self.stdin += data

    async def close_stdin(self) -> None:
        """Written down."""
        self.is_stdin_closed = True

    async def resize(self, rows: int, columns: int) -> None:
        """Written down."""
        if self.size is None:
            raise InvalidArgumentError("the command has no terminal")
        self.size = msgspec.structs.replace(self.size, rows=rows, columns=columns)

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """From the result; a script says nothing before its end."""
        result = await self.wait()
        return slice_of(result.stdout if stream == "stdout" else result.stderr, offset, bytes_max)


class FakeSandbox:
    """A sandbox that a script answers for; `commands` holds what was run, in order."""

    def __init__(self, host: FakeHost, sandbox_id: SandboxId, spec: SandboxSpec, script: Script) -> None:
        self._host = host
        self._id = sandbox_id
        self._script = script
        self.spec = spec
        self.commands: list[Command] = []
        self.processes: dict[int, FakeProcess] = {}
        self.forgotten: set[int] = set()
        """Numbers of commands whose end the sandbox no longer remembers."""
        self.awake = asyncio.Event()
        self.awake.set()
        self.gone = asyncio.Event()
        self._on_end: Callable[[], None] = lambda: None
        self._last_number = 0

    @property
    def id(self) -> SandboxId:
        """Unique within its host."""
        return self._id

    @property
    def is_destroyed(self) -> bool:
        """Whether nothing of it is left."""
        return self.gone.is_set()

    @property
    def is_paused(self) -> bool:
        """Whether its processes stand still."""
        return not self.awake.is_set()

    async def exec(self, command: Command) -> ExecResult:
        """See the port."""
        process = await self.start(command)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await process.kill()
            raise

    async def start(self, command: Command, number: int | None = None) -> FakeProcess:
        """Ask the script.  InvalidArgumentError and SandboxLostError as in a real sandbox."""
        encode_command(command)
        self._require_alive()
        await self.resume()
        self._last_number = number if number is not None else self._last_number + 1
        if self._last_number in self.processes:
            raise AssertionError(f"number {number} was given twice")
        self.commands.append(command)
        answer = self._script(self, completed(command, self.spec.defaults, {}))
        process = FakeProcess(self, self._last_number, command, _awaited(answer))
        self.processes[self._last_number] = process
        return process

    async def resume_process(self, number: int, command: Command) -> FakeProcess | None:
        """See the port."""
        self._require_alive()
        process = self.processes.get(number)
        if process is not None and process.command != command:
            raise AssertionError(f"number {number} was another command")
        if number in self.forgotten:
            raise OutcomeUnknownError(f"the end of command {number} is forgotten")
        return process

    async def pause(self) -> None:
        """See the port."""
        self._require_alive()
        self.awake.clear()

    async def resume(self) -> None:
        """See the port."""
        self._require_alive()
        self.awake.set()

    async def snapshot(self) -> LayerId:
        """A layer named after the commands that ran; the host remembers it."""
        self._require_alive()
        return self._host.add_layer(self)

    async def update_network(self, policy: NetworkPolicy) -> None:
        """See the port."""
        self._require_alive()
        self.spec = msgspec.structs.replace(self.spec, network=policy)

    def watch(self, on_end: Callable[[], None]) -> None:
        """See the port."""
        self._on_end = on_end
        if self.is_destroyed:
            on_end()

    async def destroy(self) -> None:
        """Every command is lost."""
        self.die()

    def die(self) -> None:
        """As if its first process had been killed."""
        self.gone.set()
        self._on_end()
        self._host.sandboxes.pop(self._id, None)
        for process in self.processes.values():
            process.lose(SandboxLostError(f"sandbox {self._id} was destroyed, or died"))

    def _require_alive(self) -> None:
        if self.is_destroyed:
            raise SandboxLostError(f"sandbox {self._id} was destroyed, or died")


class FakeHost:
    """A machine: what lives on it, whoever looks after it."""

    def __init__(self) -> None:
        self.sandboxes: dict[SandboxId, FakeSandbox] = {}
        self.layers: dict[LayerId, list[Command]] = {}
        self._blocks: list[list[LayerId]] = []
        self._made_count = 0

    def next_id(self) -> SandboxId:
        """A name that was not used here."""
        self._made_count += 1
        return SandboxId(f"fake-{self._made_count}")

    def add_layer(self, sandbox: FakeSandbox) -> LayerId:
        """Remember what a sandbox has written."""
        digest = hashlib.sha256(repr((sandbox.spec.layers, sandbox.commands)).encode()).hexdigest()
        layer = LayerId(f"sha256:{digest}")
        self.layers[layer] = list(sandbox.commands)
        for block in self._blocks:
            block.append(layer)
        return layer

    @contextmanager
    def holding(self) -> Iterator[Hold]:
        """See `dsec.sandbox.Layered`."""
        block: list[LayerId] = []

        async def hold(layers: Sequence[LayerId]) -> None:
            for layer in layers:
                if layer not in self.layers:
                    raise NotFoundError(f"no layer {layer}")
            block.extend(layers)

        self._blocks.append(block)
        try:
            yield hold
        finally:
            self._blocks = [other for other in self._blocks if other is not block]

    def make_room(self) -> None:
        """Every layer goes that nobody holds."""
        held = {layer for block in self._blocks for layer in block}
        for layer in self.layers.keys() - held:
            del self.layers[layer]


class FakeSubstrate:
    """Sandboxes answered for by one script; `sandboxes` holds all that this substrate made."""

    def __init__(self, script: Script = succeed, host: FakeHost | None = None) -> None:
        self._script = script
        self.host = host or FakeHost()
        self._is_open = False
        self._adopted: dict[SandboxId, FakeSandbox] = {}
        self.sandboxes: list[FakeSandbox] = []

    async def open(self) -> None:
        """Start; what lives on the host is ours."""
        self._is_open = True
        self._adopted = dict(self.host.sandboxes)

    def adopted(self) -> Mapping[SandboxId, FakeSandbox]:
        """See the port."""
        return self._adopted

    async def composed(self, references: Sequence[str]) -> Composition:
        """See the port; nothing has a name here."""
        return Composition(layers=tuple(map(LayerId, references)))

    def holding(self) -> AbstractContextManager[Hold]:
        """See the port."""
        return self.host.holding()

    async def create(self, spec: SandboxSpec, sandbox_id: SandboxId | None = None) -> FakeSandbox:
        """A fresh sandbox.  InvalidArgumentError, NotFoundError (a layer), SpawnError if not open."""
        check_spec(spec)
        if not self._is_open:
            raise SpawnError("the substrate is not open")
        for layer in spec.layers:
            if layer not in self.host.layers:
                raise NotFoundError(f"no layer {layer}")
        sandbox = FakeSandbox(self.host, sandbox_id or self.host.next_id(), spec, self._script)
        self.sandboxes.append(sandbox)
        self.host.sandboxes[sandbox.id] = sandbox
        return sandbox

    async def detach(self) -> None:
        """Stop; the host keeps the sandboxes."""
        self._is_open = False

    async def close(self) -> None:
        """Destroy every sandbox."""
        for sandbox in list(self.host.sandboxes.values()):
            await sandbox.destroy()
        self._is_open = False


class FakeClock:
    """A clock that stands until it is told to go on.  Implements `dsec.edge.clock.Clock`."""

    def __init__(self, wall_s: float = 1_000_000.0, boot_s: float = 100.0, boot_id: str = "boot-1") -> None:
        self.wall_time_s, self.boot_time_s, self.boot_id = wall_s, boot_s, boot_id
        self._tick = asyncio.Event()

    def wall_s(self) -> float:
        """See Clock; set `wall_time_s` to make it jump."""
        return self.wall_time_s

    def boot_s(self) -> float:
        """See Clock."""
        return self.boot_time_s

    async def wait(self, event: asyncio.Event, _timeout_s: float | None) -> None:
        """See Clock: until the event, or the next `advance`."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._tick.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def advance(self, seconds: float) -> None:
        """Time passes; everybody who waits looks again."""
        self.boot_time_s += seconds
        self.wall_time_s += seconds
        self._tick.set()
        self._tick = asyncio.Event()


async def _awaited(answer: ExecResult | Awaitable[ExecResult]) -> ExecResult:
    return await answer if inspect.isawaitable(answer) else answer


def _bounded(whole: Output, bytes_max: int) -> Output:
    """Scripted output cut as a real sandbox would; what a script cut itself stays."""
    if whole.is_truncated:
        return whole
    buffer = OutputBuffer(bytes_max)
    buffer.add(memoryview(whole.data))
    return buffer.output()
