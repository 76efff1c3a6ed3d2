"""The bytes of a file as the blocks that are not all zero: read, compared and written as such.

Holes and written zeros read the same, so they must be the same to a digest; and a sandbox can make a
file of exabytes that is one hole, which nobody may read through.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator

from dsec.errors import InvalidArgumentError

BLOCK_BYTES = 256 << 10
_ZEROS = bytes(BLOCK_BYTES)

Blocks = Iterator[tuple[int, bytes]]
"""Offset and bytes of each block that is not all zero, in order."""


def of_file(fd: int, size: int) -> Blocks:
    """The blocks of an open file that has exactly `size` bytes.  InvalidArgumentError if it turns out shorter."""
    offset = _next_data(fd, 0)
    while offset < size:
        offset -= offset % BLOCK_BYTES
        wanted = min(BLOCK_BYTES, size - offset)
        block = os.pread(fd, wanted, offset)
        if len(block) != wanted:
            raise InvalidArgumentError("a file changed while it was read")
        if not _is_zero(block):
            yield offset, block
        offset = _next_data(fd, offset + wanted)


def of_stream(read: Callable[[int], bytes], size: int) -> Blocks:
    """The blocks of the next `size` bytes of a stream.  InvalidArgumentError if it ends before."""
    offset = 0
    while offset < size:
        block = read(min(BLOCK_BYTES, size - offset))
        if len(block) != min(BLOCK_BYTES, size - offset):
            raise InvalidArgumentError("an archive ends in the middle of a file")
        if not _is_zero(block):
            yield offset, block
        offset += len(block)


def digest(blocks: Blocks) -> bytes:
    """Of a file's content; equal for equal bytes, whatever is a hole."""
    state = hashlib.sha256()
    for offset, block in blocks:
        update(state, offset, block)
    return state.digest()


def update(state: hashlib._Hash, offset: int, block: bytes) -> None:
    """Take one block into a digest."""
    state.update(offset.to_bytes(8, "little"))
    state.update(block)


def _is_zero(block: bytes) -> bool:
    return block == (_ZEROS if len(block) == BLOCK_BYTES else bytes(len(block)))


def _next_data(fd: int, offset: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return 1 << 63
        raise
