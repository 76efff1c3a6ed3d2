"""Output on disk: what a command writes goes into a file, whole up to a limit, and outlives this process.

A pipe is emptied into its file by splice(2): what has left the pipe is in the file, so a killed Edge loses
no byte and its successor goes on where the file ends.  A file is made at the first byte.  Beyond the limit (or a
full disk) a stream is drained into memory, of which the last bytes are kept and all are counted; that
count does not outlive the process: after it the total is a lower bound.

See: dsec/edge/capture.py; docs/architecture.md, "Sandbox".
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
from collections.abc import Container
from pathlib import Path

from dsec.edge.capture import Tail
from dsec.errors import OutOfRangeError
from dsec.types import Output, Stream

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS}
_FILE_BYTES = 4096  # what a file costs beside its bytes
TAIL_BYTES_MIN = 1 << 19
"""Of what is beyond the file: as much as a reader that sets the pace has on its way (`dsec.files.WINDOW_BYTES`)."""
SUFFIXES: dict[Stream, str] = {"stdout": "out", "stderr": "err"}


class SpooledOutput:
    """A stream in a file.  Implements `dsec.edge.capture.Sink`.

    `bytes_max` bounds what `output` gives, `file_bytes_max` the file; an earlier process left `size_bytes` in it.
    """

    def __init__(self, path: str, bytes_max: int, file_bytes_max: int, size_bytes: int = 0) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._file_bytes_max = file_bytes_max
        self._fd = -1
        self._size = size_bytes
        self._beyond = 0
        self._tail = Tail(max(bytes_max // 2, TAIL_BYTES_MIN))

    @property
    def disk_bytes(self) -> int:
        """See `dsec.edge.capture.Sink`."""
        return self._size

    def drain(self, fd: int, scratch: memoryview) -> int:
        """See `dsec.edge.capture.Sink`."""
        room = self._file_bytes_max - self._size
        if self._fd < 0 and is_at_end(fd):
            return 0  # no file for that
        if room > 0:
            try:
                self._open()
                flags = os.SPLICE_F_NONBLOCK
                count = os.splice(fd, self._fd, min(room, len(scratch)), offset_dst=self._size, flags=flags)
            except OSError as error:
                if error.errno not in _FULL and error.errno != errno.EINVAL:
                    raise
                if error.errno in _FULL:
                    self._file_bytes_max = self._size
            else:
                self._size += count
                return count
        count = os.readv(fd, [scratch])  # a terminal cannot be spliced
        self.add(scratch[:count])
        return count

    def add(self, data: memoryview) -> None:
        """Take the next bytes of the stream."""
        room = min(self._file_bytes_max - self._size, len(data))
        try:
            if room > 0:
                self._open()
            while room > 0:
                count = os.pwrite(self._fd, data[:room], self._size)
                self._size, room, data = self._size + count, room - count, data[count:]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._file_bytes_max = self._size
        if data:
            self._beyond += len(data)
            self._tail.add(data)

    def _open(self) -> None:
        if self._fd < 0:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _pread(self, offset: int, count: int) -> bytes:
        if count <= 0:
            return b""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise OutOfRangeError("this output was kept on disk, and has made room for later ones") from error
        try:
            parts = []
            while count > 0 and (part := os.pread(fd, min(count, 1 << 20), offset)):
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def read(self, offset: int, bytes_max: int) -> bytes:
        """See `dsec.edge.capture.Sink`."""
        if offset < self._size:
            return self._pread(offset, min(bytes_max, self._size - offset))
        tail = self._tail.data
        start = self._size + self._beyond - len(tail)
        if offset < start:
            raise OutOfRangeError(f"bytes {offset} to {start - 1} were counted, not kept")
        return tail[offset - start : offset - start + bytes_max]

    def output(self) -> Output:
        """See `dsec.edge.capture.Sink`."""
        total, tail = self._size + self._beyond, self._tail.data
        if total <= self._bytes_max and len(tail) == self._beyond:
            return Output(head=self._pread(0, self._size) + tail)
        tail_bytes_max = self._bytes_max // 2
        head = self._pread(0, min(self._size, self._bytes_max - tail_bytes_max))
        tail = tail[max(0, len(tail) - tail_bytes_max) :]
        if len(tail) == self._beyond:  # the file has what comes before it
            more = min(tail_bytes_max - len(tail), self._size - len(head))
            tail = self._pread(self._size - more, more) + tail
        return Output(head=head, tail=tail, dropped_bytes=total - len(head) - len(tail))

    def close(self) -> None:
        """See `dsec.edge.capture.Sink`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def is_at_end(fd: int) -> bool:
    """Whether a pipe or terminal is empty, and nobody can write to it any more."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    states = [state for _, state in poll.poll(0)]
    return any(state & select.POLLHUP and not state & select.POLLIN for state in states)


def sweep(directory: Path, living: Container[str]) -> None:
    """Remove the output of sandboxes that did not live on; below `directory` each has its own."""
    if directory.exists():
        for place in directory.iterdir():
            if place.name not in living:
                shutil.rmtree(place, ignore_errors=True)


class Spool:
    """The directory of one sandbox's outputs; when they need more than `bytes_max`, the oldest make room.

    No directory is made before the first byte.
    """

    def __init__(self, directory: Path, file_bytes_max: int, bytes_max: int) -> None:
        self._directory = directory
        self._file_bytes_max = file_bytes_max
        self._bytes_max = bytes_max
        self._ended: dict[str, int] = {}
        self._ended_bytes = 0
        if directory.exists():
            for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
                self._add(str(path), path.stat().st_size)

    def open(self, number: int, stream: Stream, bytes_max: int) -> SpooledOutput:
        """The output of command `number`, which goes on if an earlier process began it."""
        path = self._path(number, stream)
        return SpooledOutput(path, bytes_max, self._file_bytes_max, max(0, self._remove(path) - _FILE_BYTES))

    def end(self, number: int, stream: Stream, size_bytes: int) -> None:
        """That output, which has so many bytes on disk, may make room for later ones."""
        if size_bytes > 0:
            self._add(self._path(number, stream), size_bytes)
        while self._ended_bytes > self._bytes_max:
            path = next(iter(self._ended))
            self._remove(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _add(self, path: str, size_bytes: int) -> None:
        self._remove(path)
        self._ended[path] = size_bytes + _FILE_BYTES
        self._ended_bytes += size_bytes + _FILE_BYTES

    def _remove(self, path: str) -> int:
        size_bytes = self._ended.pop(path, 0)
        self._ended_bytes -= size_bytes
        return size_bytes

    @property
    def is_there(self) -> bool:
        """Whether there is anything to `remove`."""
        return self._directory.exists()

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, number: int, stream: Stream) -> str:
        return f"{self._directory}/{number}.{SUFFIXES[stream]}"
