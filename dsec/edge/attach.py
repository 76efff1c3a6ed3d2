"""The output of a command as it comes, both streams in one, and its result at the end.

Whoever attaches reads at their own pace: the command writes to its spool, and a slow reader stalls nobody.

Invariant: the chunks of a stream come in order, and leave out only bytes that were not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import msgspec

from dsec.errors import OutOfRangeError
from dsec.types import ExecResult, Output, Stream

CHUNK_BYTES_MAX = 256 << 10


class Chunk(msgspec.Struct, frozen=True):
    """Some bytes of one stream, and where they stand in it."""

    stream: Stream
    offset: int
    data: bytes


class Reading(Protocol):
    """What the Edge offers of a command that was started."""

    async def wait(self, sandbox_id: str, key: str) -> ExecResult:
        """Its result."""
        ...

    async def read_output(self, sandbox_id: str, key: str, stream: Stream, offset: int, bytes_max: int) -> bytes:
        """As `dsec.sandbox.Process.read_output`."""
        ...


async def attach(
    edge: Reading, sandbox_id: str, key: str, offsets: dict[Stream, int], put: Callable[[Chunk], Awaitable[None]]
) -> ExecResult:
    """Put the output from `offsets` on as it comes, one chunk at a time, then give the result.

    Raises what reading and waiting raise.  A stream that was not kept whole goes on with its tail.
    """
    lock = asyncio.Lock()

    async def follow(stream: Stream) -> None:
        with contextlib.suppress(OutOfRangeError):
            while data := await edge.read_output(sandbox_id, key, stream, offsets[stream], CHUNK_BYTES_MAX):
                async with lock:
                    await put(Chunk(stream, offsets[stream], data))
                offsets[stream] += len(data)

    try:
        async with asyncio.TaskGroup() as tasks:
            for stream in offsets:
                tasks.create_task(follow(stream))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    result = await edge.wait(sandbox_id, key)
    outputs: dict[Stream, Output] = {"stdout": result.stdout, "stderr": result.stderr}
    for stream, offset in offsets.items():
        for chunk in rest_of(outputs[stream], stream, offset):
            await put(chunk)
    return result


def rest_of(output: Output, stream: Stream, offset: int) -> Iterator[Chunk]:
    """What a result kept of a stream from `offset` on."""
    for start, data in ((0, output.head), (len(output.head) + output.dropped_bytes, output.tail)):
        if offset < start + len(data):
            seen = max(0, offset - start)
            yield Chunk(stream, start + seen, data[seen:])
