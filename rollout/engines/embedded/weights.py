"""The weights file in memory, as `v4_create` and its checks take it: mapped, and copied only where it must be.

A tensor of one bf16 piece is read where it lies, if that is aligned.  Experts that are tensors of their own are put
together, and F32 tensors, which trainers write of what they keep in full precision, become bf16 where that changes no
value.

See: `tensors.py`, checkpoint/README.md, "Weights".
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rollout.engines.embedded.tensors import Piece, Tensor
from rollout.errors import EngineError

Stamp = tuple[int, int, int, int]
"""What is another after a file was written to, cut short or replaced."""


def stamp_of(file: BinaryIO) -> Stamp:
    """Of an open file."""
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@contextmanager
def mapped(path: Path, tensors: Sequence[Tensor | None], stamp: Stamp) -> Iterator[list[int | None]]:
    """The addresses of the tensors' bytes, while the context lasts.

    EngineError names the file: it cannot be read, or is not, or at the end no longer, what `stamp` is of.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise EngineError(f"{path}: cannot be mapped: {error}") from error
    with file:
        _check_unchanged(path, file, stamp)
        # copy-on-write: ctypes takes addresses only of writable buffers, and nothing writes here
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        anchor = ctypes.c_char.from_buffer(data)
        copies: list[ctypes.Array[ctypes.c_char]] = []
        try:
            base = ctypes.addressof(anchor)
            yield [None if tensor is None else _address(path, data, base, tensor, copies) for tensor in tensors]
            _check_unchanged(path, file, stamp)
        finally:
            del anchor
            data.close()


def _check_unchanged(path: Path, file: BinaryIO, stamp: Stamp) -> None:
    if stamp_of(file) != stamp:
        raise EngineError(f"{path}: was written to while it was loaded; write it under another name, then rename it")


def _address(path: Path, data: mmap.mmap, base: int, tensor: Tensor, copies: list[ctypes.Array[ctypes.c_char]]) -> int:
    """Where a tensor lies; what it had to be copied to is added to `copies`."""
    first = tensor.pieces[0]
    if len(tensor.pieces) == 1 and first.dtype != "F32" and first.begin % 8 == 0:
        return base + first.begin
    joined = b"".join(_bf16(path, tensor.name, data, piece) for piece in tensor.pieces)
    copies.append((ctypes.c_char * len(joined)).from_buffer_copy(joined))
    return ctypes.addressof(copies[-1])


def _bf16(path: Path, name: str, data: mmap.mmap, piece: Piece) -> bytes:
    """A bf16 is the upper half of a little-endian F32."""
    content = data[piece.begin : piece.end]
    if piece.dtype != "F32":
        return content
    halves = memoryview(content).cast("H")
    if any(halves[::2]):
        raise EngineError(f"{path}: tensor {name} is F32 and holds values that bf16 cannot: save it in bfloat16")
    return halves[1::2].tobytes()
