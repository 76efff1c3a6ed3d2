"""Stretches of files as streams, decompressed and bounded, with the digest of what passed.

`zstd` runs as a program of its own, fed by a thread: Python 3.11 cannot read that format.

See: docs/formats/layers.md, "Images".
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, cast

from dsec.archive import Stream
from dsec.errors import HostUnfitError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COPY_BYTES = 1 << 20


class Section(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, whatever else reads it."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = fd
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer)[: self._end - self._position]
        count = os.preadv(self._fd, [view], self._position) if view else 0
        self._position += count
        return count

    def skip(self, count: int) -> None:
        """Go on by `count` bytes without reading them."""
        self._position = min(self._position + count, self._end)

    def digest(self, algorithm: str) -> str:
        """Of all that is left, in hex digits."""
        state = hashlib.new(algorithm)
        while block := self.read(_COPY_BYTES):
            state.update(block)
        return state.hexdigest()


@contextlib.contextmanager
def unpacked(section: Section, bytes_max: int) -> Iterator[Stream]:
    """The section without its compression (gzip, zstd or none, told by its first bytes)."""
    buffered = io.BufferedReader(section, _COPY_BYTES)
    magic = buffered.peek(4)[:4]
    if magic == _ZSTD:
        with _unzstd(buffered) as read:
            yield Stream(read, bytes_max, is_packed=True)
    elif magic[:2] == _GZIP:
        with gzip.GzipFile(fileobj=buffered) as unzipped:
            yield Stream(unzipped.read, bytes_max, is_packed=True)
    else:
        yield Stream(buffered.read, bytes_max)


@contextlib.contextmanager
def _unzstd(source: io.BufferedReader[Section]) -> Iterator[Callable[[int], bytes]]:
    try:
        program = subprocess.Popen(
            ["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise HostUnfitError("the program zstd is missing (apt-get install zstd)") from error
    feed, output = cast("IO[bytes]", program.stdin), cast("IO[bytes]", program.stdout)
    feeder = threading.Thread(target=_feed, args=(source, feed))
    feeder.start()

    def read(count: int) -> bytes:
        block = output.read(count)
        if not block and program.wait() != 0:
            raise EOFError("zstd finds it damaged")
        return block

    try:
        yield read
    finally:
        program.kill()
        program.wait()
        feeder.join()
        output.close()


def _feed(source: io.BufferedReader[Section], target: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError), target:
        while block := source.read(_COPY_BYTES):
            target.write(block)
