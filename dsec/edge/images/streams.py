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
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, cast

from dsec.errors import HostUnfitError, InvalidArgumentError, ResourceExhaustedError

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


class Stream:
    """Bytes in order, no more than `bytes_max` of them, and their sha256.

    `is_packed`: they come out of a decompressor.  With `skip`, skipped bytes are neither read nor in the sha256.
    """

    def __init__(
        self,
        read: Callable[[int], bytes | None],
        bytes_max: int,
        *,
        is_packed: bool = False,
        skip: Callable[[int], None] | None = None,
    ) -> None:
        self.is_packed = is_packed
        self._read = read
        self._bytes_max = bytes_max
        self._skip = skip
        self._state = hashlib.sha256()
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end.

        InvalidArgumentError for damaged compression, ResourceExhaustedError beyond the bound.
        """
        taken = []
        while count:
            try:
                block = self._read(min(count, _COPY_BYTES))
            except (OSError, EOFError, zlib.error) as error:
                raise InvalidArgumentError(f"an archive cannot be read: {error}") from error
            if not block:
                break
            self._state.update(block)
            taken.append(block)
            count -= len(block)
            self.position += len(block)
            if self.position > self._bytes_max:
                raise ResourceExhaustedError(f"an archive unpacks to more than {self._bytes_max} bytes")
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def skip(self, count: int) -> None:
        """Go on by `count` bytes, or to the end."""
        if self._skip is not None:
            self._skip(count)
            self.position += count
            return
        while count > 0 and (block := self.take(min(count, _COPY_BYTES))):
            count -= len(block)

    @property
    def digest(self) -> str:
        """The sha256 of what was taken, in hex digits."""
        return self._state.hexdigest()


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
