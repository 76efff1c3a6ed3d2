"""Reading archives that somebody else made: tar streams, bounded, one pass, with nothing unpacked.

`tarfile` reads the headers and nothing else; it never sees a path of this machine.  An archive is hostile: its
paths are taken apart by name, its sizes are bounded, its damage is an error and no early end.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

from dsec.errors import InvalidArgumentError, ResourceExhaustedError

HEADER_BYTES_MAX = 1 << 20
NAME_BYTES_MAX = 255
DEPTH_MAX = 256
_COPY_BYTES = 1 << 20


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


class _Headers:
    """A stream as `tarfile` wants a file: it reads headers, and seeks over what it takes for data."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.last = b""

    def read(self, count: int) -> bytes:
        if not 0 <= count <= HEADER_BYTES_MAX:
            raise InvalidArgumentError(f"an archive's header of {count} bytes")
        self.last = self._stream.take(count)
        return self.last

    def tell(self) -> int:
        return self._stream.position

    def seek(self, position: int) -> None:
        if position < self._stream.position:
            raise InvalidArgumentError("an archive's sizes contradict each other")
        self._stream.skip(position - self._stream.position)


class _Archive(tarfile.TarFile):
    """By its constructor, which unlike `open` tries no compression; `members` is where it would keep every header."""

    members: list[tarfile.TarInfo]


def members(stream: Stream) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar stream, to its very end; what of an entry's data is not taken is skipped.

    InvalidArgumentError for anything that is no tar.
    """
    headers = _Headers(stream)
    try:
        archive = _Archive(fileobj=cast("IO[bytes]", headers), encoding="utf-8", errors="surrogateescape")
        while (member := archive.next()) is not None:
            archive.members.clear()
            yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"not a tar archive, or a damaged one: {error}") from error
    if any(headers.last):  # `tarfile` takes a broken header for the end; the end is zeros
        raise InvalidArgumentError(f"a damaged tar archive: no header at byte {stream.position - len(headers.last)}")
    while padding := stream.take(HEADER_BYTES_MAX):
        if padding != bytes(len(padding)):
            raise InvalidArgumentError("a damaged tar archive: something follows its end")


def parts(path: bytes) -> tuple[bytes, ...]:
    """The names in a path; a leading slash and `.` mean nothing.  InvalidArgumentError for `..` and the like."""
    names = tuple(name for name in path.split(b"/") if name not in {b"", b"."})
    if b".." in names or b"\0" in path or any(len(name) > NAME_BYTES_MAX for name in names):
        raise InvalidArgumentError(f"a path that no layer can have: {path[:200]!r}")
    if len(names) > DEPTH_MAX:
        raise InvalidArgumentError(f"a path of more than {DEPTH_MAX} names: {path[:200]!r}")
    return names
