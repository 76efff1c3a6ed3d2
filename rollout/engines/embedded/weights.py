"""The weights file in memory, as `v4_create` and its checks take it: mapped, and copied only where it must be.

A tensor of one bf16 piece is read where it lies, if that is aligned.  Experts that are tensors of their own are put
together, and F32 tensors, which trainers write of what they keep in full precision, become bf16 where that changes no
value.

See: `tensors.py`, checkpoint/README.md, "Weights".
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rollout.engines.embedded.tensors import Piece, Tensor
from rollout.errors import EngineError


@contextmanager
def mapped(path: Path, tensors: Sequence[Tensor | None]) -> Iterator[list[int | None]]:
    """The addresses of the tensors' bytes, while the context lasts.  EngineError names the file."""
    try:
        with path.open("rb") as file:
            # copy-on-write: ctypes takes addresses only of writable buffers, and nothing writes here
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be mapped: {error}") from error
    anchor = ctypes.c_char.from_buffer(data)
    base = ctypes.addressof(anchor)
    copies: list[ctypes.Array[ctypes.c_char]] = []

    def address(tensor: Tensor) -> int:
        first = tensor.pieces[0]
        if len(tensor.pieces) == 1 and first.dtype != "F32" and first.begin % 8 == 0:
            return base + first.begin
        joined = b"".join(_bf16(path, tensor.name, data, piece) for piece in tensor.pieces)
        copies.append((ctypes.c_char * len(joined)).from_buffer_copy(joined))
        return ctypes.addressof(copies[-1])

    try:
        yield [None if tensor is None else address(tensor) for tensor in tensors]
    finally:
        del anchor
        data.close()


def _bf16(path: Path, name: str, data: mmap.mmap, piece: Piece) -> bytes:
    """A bf16 is the upper half of a little-endian F32."""
    content = data[piece.begin : piece.end]
    if piece.dtype != "F32":
        return content
    halves = memoryview(content).cast("H")
    if any(halves[::2]):
        raise EngineError(f"{path}: tensor {name} is F32 and holds values that bf16 cannot: save it in bfloat16")
    return halves[1::2].tobytes()
