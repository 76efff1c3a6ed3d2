"""The streams of one command, and what keeps them through the death of this process.

A command has pipes, or a terminal.  Where the substrate has a keeper, each of our ends is kept there
from before the command starts until after it was disposed of, and output goes to files; else both are this
process's alone.

Invariants:
    1. Every descriptor is closed, however the command ends, and a kept one is dropped by the keeper first.

See: dsec/edge/capture.py, dsec/edge/spool.py, dsec/edge/keeper.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import termios
import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol

from dsec.edge.capture import END_OF_TRANSMISSION, Dispose, OutputBuffer, PipeReader, PipeWriter, Sink
from dsec.edge.spool import Spool
from dsec.errors import ResourceExhaustedError
from dsec.types import Command, Output, SandboxId, Stream


class KeeperLike(Protocol):
    """What `dsec.edge.keeper.Keeper` offers."""

    async def put(self, key: str, fd: int) -> None:
        """Keep a copy of `fd`, which stays open until `drop`."""
        ...

    async def drop(self, key: str) -> None:
        """Keep it no more."""
        ...


class Keeping:
    """What of one sandbox's commands outlives this process: nothing, without a keeper and a spool.

    A key is `exec/<sandbox>/<number>/<role>/<ms>`, the last being when it was put, on the clock of this boot.
    """

    def __init__(
        self,
        sandbox_id: SandboxId,
        scratch: bytearray,
        keeper: KeeperLike | None = None,
        spool: Spool | None = None,
    ) -> None:
        self.scratch = scratch
        self._prefix = f"exec/{sandbox_id}/"
        self._keeper = keeper
        self._spool = spool
        self._left: dict[tuple[int, str], tuple[int, str, float]] = {}
        self._drops: set[asyncio.Task[None]] = set()
        self._is_detached = False

    def adopt(self, files: Mapping[str, int]) -> None:
        """Own what an earlier process left under our keys (without their prefix)."""
        for key, fd in files.items():
            number, role, put_ms = key.split("/")
            self._left[int(number), role] = fd, self._prefix + key, int(put_ms) / 1000

    async def keep(self, number: int, role: str, fd: int) -> Dispose:
        """Keep a copy of `fd`; gives what closes both.  ResourceExhaustedError, HostUnfitError."""
        if self._keeper is None:
            return os.close
        key = f"{self._prefix}{number}/{role}/{round(time.monotonic() * 1000)}"
        try:
            await self._keeper.put(key, fd)
        except BaseException:
            await self._keeper.drop(key)
            raise
        return partial(self._dispose, self._keeper, key)

    def take(self, number: int, role: str) -> tuple[int, Dispose] | None:
        """A descriptor that an earlier process left, and what closes it."""
        left = self._left.pop((number, role), None)
        if left is None or self._keeper is None:
            return None
        return left[0], partial(self._dispose, self._keeper, left[1])

    def left_since(self, number: int, role: str) -> float | None:
        """When an earlier process put a descriptor that was not taken yet (time.monotonic)."""
        left = self._left.get((number, role))
        return None if left is None else left[2]

    def _dispose(self, keeper: KeeperLike, key: str, fd: int) -> None:
        if self._is_detached:
            os.close(fd)
            return
        task = asyncio.create_task(_drop(keeper, key, fd), name=f"drop {key}")
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    def sink(self, number: int, stream: Stream, command: Command) -> Sink:
        """Where that output goes."""
        if self._spool is None:
            return OutputBuffer(command.output_bytes_max)
        return self._spool.open(number, stream, command.output_bytes_max)

    def end(self, number: int, stream: Stream, sink: Sink) -> None:
        """No more comes there: it may make room for later outputs."""
        if self._spool is not None and not self._is_detached:
            self._spool.end(number, stream, sink.disk_bytes)

    def detach(self) -> None:
        """From now on close our own copies only: the next process goes on with what is kept."""
        self._is_detached = True
        for fd, _, _ in self._left.values():
            os.close(fd)
        self._left.clear()

    async def close(self) -> None:
        """Dispose of what was never taken, wait until all is dropped, and remove the output: the sandbox is gone."""
        for number, role in list(self._left):
            if (taken := self.take(number, role)) is not None:
                taken[1](taken[0])
        if self._drops:
            await asyncio.wait(self._drops)
        if self._spool is not None:
            await asyncio.to_thread(self._spool.remove)


async def _drop(keeper: KeeperLike, key: str, fd: int) -> None:
    try:
        await keeper.drop(key)
    finally:
        os.close(fd)


class Streams:
    """The streams of one command: our ends on the event loop, the command's ends until they are sent."""

    def __init__(self, number: int, command: Command, keeping: Keeping) -> None:
        self.theirs: list[int] = []
        self._number = number
        self._command = command
        self._keeping = keeping
        self._writer: PipeWriter | None = None
        self._readers: dict[Stream, PipeReader] = {}
        names: tuple[Stream, ...] = ("stdout",) if command.merge_stderr or command.tty else ("stdout", "stderr")
        self._sinks = {name: keeping.sink(number, name, command) for name in names}
        self._terminal = -1
        self._attached = asyncio.Event()

    async def open(self) -> None:
        """Make the pipes; a terminal comes by `attach`.  ResourceExhaustedError, HostUnfitError."""
        if self._command.tty is not None:
            return
        try:
            if self._command.stdin or self._command.keep_stdin_open:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                await self._write(ours)
            for stream in self._sinks:
                ours, theirs = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                await self._read(stream, ours)
        except OSError as error:
            self.close()
            raise ResourceExhaustedError(f"no pipes for a command: {error}") from error
        except BaseException:
            self.close()
            raise
        self._attached.set()

    async def _write(self, fd: int) -> None:
        """What fits into the pipe is with the command already; only a writer that has more to come is kept."""
        writer = self._writer = PipeWriter(fd, self._command.stdin, is_kept_open=self._command.keep_stdin_open)
        if writer.is_open:
            writer.dispose = await self._keeping.keep(self._number, "stdin", fd)

    async def _read(self, stream: Stream, fd: int) -> None:
        reader = self._readers[stream] = PipeReader(fd, self._sinks[stream], self._keeping.scratch)
        reader.dispose = await self._keeping.keep(self._number, stream, fd)

    async def attach(self, master: int) -> None:
        """Take over the command's terminal, and type what it was given to read."""
        self._use_terminal(master, self._command.stdin)
        self._readers["stdout"].dispose = await self._keeping.keep(self._number, "tty", master)

    def _use_terminal(self, master: int, data: bytes) -> None:
        self._terminal = master
        self._writer = PipeWriter(os.dup(master), data, is_kept_open=True)
        sink = self._sinks["stdout"]
        self._readers["stdout"] = PipeReader(master, sink, self._keeping.scratch, is_terminal=True)
        self._attached.set()

    def resume(self) -> bool:
        """Go on with what an earlier process left; False if not all of `stdin` had reached the command."""
        for stream, sink in self._sinks.items():
            if (kept := self._keeping.take(self._number, stream)) is not None:
                self._readers[stream] = PipeReader(kept[0], sink, self._keeping.scratch)
                self._readers[stream].dispose = kept[1]
        if (kept := self._keeping.take(self._number, "tty")) is not None:
            self._use_terminal(kept[0], b"")
            self._readers["stdout"].dispose = kept[1]
        if (kept := self._keeping.take(self._number, "stdin")) is not None:
            self._writer = PipeWriter(kept[0], is_kept_open=True)
            self._writer.dispose = kept[1]
        self._attached.set()
        return self._command.keep_stdin_open or self._command.tty is not None or self._writer is None

    async def attached(self) -> None:
        """Wait for the terminal, if it is one."""
        await self._attached.wait()

    def close_theirs(self) -> None:
        """Close the ends that were sent."""
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    async def write(self, data: bytes) -> None:
        """See `dsec.sandbox.Process.write_stdin`."""
        if self._writer is not None:
            await self._writer.write(data)

    async def end_input(self) -> None:
        """See `dsec.sandbox.Process.close_stdin`."""
        if self._writer is not None:
            await (self._writer.end() if self._terminal < 0 else self._writer.write(END_OF_TRANSMISSION))

    def resize(self, rows: int, columns: int) -> None:
        """Change the terminal's size; the kernel tells the command (SIGWINCH)."""
        reader = self._readers.get("stdout")
        if self._terminal >= 0 and reader is not None and reader.is_open:
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    async def read_output(self, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """See `dsec.sandbox.Process.read_output`."""
        if stream not in self._sinks:
            return b""
        await self._attached.wait()
        if (reader := self._readers.get(stream)) is not None:
            return await reader.read(offset, bytes_max)
        return self._sinks[stream].read(offset, bytes_max)

    def finish(self) -> tuple[Output, Output]:
        """What came on stdout and stderr until now; the pipes are closed."""
        outputs = {
            stream: self._readers[stream].finish() if stream in self._readers else sink.output()
            for stream, sink in self._sinks.items()
        }
        return outputs["stdout"], outputs.get("stderr", Output())

    def close(self) -> None:
        """Close what is open; safe to call twice."""
        self.close_theirs()
        if self._writer is not None:
            self._writer.close()
        for reader in self._readers.values():
            reader.close()
        for stream, sink in self._sinks.items():
            self._keeping.end(self._number, stream, sink)
        self._attached.set()
