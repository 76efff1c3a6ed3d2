"""The weights file in memory, as `v4_create` and its checks take it.

It is read, not mapped: a file that is cut short under a mapping ends the process, by SIGBUS; here it is an error.  A
tensor of one bf16 piece is taken where it lies, if that is aligned.  Experts that are tensors of their own are put
together, and F32 tensors, which trainers write of what they keep in full precision, become bf16 where that changes no
value.

See: `tensors.py`, checkpoint/README.md, "Weights".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rollout.engines.embedded.tensors import Piece, Tensor
from rollout.errors import EngineError

Stamp = tuple[int, int, int, int]
"""What is another after a file was written to, cut short or replaced."""


def read_weights(path: Path, expected: Stamp | None = None) -> tuple[bytearray, Stamp]:
    """The whole file and its stamp.  EngineError: it cannot be read, is written to, or is not what was expected."""
    try:
        with path.open("rb") as file:
            stamp = _stamp_of(file)
            data = bytearray(stamp[2])
            is_whole = file.readinto(data) == len(data) and stamp == (expected or stamp) == _stamp_of(file)
    except (OSError, MemoryError) as error:
        raise EngineError(f"{path}: cannot be read: {str(error) or 'out of memory'}") from error
    if not is_whole:
        raise EngineError(f"{path}: was written to while it was loaded; write it under another name, then rename it")
    return data, stamp


def _stamp_of(file: BinaryIO) -> Stamp:
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@contextmanager
def loaded(path: Path, tensors: Sequence[Tensor | None], stamp: Stamp) -> Iterator[list[int | None]]:
    """The addresses of the tensors' bytes, while the context lasts.  EngineError as `read_weights`."""
    data, _ = read_weights(path, stamp)
    base = ctypes.addressof(ctypes.c_char.from_buffer(data))
    copies: list[ctypes.Array[ctypes.c_char]] = []
    try:
        addresses = [None if tensor is None else _address(path, data, base, tensor, copies) for tensor in tensors]
    except MemoryError as error:
        raise EngineError(f"{path}: cannot be read: out of memory") from error
    yield addresses


def _address(path: Path, data: bytearray, base: int, tensor: Tensor, copies: list[ctypes.Array[ctypes.c_char]]) -> int:
    """Where a tensor lies; what it had to be copied to is added to `copies`."""
    first = tensor.pieces[0]
    if len(tensor.pieces) == 1 and first.dtype != "F32" and first.begin % 8 == 0:
        return base + first.begin
    joined = b"".join(_bf16(path, tensor.name, data, piece) for piece in tensor.pieces)
    copies.append((ctypes.c_char * len(joined)).from_buffer_copy(joined))
    return ctypes.addressof(copies[-1])


def _bf16(path: Path, name: str, data: bytearray, piece: Piece) -> bytes:
    """A bf16 is the upper half of a little-endian F32."""
    content = bytes(memoryview(data)[piece.begin : piece.end])
    if piece.dtype != "F32":
        return content
    halves = memoryview(content).cast("H")
    if any(halves[::2]):
        raise EngineError(f"{path}: tensor {name} is F32 and holds values that bf16 cannot: save it in bfloat16")
    return halves[1::2].tobytes()
