"""One living sandbox: what may be done with it, one change of its state at a time.

Commands go through the log (`exec_log`); pause, resume, snapshot and network changes are written
down, then done.  Whoever needs the sandbox awake wakes it; the lifecycle table says what is possible.

See: dsec/lifecycle.py, dsec/edge/registry.py for its birth and its end.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import msgspec

from dsec.edge.admission import Amounts
from dsec.edge.edge_config import EdgeConfig
from dsec.edge.edge_log import EdgeLog
from dsec.edge.exec_log import DurableSandbox, Running, slice_of
from dsec.edge.journal import Known, NetworkUpdated, SandboxPaused, SandboxResumed, SnapshotTaken
from dsec.edge.network.rules import Allowlist
from dsec.errors import (
    DsecError,
    HostUnfitError,
    InvalidArgumentError,
    OutcomeUnknownError,
    ResourceExhaustedError,
    SandboxLostError,
    UnreachableError,
)
from dsec.lifecycle import Happening, State, after
from dsec.sandbox import Process, Sandbox
from dsec.types import Command, ExecResult, LayerId, NetworkPolicy, SandboxId, Stream
from dsec.views import CommandView
from wal import settled

KEY_BYTES_MAX = 256
POLICY_BYTES_MAX = 128 << 10
Processes = OrderedDict[tuple[SandboxId, int], Process]
"""Ended commands whose output may still be read by offset, the oldest first."""


class LiveSandbox:
    """A sandbox that is there, or is about to be; `end` is set once it is to go."""

    def __init__(
        self, known: Known, sandbox: Sandbox, durable: DurableSandbox, asked: Amounts, log: EdgeLog, config: EdgeConfig
    ) -> None:
        self.known = known
        self.sandbox = sandbox
        self.durable = durable
        self.asked = asked
        self.end: asyncio.Task[None] | None = None
        """Its end, once that has begun."""
        self._log = log
        self._config = config
        self._lock = asyncio.Lock()

    @property
    def state(self) -> State:
        """Of the lifecycle table."""
        return self.known.state if self.end is None else State.STOPPING

    @property
    def commands_count(self) -> int:
        """Commands that were ever begun."""
        return self.durable.last_number

    @property
    def is_busy(self) -> bool:
        """Whether a command is under way."""
        return bool(self.durable.running)

    def require(self, happening: Happening) -> State:
        """The state after it.  SandboxLostError, StateError."""
        return after(self.state, happening, f"sandbox {self.known.id}")

    async def wake(self) -> None:
        """Resume it, if it is paused."""
        if self.require(Happening.USE) is not self.state:
            await self.resume()

    async def pause(self, now_s: float) -> None:
        """Stop every process; safe to call twice.  A caller that is cancelled waits for it: the journal has said so."""
        await settled(self._pause(now_s))

    async def _pause(self, now_s: float) -> None:
        async with self._lock:
            if self.require(Happening.PAUSE) is not self.state:
                await self._log.append(SandboxPaused(self.known.id, now_s))
            try:
                await self.sandbox.pause()
            except (ResourceExhaustedError, HostUnfitError):  # it runs on
                await self._log.append(SandboxResumed(self.known.id, self.durable.now()))
                raise

    async def resume(self) -> None:
        """Let it go on, its commands followed to their ends; safe to call twice.  A cancelled caller waits for it."""
        await settled(self._resume())

    async def _resume(self) -> None:
        async with self._lock:
            was_paused = self.require(Happening.RESUME) is not self.state
            if was_paused:
                await self._log.append(SandboxResumed(self.known.id, self.durable.now()))
            try:
                await self.sandbox.resume()
            except ResourceExhaustedError:  # it stands still
                if was_paused:
                    await self._log.append(SandboxPaused(self.known.id, self.durable.now()))
                raise
            await self.durable.attach()

    async def snapshot(self) -> LayerId:
        """What was written in it, as a layer; says in the journal between which commands that was."""
        async with self._lock:
            self.require(Happening.SNAPSHOT)
            before = None if self.is_busy else self.commands_count
            layer = await self.sandbox.snapshot()
            after_number = before if before == self.commands_count else None
            await self._log.append(SnapshotTaken(self.known.id, layer, after_number, self.durable.now()))
            return layer

    async def update_network(self, policy: NetworkPolicy) -> None:
        """Replace the allowlist; the old one stays if it cannot be.  InvalidArgumentError, StateError."""
        check_size("the network policy", policy, POLICY_BYTES_MAX)
        Allowlist(policy)
        await settled(self._update_network(policy))

    async def _update_network(self, policy: NetworkPolicy) -> None:
        async with self._lock:
            self.require(Happening.SNAPSHOT)
            before = self.known.spec.network
            await self._log.append(NetworkUpdated(self.known.id, policy, self.durable.now()), is_refusable=True)
            try:
                await self.sandbox.update_network(policy)
            except DsecError:
                await self._log.append(NetworkUpdated(self.known.id, before, self.durable.now()))
                raise

    def begin(self, command: Command, key: str) -> Running | None:
        """Begin a command, or find the one that this key stands for; None if it has finished."""
        check_key(key)
        if key not in self.durable.running and key not in self.durable.trajectory.entries:
            self.require(Happening.USE)
            if key.startswith("#"):
                raise InvalidArgumentError(f"key {key!r}: a key that begins with # is given by the Edge")
            if len(self.durable.running) >= self._config.commands_running_count_max:
                raise ResourceExhaustedError(
                    f"sandbox {self.known.id} has {len(self.durable.running)} commands under way"
                )
            if self.commands_count >= self._config.commands_count_max:
                raise ResourceExhaustedError(f"sandbox {self.known.id} has had {self.commands_count} commands")
        return self.durable.begin(key, command)

    async def exec(self, command: Command, key: str) -> ExecResult:
        """Run a command to its end, once; a caller that is cancelled leaves it running."""
        await self._wake_for(key)
        running = self.begin(command, key)
        return await (self.durable.result(key) if running is None else running.wait())

    async def start(self, command: Command, key: str) -> CommandView:
        """Start a command; returns when it runs."""
        await self._wake_for(key)
        running = self.begin(command, key)
        if running is None:
            return self.view(key)
        if await running.started() is None:
            await running.wait()
            return self.view(key)
        return CommandView(key=running.key, number=running.number, command=running.command, state="running")

    async def wait(self, key: str) -> ExecResult:
        """Its result.  NotFoundError, OutcomeUnknownError."""
        await self._wake_for(key)
        return await self.durable.result(key)

    async def process(self, key: str) -> Process | None:
        """The running process of a key; None if it has ended.  NotFoundError, OutcomeUnknownError."""
        await self._wake_for(key)
        running = self.durable.running.get(key)
        if running is None:
            if self.durable.entry(key).state == "unknown":
                raise OutcomeUnknownError(f"nobody knows how {key!r} ended in sandbox {self.known.id}")
            return None
        return await running.started()

    async def kill(self, key: str) -> None:
        """Kill its whole tree, or see to it that it never runs; nothing if it has ended.  Raises as `process`."""
        running = self.durable.running.get(key)
        if running is None or not running.kill_early():
            process = await self.process(key)
            if process is not None:
                await process.kill()

    async def read_output(self, key: str, stream: Stream, offset: int, bytes_max: int, ended: Processes) -> bytes:
        """Output by offset: from the process while it is known, else from what the result kept."""
        process = await self.process(key)
        if process is None:
            number = self.durable.entry(key).number
            process = ended.get((self.known.id, number)) or await self._ended_process(key)
        if process is not None:
            return await process.read_output(stream, offset, bytes_max)
        result = await self.durable.result(key)
        return slice_of(result.stdout if stream == "stdout" else result.stderr, offset, bytes_max)

    async def _ended_process(self, key: str) -> Process | None:
        """An ended command as the sandbox remembers it, if its result does not hold all of its output."""
        if self.end is not None:
            return None
        result = await self.durable.result(key)
        if not (result.stdout.is_truncated or result.stderr.is_truncated):
            return None
        try:
            return await self.durable.resume_process(key)
        except (OutcomeUnknownError, SandboxLostError):
            return None

    def commands(self) -> list[CommandView]:
        """Every command in the order of their numbers, without what they read and wrote."""
        views = [self.view(key) for key, entry in self.durable.trajectory.entries.items() if entry.state != "refused"]
        return sorted(views, key=lambda view: view.number)

    def view(self, key: str) -> CommandView:
        """One command, without what it read and wrote.  NotFoundError."""
        entry = self.durable.entry(key)
        state = entry.state if entry.state != "refused" else "unknown"
        return CommandView(key=key, number=entry.number, command=entry.command, state=state, result=entry.result)

    async def _wake_for(self, key: str) -> None:
        """Whoever asks for a command that is under way wants it to go on; an earlier Edge's is first found again.

        UnreachableError if it cannot go on now: unlike a lack of something, that says nothing of what has run.
        """
        is_left = self.end is None and (entry := self.durable.trajectory.entries.get(key)) and entry.state == "running"
        try:
            if key in self.durable.running:
                if self.state is State.PAUSED:
                    await self.wake()
            elif is_left:
                await self.resume()
        except ResourceExhaustedError as error:
            raise UnreachableError(f"{key!r} is under way and cannot go on now, ask again: {error}") from error


def check_key(key: str) -> None:
    """InvalidArgumentError for a key that cannot be written down."""
    if key:
        check_text("key", key, KEY_BYTES_MAX)


def check_size(what: str, value: msgspec.Struct, bytes_max: int) -> None:
    """InvalidArgumentError for a value that is too large to be written down, or no text where it must be."""
    try:
        size = len(msgspec.msgpack.encode(value))
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidArgumentError(f"{what} cannot be written down: {error}") from error
    if size > bytes_max:
        raise InvalidArgumentError(f"{what} has {size} bytes, more than {bytes_max}")


def check_text(what: str, text: str, bytes_max: int) -> None:
    """InvalidArgumentError for a text that is empty, too long, or not to be shown."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{what} is no text: {error.reason}") from error
    if not 0 < size <= bytes_max or not text.isprintable():
        raise InvalidArgumentError(f"{what} {text[:80]!r} must be 1 to {bytes_max} printable bytes, has {size}")
