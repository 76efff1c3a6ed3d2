"""A command's streams: output drained into a sink, input fed without blocking.

Everything is drained, however much a command writes, in reads of at most a megabyte, one for each turn
of the event loop, so that a flood costs neither memory nor the other sandboxes' turn.  A sink keeps
what it may: `OutputBuffer` the first and the last half of `bytes_max` in memory, dsec/edge/spool.py the whole
on disk.  Nothing is dropped while the output fits.

Invariants:
    1. len(head) + dropped_bytes + len(tail) is the number of bytes read.
    2. At most 2 * bytes_max bytes are held in memory for a stream.

See: docs/architecture.md, "Sandbox".
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import termios
from collections.abc import Callable
from typing import Protocol

from dsec.errors import OutOfRangeError
from dsec.types import Output

READ_BYTES_MAX = 1 << 20
PIPE_BYTES_LARGE = 1 << 20
TERMINAL_BYTES_MAX = 1 << 17
"""More than the kernel holds for a terminal."""
END_OF_TRANSMISSION = b"\4"
_F_SETPIPE_SZ = 1031

Dispose = Callable[[int], None]
"""What closes a descriptor."""


class Sink(Protocol):
    """Where the bytes of a stream go."""

    def drain(self, fd: int, scratch: memoryview) -> int:
        """Take what lies in `fd`, at most len(scratch) bytes; how many, 0 at its end.  OSError of `fd`."""
        ...

    def read(self, offset: int, bytes_max: int) -> bytes:
        """Bytes from `offset` on; b"" if none came there yet.  OutOfRangeError if they were dropped."""
        ...

    def output(self) -> Output:
        """What was kept so far."""
        ...

    def close(self) -> None:
        """No more comes; reading goes on.  Safe to call twice."""
        ...

    @property
    def disk_bytes(self) -> int:
        """How much of it lies on disk."""
        ...


class Tail:
    """The last `bytes_max` bytes of what was added."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._kept = bytearray()

    def add(self, data: memoryview | bytes) -> None:
        """Take the next bytes."""
        limit = self._bytes_max
        if len(data) >= limit:
            self._kept[:] = data[len(data) - limit :]
            return
        self._kept += data
        if len(self._kept) > 2 * limit:
            del self._kept[: len(self._kept) - limit]

    @property
    def data(self) -> bytes:
        """What is kept."""
        return bytes(self._kept[max(0, len(self._kept) - self._bytes_max) :])


class OutputBuffer:
    """Head, tail and count of a stream, in memory."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._tail_bytes_max = bytes_max // 2
        self._head = bytearray()
        self._tail = Tail(self._tail_bytes_max)
        self._total = 0

    def add(self, data: memoryview | bytes) -> None:
        """Take the next bytes of the stream."""
        total_before, self._total = self._total, self._total + len(data)
        if self._total <= self._bytes_max:
            self._head += data
            return
        if total_before <= self._bytes_max:
            head_bytes = self._bytes_max - self._tail_bytes_max
            room = max(0, head_bytes - len(self._head))
            self._head += data[:room]
            data = data[room:]
            self._tail.add(bytes(self._head[head_bytes:]))
            del self._head[head_bytes:]
        self._tail.add(data)

    def drain(self, fd: int, scratch: memoryview) -> int:
        """See `Sink`."""
        count = os.readv(fd, [scratch])
        self.add(scratch[:count])
        return count

    def read(self, offset: int, bytes_max: int) -> bytes:
        """See `Sink`."""
        if offset < len(self._head):
            return bytes(self._head[offset : offset + bytes_max])
        tail = self._tail.data
        start = self._total - len(tail)
        if offset < start:
            raise OutOfRangeError(f"bytes {offset} to {start - 1} were counted, not kept")
        return tail[offset - start : offset - start + bytes_max]

    def output(self) -> Output:
        """See `Sink`."""
        head, tail = bytes(self._head), self._tail.data
        return Output(head=head, tail=tail, dropped_bytes=self._total - len(head) - len(tail))

    def close(self) -> None:
        """See `Sink`."""

    @property
    def disk_bytes(self) -> int:
        """See `Sink`."""
        return 0


class PipeReader:
    """Drains a pipe, or the master of a terminal, into a sink from the event loop, until its end or `finish`.

    Takes ownership of `fd`, and gives it to `dispose` at the end.  `scratch` is shared by all readers of a loop: a
    read is used up at once.
    """

    def __init__(self, fd: int, sink: Sink, scratch: bytearray, *, is_terminal: bool = False) -> None:
        self.dispose: Dispose = os.close
        self._fd = fd
        self._sink = sink
        self._scratch = memoryview(scratch)
        self._is_terminal = is_terminal
        self._is_large = is_terminal
        self._loop = asyncio.get_running_loop()
        self._waiting: list[asyncio.Future[None]] = []
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    @property
    def is_open(self) -> bool:
        """False after the end of the pipe."""
        return self._fd >= 0

    async def read(self, offset: int, bytes_max: int) -> bytes:
        """Output from `offset` on, once there is some; b"" at the end.  OutOfRangeError."""
        while not (data := self._sink.read(offset, bytes_max)) and self.is_open and bytes_max > 0:
            waiting = self._loop.create_future()
            self._waiting.append(waiting)
            await waiting
        return data

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _drain(self, bytes_max: int) -> int:
        """How much came; 0 at the end, -1 if nothing lies there."""
        try:
            count = self._sink.drain(self._fd, self._scratch[:bytes_max])
        except BlockingIOError:
            return -1
        except OSError as error:
            if not self._is_terminal or error.errno != errno.EIO:
                raise
            return 0  # nobody has the terminal open any more
        return count

    def _read(self) -> None:
        count = self._drain(READ_BYTES_MAX)
        if count == 0:
            self.close()
        elif count > 0:
            self._wake()
        if count >= 65536 and not self._is_large:
            self._is_large = True
            self._enlarge()

    def _enlarge(self) -> None:
        """A command that fills its pipe gets a larger one: sixteen times fewer turns of the loop."""
        with contextlib.suppress(PermissionError):  # the host's pipe memory is used up: slower, not wrong
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, PIPE_BYTES_LARGE)

    def finish(self) -> Output:
        """Take what lies in the pipe now, close it, and give what was kept.

        A background child that still holds the pipe may write for ever, so this takes what is
        there at the call and no more.
        """
        if self._fd >= 0:
            waiting = array.array("i", [TERMINAL_BYTES_MAX])
            if not self._is_terminal:
                fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
            left = waiting[0]
            while left > 0 and (count := self._drain(min(left, READ_BYTES_MAX))) > 0:
                left -= count
        self.close()
        return self._sink.output()

    def close(self) -> None:
        """Stop reading; safe to call twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self.dispose(self._fd)
            self._fd = -1
            self._sink.close()
            self._wake()


class PipeWriter:
    """Feeds a pipe, or the master of a terminal, from the event loop.  Takes ownership of `fd`.

    `data` comes first; then the pipe is closed, unless it `is_kept_open` for `write` until `end`.  A command that
    closes its stdin early is no error: the rest is discarded.
    """

    def __init__(self, fd: int, data: bytes = b"", *, is_kept_open: bool = False) -> None:
        self.dispose: Dispose = os.close
        self._fd = fd
        self._rest = memoryview(data)
        self._is_kept_open = is_kept_open
        self._order = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._empty: asyncio.Future[None] | None = None
        os.set_blocking(fd, False)
        self._push()

    @property
    def is_open(self) -> bool:
        """False once the other end sees the end of the pipe, or has closed it."""
        return self._fd >= 0

    async def write(self, data: bytes) -> None:
        """Return when `data` is in the pipe, or nobody reads any more."""
        async with self._order:
            await self._until_empty()
            if self._fd >= 0:
                self._rest = memoryview(data)
                self._push()
                await self._until_empty()

    async def end(self) -> None:
        """Close the pipe after all that was written."""
        async with self._order:
            await self._until_empty()
            self.close()

    async def _until_empty(self) -> None:
        while self._rest and self._fd >= 0:
            self._empty = self._empty or self._loop.create_future()
            await asyncio.shield(self._empty)

    def _push(self) -> None:
        """Write what fits, a megabyte at most, and come back for the rest."""
        try:
            if self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest[:READ_BYTES_MAX]) :]
        except BlockingIOError:
            pass
        except OSError:  # EPIPE, or EIO of a terminal: nobody reads
            self.close()
            return
        if self._rest:
            self._loop.add_writer(self._fd, self._push)
            return
        self._loop.remove_writer(self._fd)
        self._tell_empty()
        if not self._is_kept_open:
            self.close()

    def _tell_empty(self) -> None:
        if self._empty is not None:
            self._empty.set_result(None)
            self._empty = None

    def close(self) -> None:
        """Stop feeding; the command sees end of file.  Safe to call twice."""
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            self.dispose(self._fd)
            self._fd = -1
            self._rest = memoryview(b"")
            self._tell_empty()
