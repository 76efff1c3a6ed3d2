"""A command's pipes: output kept within a bound, input fed without blocking.

Everything is drained, however much a command writes, in reads of at most a megabyte, one for each turn
of the event loop, so that a flood costs neither memory nor the other sandboxes' turn.  Kept are
the first and the last half of `bytes_max`; nothing is dropped while the output fits.

Invariants:
    1. len(head) + dropped_bytes + len(tail) is the number of bytes read.
    2. At most 2 * bytes_max bytes are held for a stream.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import termios

from dsec.types import Output

READ_BYTES_MAX = 1 << 20
PIPE_BYTES_LARGE = 1 << 20
_F_SETPIPE_SZ = 1031


class OutputBuffer:
    """Head, tail and count of a stream."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._tail_bytes_max = bytes_max // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._total = 0

    def add(self, data: memoryview) -> None:
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
            self._tail += self._head[head_bytes:]
            del self._head[head_bytes:]
        self._add_tail(data)

    def _add_tail(self, data: memoryview) -> None:
        limit = self._tail_bytes_max
        if len(data) >= limit:
            self._tail[:] = data[len(data) - limit :]
            return
        self._tail += data
        if len(self._tail) > 2 * limit:
            del self._tail[: len(self._tail) - limit]

    def output(self) -> Output:
        """What was kept so far."""
        tail = bytes(self._tail[max(0, len(self._tail) - self._tail_bytes_max) :])
        head = bytes(self._head)
        return Output(head=head, tail=tail, dropped_bytes=self._total - len(head) - len(tail))


class PipeReader:
    """Reads a pipe into a buffer from the event loop until its end, or until `finish`.

    Takes ownership of `fd`.  `scratch` is shared by all readers of a loop: a read is used up at once.
    """

    def __init__(self, fd: int, buffer: OutputBuffer, scratch: bytearray) -> None:
        self._fd = fd
        self._buffer = buffer
        self._scratch = memoryview(scratch)
        self._is_large = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    @property
    def is_open(self) -> bool:
        """False after the end of the pipe."""
        return self._fd >= 0

    def _read(self) -> None:
        try:
            count = os.readv(self._fd, [self._scratch])
        except BlockingIOError:
            return
        if count == 0:
            self.close()
            return
        self._buffer.add(self._scratch[:count])
        if count >= 65536 and not self._is_large:
            self._is_large = True
            self._enlarge()

    def _enlarge(self) -> None:
        """A command that fills its pipe gets a larger one: sixteen times fewer turns of the loop."""
        try:
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, PIPE_BYTES_LARGE)
        except PermissionError:
            return  # the host's pipe memory is used up: slower, not wrong

    def finish(self) -> Output:
        """Take what lies in the pipe now, close it, and give what was kept.

        A background child that still holds the pipe may write for ever, so this takes what is
        there at the call and no more.
        """
        if self._fd >= 0:
            waiting = array.array("i", [0])
            fcntl.ioctl(self._fd, termios.FIONREAD, waiting)
            left = waiting[0]
            while left > 0 and self._fd >= 0:
                count = os.readv(self._fd, [self._scratch[: min(left, READ_BYTES_MAX)]])
                self._buffer.add(self._scratch[:count])
                left -= count
            self.close()
        return self._buffer.output()

    def close(self) -> None:
        """Stop reading; safe to call twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class PipeWriter:
    """Feeds `data` into a pipe from the event loop, then closes it.  Takes ownership of `fd`.

    A command that closes its stdin early is no error: the rest is discarded.
    """

    def __init__(self, fd: int, data: bytes) -> None:
        self._fd = fd
        self._rest = memoryview(data)
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._write()
        if self._fd >= 0:
            self._loop.add_writer(fd, self._write)

    @property
    def is_open(self) -> bool:
        """False after the end of the pipe."""
        return self._fd >= 0

    def _write(self) -> None:
        try:
            count = os.write(self._fd, self._rest[:READ_BYTES_MAX])
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.close()
            return
        self._rest = self._rest[count:]
        if not self._rest:
            self.close()

    def close(self) -> None:
        """Stop feeding; the command sees end of file.  Safe to call twice."""
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
