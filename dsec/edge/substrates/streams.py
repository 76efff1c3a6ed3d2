"""The streams of one command, and what keeps them through the death of this process.

A command has pipes, or a terminal.  Where the substrate has a keeper, each of our ends is kept there
from before the command starts until it ends (stdin: until its end was told), and output goes to files; else both
are this process's alone.

Invariants:
    1. Every descriptor is closed, however the command ends, and a kept one is dropped by the keeper first.

See: dsec/edge/capture.py, dsec/edge/spool.py, dsec/edge/keeper.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from dsec.edge.capture import END_OF_TRANSMISSION, OutputBuffer, PipeReader, PipeWriter, Sink
from dsec.edge.packets import close_all
from dsec.edge.spool import Spool
from dsec.errors import HostUnfitError, ResourceExhaustedError
from dsec.types import Command, Output, SandboxId, Stream


class KeeperLike(Protocol):
    """What `dsec.edge.keeper.Keeper` offers."""

    async def put_all(self, files: Mapping[str, int]) -> None:
        """Keep copies of these, which stay open until `release`."""
        ...

    def release(self, files: Mapping[str, int]) -> None:
        """Keep them no more, and close them."""
        ...

    def reserve(self) -> None:
        """Hold one place free until `give_back`.  ResourceExhaustedError."""
        ...

    def give_back(self) -> None:
        """The place is free to all again."""
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
        self._left: dict[tuple[int, str], tuple[str, int, float]] = {}
        self._is_detached = False

    def adopt(self, files: Mapping[str, int]) -> None:
        """Own what earlier processes left under our keys (without their prefix).

        Of two for one place the newer counts: the older was put for a start that never came.
        """
        for key, fd in files.items():
            number, role, put_ms = key.split("/")
            place, new = (int(number), role), (self._prefix + key, fd, int(put_ms) / 1000)
            older, self._left[place] = sorted((self._left.get(place, new), new), key=lambda left: left[2])
            if older is not self._left[place]:
                self.release({older[0]: older[1]})

    async def keep_left(self, number: int, role: str) -> None:
        """Keep what was adopted without a keeper having it; without one that can, it is this process's alone."""
        left = self._left.get((number, role))
        if left is not None and not self._is_detached:
            with contextlib.suppress(HostUnfitError, ResourceExhaustedError):
                await self.keep({left[0]: left[1]})

    def drop(self, number: int) -> None:
        """Release what an earlier process left of a command that it never started."""
        self._release_left([place for place in self._left if place[0] == number])

    def key(self, number: int, role: str) -> str:
        """Of a descriptor that is put now."""
        return f"{self._prefix}{number}/{role}/{round(time.monotonic() * 1000)}"

    async def keep(self, files: Mapping[str, int]) -> None:
        """Keep copies of these; `release` them, also after a failure.  ResourceExhaustedError, HostUnfitError."""
        if self._keeper is not None:
            await self._keeper.put_all(files)

    def release(self, files: Mapping[str, int]) -> None:
        """Keep these no more, and close them."""
        if self._keeper is None or self._is_detached:
            close_all(files.values())
        else:
            self._keeper.release(files)

    def reserve(self) -> None:
        """Hold a place free for what is kept later.  ResourceExhaustedError."""
        if self._keeper is not None:
            self._keeper.reserve()

    def give_back(self) -> None:
        """It is taken now, or not needed."""
        if self._keeper is not None:
            self._keeper.give_back()

    def take(self, number: int, role: str) -> tuple[str, int] | None:
        """A descriptor that an earlier process left, and its key."""
        left = self._left.pop((number, role), None)
        return None if left is None else left[:2]

    def left_since(self, number: int, role: str) -> float | None:
        """When an earlier process put a descriptor that was not taken yet (time.monotonic)."""
        left = self._left.get((number, role))
        return None if left is None else left[2]

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
        self._release_left(list(self._left))

    def _release_left(self, places: Iterable[tuple[int, str]]) -> None:
        self.release({key: fd for key, fd, _ in map(self._left.pop, places)})

    async def close(self) -> None:
        """Dispose of what was never taken, and remove the output: the sandbox is gone."""
        self._release_left(list(self._left))
        if self._spool is not None and self._spool.is_there:
            await asyncio.to_thread(self._spool.remove)


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
        self._ours: dict[str, int] = {}  # by their keys; kept until the command ends
        self._unread: dict[Stream, str] = {}
        self._terminal = -1
        self._has_place = False  # with the keeper, for a terminal that is to come
        self._attached = asyncio.Event()

    async def open(self) -> None:
        """Make the pipes; a terminal comes by `attach`.  ResourceExhaustedError, HostUnfitError."""
        self._keeping.drop(self._number)
        if self._command.tty is not None:
            self._keeping.reserve()
            self._has_place = True
            return
        try:
            if self._command.stdin or self._command.keep_stdin_open:
                theirs, ours = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
                self._write(ours)
            keys = {stream: self._keeping.key(self._number, stream) for stream in self._sinks}
            for key in keys.values():
                self._ours[key], theirs = os.pipe2(os.O_CLOEXEC)
                self.theirs.append(theirs)
            await self._keeping.keep(self._ours)
        except OSError as error:
            self.close()
            raise ResourceExhaustedError(f"no pipes for a command: {error}") from error
        except BaseException:
            self.close()
            raise
        self._unread = keys

    def begin(self) -> None:
        """The command has its ends: begin to read from ours.  What this costs nobody waits for."""
        self.close_theirs()
        for stream, key in self._unread.items():
            self._read(stream, key, self._ours[key])
        if self._command.tty is None:
            self._attached.set()

    def _write(self, fd: int) -> None:
        """What fits into the pipe is with the command already; only a writer that has more to come is kept."""
        self._writer = PipeWriter(fd, self._command.stdin, is_kept_open=self._command.keep_stdin_open)
        if self._writer.is_open:
            self._own_input(self._keeping.key(self._number, "stdin"), fd)

    def _own_input(self, key: str, fd: int) -> None:
        """The command sees its end when nobody has it any more."""
        self._ours[key] = fd
        if self._writer is not None:
            self._writer.dispose = lambda _: self._keeping.release({key: self._ours.pop(key)})

    def _read(self, stream: Stream, key: str, fd: int, *, is_terminal: bool = False) -> None:
        self._ours[key] = fd
        self._readers[stream] = PipeReader(fd, self._sinks[stream], self._keeping.scratch, is_terminal=is_terminal)
        self._readers[stream].dispose = _leave

    async def attach(self, master: int, old_key: str = "") -> None:
        """Take over the command's terminal, and type what it was given to read, which no later process does again.

        `old_key`: under which it was kept until now.
        """
        key = self._keeping.key(self._number, "tty")
        self._ours[key] = master
        old = {old_key: os.dup(master)} if old_key else {}
        self._give_back_place()
        with contextlib.suppress(HostUnfitError, ResourceExhaustedError):  # the command goes on, for as long as we do
            await self._keeping.keep({key: master})
        self._keeping.release(old)
        if key in self._ours:  # it has not ended meanwhile
            self._use_terminal(key, master, self._command.stdin)

    def _give_back_place(self) -> None:
        if self._has_place:
            self._has_place = False
            self._keeping.give_back()

    def _use_terminal(self, key: str, master: int, data: bytes) -> None:
        self._terminal = master
        self._writer = PipeWriter(os.dup(master), data, is_kept_open=True)
        self._read("stdout", key, master, is_terminal=True)
        self._attached.set()

    def resume(self) -> bool:
        """Go on with what an earlier process left; False if not all of `stdin` had reached the command.

        A terminal that it never read comes by `attach`.
        """
        for stream in self._sinks:
            if (kept := self._keeping.take(self._number, stream)) is not None:
                self._read(stream, *kept)
        if (kept := self._keeping.take(self._number, "tty")) is not None:
            self._use_terminal(*kept, b"")
        if (kept := self._keeping.take(self._number, "stdin")) is not None:
            self._writer = PipeWriter(kept[1], is_kept_open=True)
            self._own_input(*kept)
        if self._command.tty is None:
            self._attached.set()
        return self._command.keep_stdin_open or self._command.tty is not None or self._writer is None

    @property
    def lacks_terminal(self) -> bool:
        """Whether its terminal has not come."""
        return not self._attached.is_set()

    async def attached(self) -> None:
        """Wait for the terminal, if it is one."""
        await self._attached.wait()

    def close_theirs(self) -> None:
        """Close the ends that were sent."""
        close_all(self.theirs)
        self.theirs = []

    async def write(self, data: bytes) -> None:
        """See `dsec.sandbox.Process.write_stdin`."""
        await self._attached.wait()
        if self._writer is not None:
            await self._writer.write(data)

    async def end_input(self) -> None:
        """See `dsec.sandbox.Process.close_stdin`."""
        await self._attached.wait()
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
        self._give_back_place()
        if self._writer is not None:
            self._writer.close()
        for reader in self._readers.values():
            reader.close()
        ours, self._ours = self._ours, {}
        if ours:
            self._keeping.release(ours)
        for stream, sink in self._sinks.items():
            self._keeping.end(self._number, stream, sink)
        self._attached.set()


def _leave(_fd: int) -> None:
    """It is closed with the others of its command."""
