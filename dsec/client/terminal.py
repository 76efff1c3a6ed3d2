"""This process's terminal and streams, lent to a command of a sandbox: `dsec exec`.

Bytes go both ways as they are.  Where the command has a terminal, ours is put into raw mode for as long,
so that ^C and the like are typed into the sandbox, and its size follows ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from dsec.client.commands import CommandHandle, CommandResult
from dsec.errors import DsecError
from dsec.types import Stream, TtySize

STDIN_READ_BYTES_MAX = 64 << 10
_FDS: dict[Stream, int] = {"stdout": 1, "stderr": 2}


class Printed(NamedTuple):
    """How a command ended, and how many bytes of each stream came here."""

    result: CommandResult
    bytes_count: dict[Stream, int]


def terminal_size() -> TtySize:
    """Of the terminal that is our stdin."""
    size = os.get_terminal_size(0)
    return TtySize(size.lines, size.columns)


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """A terminal that passes every key on; as it was, after."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # what was typed ahead is kept
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def write_all(fd: int, data: bytes) -> None:
    """All of it, past Python's buffers and encodings.  BrokenPipeError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


async def print_output(handle: CommandHandle, *, is_quiet: bool = False) -> Printed:
    """Print what a command writes, from its first byte until it ends; with `is_quiet` it is only counted."""
    counts = dict.fromkeys(_FDS, 0)
    async for event in handle.follow():
        if isinstance(event, CommandResult):
            return Printed(event, counts)
        stream, data = event
        if not is_quiet:
            write_all(_FDS[stream], data)
        counts[stream] += len(data)
    raise AssertionError("the output ends with the result")


async def relay(handle: CommandHandle, *, feeds_stdin: bool, has_tty: bool, is_quiet: bool = False) -> Printed:
    """Pass everything on until the command ends; with `is_quiet` its output is left out.

    A cancelled relay, or one whose stdout nobody reads any more, kills the command.
    """
    async with contextlib.AsyncExitStack() as stack:
        if feeds_stdin:
            stack.push_async_callback(_stopped, asyncio.create_task(_feed(handle)))
        if has_tty:
            stack.enter_context(raw_mode(0))
            stack.enter_context(_followed_size(handle))
        try:
            return await print_output(handle, is_quiet=is_quiet)
        except (asyncio.CancelledError, BrokenPipeError):
            await asyncio.shield(handle.kill())
            raise


async def _feed(handle: CommandHandle) -> None:
    """Our stdin to its end; a command that ends first, or reads no more, is no error."""
    with contextlib.suppress(DsecError):
        async for data in read_stdin():
            await handle.send_stdin(data)
        await handle.close_stdin()


async def read_stdin() -> AsyncIterator[bytes]:
    """Our stdin as it comes, whatever it is: a terminal, a pipe, or a file, which no event loop can wait for."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()

    def tell() -> None:
        loop.remove_reader(0)  # told twice, the second read might find nothing and wait, and all else with it
        readable.set()

    try:
        while True:
            try:
                loop.add_reader(0, tell)
                await readable.wait()
                readable.clear()
            except PermissionError:  # epoll takes no regular file, and a regular file never blocks
                pass
            data = os.read(0, STDIN_READ_BYTES_MAX)
            if not data:
                return
            yield data
    finally:
        loop.remove_reader(0)


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def _followed_size(handle: CommandHandle) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    resizes: set[asyncio.Task[None]] = set()

    def resize() -> None:
        size = terminal_size()
        task = loop.create_task(handle.resize(size.rows, size.columns))
        resizes.add(task)
        task.add_done_callback(_forget)

    def _forget(task: asyncio.Task[None]) -> None:
        resizes.discard(task)
        task.exception()  # the command has ended: there is nothing to resize

    loop.add_signal_handler(signal.SIGWINCH, resize)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
        for task in resizes:
            task.cancel()
