"""`Sandbox.files`: the same as `dsec.files.Files`, for programs without an event loop."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import TypedDict, Unpack

from dsec.client.loop import LOOP
from dsec.files import Entry, Event, Files


class WriteOptions(TypedDict, total=False):
    """See `dsec.files.Files.write`."""

    mode: int | None
    offset: int | None
    append: bool
    make_parents: bool
    exclusive: bool
    atomic: bool


class BlockingFiles:
    """As `Files`; what is an async iterator there is an iterator here."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a regular file, `length` of them or all to its end, in memory."""
        return LOOP.run(self._files.read(path, offset, length))

    def read_text(self, path: str) -> str:
        """A whole regular file as text, with U+FFFD for what is not UTF-8."""
        return LOOP.run(self._files.read_text(path))

    def open_read(self, path: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same in pieces, however large the file is."""
        return LOOP.iterate(self._files.open_read(path, offset, length))

    def write(self, path: str, data: bytes | str | Iterable[bytes], **options: Unpack[WriteOptions]) -> None:
        """Write a regular file; see `Files.write`."""
        LOOP.run(self._files.write(path, data if isinstance(data, bytes | str) else _pieces(data), **options))

    def list(self, path: str, depth: int = 1) -> builtins.list[Entry]:
        """What is below a directory, `depth` levels of it, sorted by path."""
        return LOOP.run(self._files.list(path, depth))

    def stat(self, path: str) -> Entry:
        """One entry, a link itself.  NotFoundError."""
        return LOOP.run(self._files.stat(path))

    def exists(self, path: str) -> bool:
        """Whether there is something, be it a link to nothing."""
        return LOOP.run(self._files.exists(path))

    def make_dir(self, path: str, *, mode: int | None = None, parents: bool = True) -> None:
        """Make a directory; with `parents` those above it too, and one that is there is well."""
        LOOP.run(self._files.make_dir(path, mode=mode, parents=parents))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link itself, or an empty directory; with `recursive` all that is in it."""
        LOOP.run(self._files.remove(path, recursive=recursive))

    def rename(self, path: str, new_path: str, *, exclusive: bool = False) -> None:
        """Give another name, taking it from what has it, unless `exclusive`."""
        LOOP.run(self._files.rename(path, new_path, exclusive=exclusive))

    def watch(self, path: str, *, recursive: bool = False) -> Iterator[Event]:
        """Events of a file or directory until it is gone; `ready` is the first."""
        return LOOP.iterate(self._files.watch(path, recursive=recursive))

    def upload_tree(self, source: Path | Iterable[bytes], path: str) -> None:
        """Unpack a directory of this machine, or the bytes of a tar archive, into a directory of the sandbox."""
        LOOP.run(self._files.upload_tree(source if isinstance(source, Path) else _pieces(source), path))

    def download_tree(self, path: str) -> Iterator[bytes]:
        """A directory as the bytes of a tar archive, which nobody should trust; see `dsec.client.unpack`."""
        return LOOP.iterate(self._files.download_tree(path))


async def _pieces(data: Iterable[bytes]) -> AsyncIterator[bytes]:
    """What the caller's iterator gives, taken from it on a thread that may wait."""
    items = iter(data)
    while (item := await asyncio.to_thread(next, items, None)) is not None:
        yield item
