"""What both ways of asking an Edge share, over a connection and in its own process: keys, and output beyond an answer.

Every command gets a key, so that a request that is made again runs nothing twice.  The Edge's record of a
result is bounded; what of the output a command asked to keep is read after.

See: dsec/client/substrate.py, dsec/edge/local.py.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable

import msgspec

from dsec.errors import OutcomeUnknownError, OutOfRangeError
from dsec.sandbox import Process
from dsec.types import Command, ExecResult, Output, Stream
from dsec.views import CommandView

_NUMBER = "number-"


def fresh_name() -> str:
    """A key or request id that nobody used before: 80 random bits, short enough for a table."""
    return base64.b32encode(os.urandom(10)).decode().lower()


def key_of(number: int | None) -> str:
    """The key of a command whose caller gave it a number; without one, a key that nobody used before."""
    return fresh_name() if number is None else f"{_NUMBER}{number}"


def find_command(views: Iterable[CommandView], number: int) -> CommandView | None:
    """The one that was started under `number`.  OutcomeUnknownError.

    That number is the caller's, and in the key; only where the caller gave none is it the Edge's own.
    """
    found = None
    for view in views:
        if view.key == key_of(number):
            found = view
            break
        if view.number == number and not view.key.startswith(_NUMBER):
            found = view
    if found is not None and found.state == "unknown":
        raise OutcomeUnknownError(f"command {number}: nobody knows how it ended")
    return found


async def complete(result: ExecResult, process: Process, command: Command) -> ExecResult:
    """The result with as much output as the command asked to keep."""
    bytes_max = command.output_bytes_max
    return msgspec.structs.replace(
        result,
        stdout=await _complete(result.stdout, process, "stdout", bytes_max),
        stderr=await _complete(result.stderr, process, "stderr", bytes_max),
    )


async def _complete(output: Output, process: Process, stream: Stream, bytes_max: int) -> Output:
    if not output.dropped_bytes or len(output.data) >= bytes_max:
        return output
    total = output.total_bytes
    tail_start = total - len(output.tail)
    try:
        if total <= bytes_max:
            return Output(output.head + await _between(process, stream, len(output.head), tail_start) + output.tail)
        head = output.head + await _between(process, stream, len(output.head), bytes_max - bytes_max // 2)
        tail = await _between(process, stream, total - bytes_max // 2, tail_start) + output.tail
    except OutOfRangeError:
        return output
    return Output(head, tail, total - len(head) - len(tail))


async def _between(process: Process, stream: Stream, start: int, end: int) -> bytes:
    data = bytearray()
    while start + len(data) < end:
        chunk = await process.read_output(stream, start + len(data), end - start - len(data))
        if not chunk:
            raise OutOfRangeError(f"{stream} ends before byte {end}")
        data += chunk
    return bytes(data)
