"""Files of a sandbox: read, written, listed, watched, and moved as whole trees, by commands inside of it.

Every operation is a command of the sandbox's toolbox (dsec/native/toolbox.h), or its own `tar`, and runs as a user of
the sandbox in its root: what a path or an archive can reach is what that user can.  Nothing is unpacked or
resolved on this side.  Contents travel in pieces that a reader asks for, so a file may be as large as its disk.

Failures are errors of this package and name the path: NotFoundError, ResourceExhaustedError (the disk, descriptors,
processes), InvalidArgumentError (everything else that the kernel or tar refuses).

See: dsec/sandbox.py; docs/architecture.md, "Sandbox".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Protocol

from dsec.errors import DsecError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from dsec.sandbox import Process
from dsec.toolbox import Entry, EntryKind, Event, EventKind, parse_entries, parse_event, require_success
from dsec.types import PATH, TOOLBOX, Command, ExecResult

__all__ = ["CHUNK_BYTES", "Entry", "EntryKind", "Event", "EventKind", "Files", "Runner"]

FILES_TIMEOUT_S = 600.0
WATCH_TIMEOUT_S = 86_400.0
CHUNK_BYTES = 1 << 18
WINDOW_BYTES = 1 << 19
"""How much of an output may be on its way; half of what a substrate keeps in memory."""
LIST_BYTES_MAX = 16 << 20
GIVE_UP_S = 5.0
PATH_BYTES_MAX = 4095
ENTRIES_DEPTH_MAX = 128
TAR_END = bytes(1024)
_ENV = {"PATH": PATH, "LC_ALL": "C"}


class Runner(Protocol):
    """What of a sandbox is needed here (`dsec.sandbox.Sandbox`)."""

    async def exec(self, command: Command) -> ExecResult:
        """Run a command to its end."""
        ...

    async def start(self, command: Command) -> Process:
        """Start a command."""
        ...


class Files:
    """The files of one sandbox, as `user` of it (root); paths are absolute.  An operation may take `timeout_s`."""

    def __init__(self, sandbox: Runner, *, user: str = "0", timeout_s: float = FILES_TIMEOUT_S) -> None:
        self._sandbox = sandbox
        self._user = user
        self._timeout_s = timeout_s

    # -- contents --------------------------------------------------------------------------------

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a regular file, `length` of them or all to its end, in memory."""
        first = CHUNK_BYTES if length is None else min(length, CHUNK_BYTES)
        result = await self._run(path, "read", path, str(offset), str(first), output_bytes_max=2 * CHUNK_BYTES)
        parts = [result.stdout.data]
        if len(parts[0]) == CHUNK_BYTES != length:
            rest = None if length is None else length - CHUNK_BYTES
            parts += [part async for part in self.open_read(path, offset + CHUNK_BYTES, rest)]
        return b"".join(parts)

    async def read_text(self, path: str) -> str:
        """A whole regular file as text, with U+FFFD for what is not UTF-8."""
        return (await self.read(path)).decode(errors="replace")

    async def open_read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncGenerator[bytes]:
        """The same in pieces of at most CHUNK_BYTES, however large the file is."""
        _check_path(path)
        count = "-" if length is None else str(length)
        async with aclosing(self._paced(path, "read", path, str(offset), count)) as pieces:  # ended with us, not later
            async for piece in pieces:
                yield piece

    async def write(
        self,
        path: str,
        data: bytes | str | AsyncIterator[bytes],
        *,
        mode: int | None = None,
        offset: int | None = None,
        append: bool = False,
        make_parents: bool = False,
        exclusive: bool = False,
        atomic: bool = False,
    ) -> None:
        """Write a regular file: instead of what it holds, from `offset` on, or after its end.

        `exclusive`: it must not be there.  `atomic`: into a new file that takes the name when it is whole; else a
        failure can leave part of it written.  Writing follows links, `atomic` replaces them.
        """
        options = ["--mode", f"{mode:o}"] if mode is not None else []
        options += ["--offset", str(offset)] if offset is not None else []
        flags = {"--append": append, "--parents": make_parents, "--exclusive": exclusive, "--atomic": atomic}
        options += [flag for flag, is_set in flags.items() if is_set]
        _check_path(path)
        data = data.encode() if isinstance(data, str) else data
        if isinstance(data, bytes):
            options += ["--bytes", str(len(data))]
            if len(data) <= CHUNK_BYTES:
                await self._run(path, "write", path, *options, stdin=data)
                return
            data = _pieces(data)
        await self._feed(path, (TOOLBOX, "write", path, *options), data)

    # -- the tree --------------------------------------------------------------------------------

    async def list(self, path: str, depth: int = 1) -> list[Entry]:
        """What is below a directory, `depth` levels of it, sorted by path.

        ResourceExhaustedError for more than LIST_BYTES_MAX of names: list parts of it.
        """
        if not 1 <= depth <= ENTRIES_DEPTH_MAX:
            raise InvalidArgumentError(f"depth {depth} is not in [1, {ENTRIES_DEPTH_MAX}]")
        result = await self._run(path, "list", path, str(depth), output_bytes_max=LIST_BYTES_MAX)
        if result.stdout.is_truncated:
            raise ResourceExhaustedError(
                f"{path!r} has more entries than fit into {LIST_BYTES_MAX} bytes: list parts of it"
            )
        return sorted(parse_entries(path, result.stdout.data), key=lambda entry: entry.path)

    async def stat(self, path: str) -> Entry:
        """One entry, a link itself."""
        result = await self._run(path, "stat", path)
        return next(iter(parse_entries(path, result.stdout.data)))

    async def exists(self, path: str) -> bool:
        """Whether there is something, be it a link to nothing."""
        try:
            await self.stat(path)
        except NotFoundError:
            return False
        return True

    async def make_dir(self, path: str, *, mode: int | None = None, parents: bool = True) -> None:
        """Make a directory; with `parents` those above it too, and one that is there is well."""
        options = ["--mode", f"{mode:o}"] if mode is not None else []
        await self._run(path, "make_dir", path, *options, *(["--parents"] if parents else []))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link itself, or an empty directory; with `recursive` all that is in it.  Follows no link."""
        await self._run(path, "remove", path, *(["--recursive"] if recursive else []))

    async def rename(self, path: str, new_path: str, *, exclusive: bool = False) -> None:
        """Give another name, taking it from what has it, unless `exclusive`."""
        _check_path(new_path)
        await self._run(path, "rename", path, new_path, *(["--exclusive"] if exclusive else []))

    async def watch(self, path: str, *, recursive: bool = False) -> AsyncGenerator[Event]:
        """Events of a file or directory, with `recursive` of all below it, until it is gone; `ready` is the first."""
        _check_path(path)
        argv = (TOOLBOX, "watch", path, *(["--recursive"] if recursive else []))
        process = await self._sandbox.start(self._command(argv, timeout_s=WATCH_TIMEOUT_S))
        offset, rest = 0, b""
        try:
            while data := await process.read_output("stdout", offset, CHUNK_BYTES):
                offset += len(data)
                *fields, rest = (rest + data).split(b"\0")
                if len(fields) % 2:
                    rest = fields.pop() + b"\0" + rest
                for kind, name in zip(fields[::2], fields[1::2], strict=True):
                    yield parse_event(kind, name)
            require_success(path, await process.wait())
        except BaseException:
            await _end(process)
            raise

    # -- archives --------------------------------------------------------------------------------

    async def upload_tree(self, source: Path | AsyncIterator[bytes], path: str) -> None:
        """Unpack a directory of this machine, or the bytes of a tar archive, into a directory of the sandbox.

        The sandbox's tar unpacks it, as the user, and its complaints are errors: then part of it may be there.
        """
        await self.make_dir(path)
        if isinstance(source, Path):
            async with aclosing(pack_directory(source)) as pieces:
                await self._unpack(pieces, path)
        else:
            await self._unpack(source, path)

    async def _unpack(self, pieces: AsyncIterator[bytes], path: str) -> None:
        await self._feed(path, ("tar", "-x", "-p", "-o", "-f", "-", "-C", path), _whole_archive(pieces))

    async def download_tree(self, path: str) -> AsyncGenerator[bytes]:
        """A directory as the bytes of a tar archive, its members named `./…`.

        It was made inside: whoever unpacks it elsewhere must not trust its names.
        """
        if (await self.stat(path)).kind not in ("directory", "link"):
            raise InvalidArgumentError(f"{path!r} is not a directory")
        async with aclosing(self._paced(path, "run", "tar", "-c", "-f", "-", "-C", path, ".")) as pieces:
            async for piece in pieces:
                yield piece

    # -- commands --------------------------------------------------------------------------------

    def _command(
        self, argv: tuple[str, ...], *, stdin: bytes = b"", is_open: bool = False, timeout_s: float | None = None,
        output_bytes_max: int = 2 * WINDOW_BYTES,
    ) -> Command:  # fmt: skip
        return Command(
            argv=argv,
            cwd="/",
            env=_ENV,
            stdin=stdin,
            keep_stdin_open=is_open,
            user=self._user,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            output_bytes_max=output_bytes_max,
        )

    async def _run(self, path: str, *argv: str, stdin: bytes = b"", output_bytes_max: int = CHUNK_BYTES) -> ExecResult:
        _check_path(path)
        command = self._command((TOOLBOX, *argv), stdin=stdin, output_bytes_max=output_bytes_max)
        return require_success(path, await self._sandbox.exec(command))

    async def _feed(self, path: str, argv: tuple[str, ...], pieces: AsyncIterator[bytes]) -> None:
        """Run a command whose stdin is `pieces`; when they fail it is told to give up before it saw an end."""
        process = await self._sandbox.start(self._command(argv, is_open=True))
        end = asyncio.ensure_future(process.wait())
        try:
            async for piece in pieces:
                await process.write_stdin(piece)
                if end.done():  # it will read no more
                    break
            await process.close_stdin()
            require_success(path, await end)
        except BaseException:
            await process.signal(15)
            await asyncio.wait([end], timeout=GIVE_UP_S)
            await process.kill()
            raise
        finally:
            end.cancel()
            await asyncio.gather(end, return_exceptions=True)

    async def _paced(self, path: str, *argv: str) -> AsyncGenerator[bytes]:
        """The output of a toolbox operation, of which no more is made than was asked for."""
        process = await self._sandbox.start(self._command((TOOLBOX, "--paced", *argv), is_open=True))
        offset = asked = 0
        try:
            while True:
                if asked - offset <= WINDOW_BYTES // 2:
                    await process.write_stdin(b"%d\n" % (WINDOW_BYTES - (asked - offset)))
                    asked = offset + WINDOW_BYTES
                data = await process.read_output("stdout", offset, CHUNK_BYTES)
                if not data:
                    break
                offset += len(data)
                yield data
            require_success(path, await process.wait())
        except BaseException:
            await _end(process)
            raise


async def _end(process: Process) -> None:
    """Kill it, and wait until it is no more."""
    await process.kill()
    with suppress(DsecError):
        await process.wait()


def _check_path(path: str) -> None:
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise InvalidArgumentError(f"{path[:100]!r} is not an absolute path of at most {PATH_BYTES_MAX} bytes")


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    view = memoryview(data)
    for at in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[at : at + CHUNK_BYTES])


async def _whole_archive(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces; InvalidArgumentError if they end before the archive does, which tar itself may overlook."""
    end = b""
    async for piece in pieces:
        end = (end + piece)[-len(TAR_END) :]
        for at in range(0, len(piece), CHUNK_BYTES):
            yield piece[at : at + CHUNK_BYTES]
    if end != TAR_END:
        raise InvalidArgumentError("the archive has no end: it is cut off, compressed, or no tar archive")


async def pack_directory(directory: Path) -> AsyncGenerator[bytes]:
    """A directory of this machine as an archive; this machine's tar makes it."""
    if not directory.is_dir():
        raise InvalidArgumentError(f"{str(directory)!r} is not a directory of this machine")
    tar = await asyncio.create_subprocess_exec(
        "tar",
        "-c",
        "-f",
        "-",
        "-C",
        str(directory),
        ".",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    if tar.stdout is None:
        raise AssertionError("a pipe was asked for")
    try:
        while piece := await tar.stdout.read(CHUNK_BYTES):
            yield piece
        if await tar.wait() != 0:
            raise InvalidArgumentError(f"tar could not read {str(directory)!r} whole (exit code {tar.returncode})")
    finally:
        if tar.returncode is None:
            tar.kill()
            await tar.wait()
