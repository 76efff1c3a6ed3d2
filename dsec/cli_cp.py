"""`dsec cp`: files and trees between this machine and a sandbox."""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import click

from dsec.cli_sandbox import example
from dsec.client.blocking import Sandbox
from dsec.client.connection import connect
from dsec.client.loop import LOOP
from dsec.client.sandbox import AsyncSandbox
from dsec.client.terminal import write_all
from dsec.client.unpack import DOWNLOAD_BYTES_MAX, opened, replace_file, unpack
from dsec.errors import DsecError, InvalidArgumentError, NotFoundError
from dsec.terminal import visible_line
from dsec.types import SandboxId

_READ_BYTES = 1 << 18
_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@click.command(
    short_help="Copy files and trees into a sandbox, or out of it.",
    epilog=example(
        "dsec cp notes.txt ID:/root/",
        "dsec cp ID:/workspace results",
        "dsec cp ID:/etc/hosts -",
        "tar -c src | dsec cp - ID:/srv/",
    ),
)
@click.argument("source")
@click.argument("target")
@click.option(
    "--bytes-max",
    type=click.IntRange(min=0),
    default=DOWNLOAD_BYTES_MAX,
    show_default=True,
    help="Most bytes that a copy out of a sandbox may bring to this machine's disk.",
)
def cp(source: str, target: str, bytes_max: int) -> None:
    """Copy SOURCE to TARGET; one of them is ID:PATH, and the other a path of this machine or `-`.

    A directory is copied with all below it: into TARGET where that is a directory, else as TARGET.  `-` is our stdin
    or stdout: a file's bytes, and for a directory (ID:PATH/ as a target) a tar archive.  Owners stay behind.

    What a sandbox sends never passes through a link in the place of TARGET: a file replaces it.  A link to a directory
    is that directory only if TARGET ends in a slash.  Devices and FIFOs are not written to.
    """
    into, out = _split(target), _split(source)
    if (into is None) == (out is None):
        raise click.UsageError("one of SOURCE and TARGET is ID:PATH, and the other is not")
    sandbox_id, path = into or out or ("", "")
    sandbox = LOOP.run(_attached(sandbox_id))
    try:
        if into is not None:
            _upload(sandbox, source, path)
        else:
            _download(sandbox, path, target, bytes_max)
    finally:
        sandbox.close()


async def _attached(sandbox_id: str) -> Sandbox:
    return Sandbox(AsyncSandbox(connect(), SandboxId(sandbox_id)))


def _split(text: str) -> tuple[str, str] | None:
    """(id, path), or None for a path of this machine, which has a slash or no colon before its first slash."""
    sandbox_id, colon, path = text.partition(":")
    if not colon or not sandbox_id or "/" in sandbox_id:
        return None
    if not path.startswith("/"):
        raise InvalidArgumentError(f"{text!r}: a path in a sandbox is absolute")
    return sandbox_id, path


def _upload(sandbox: Sandbox, source: str, path: str) -> None:
    if source == "-":
        if path.endswith("/"):
            sandbox.files.upload_tree(_stdin(), path)
        else:
            sandbox.files.write(path, _stdin())
        return
    local = Path(source)
    try:
        mode = local.stat().st_mode
        if stat.S_ISDIR(mode):
            sandbox.files.upload_tree(local, _target_of(sandbox, local.resolve().name, path))
        elif stat.S_ISREG(mode):
            with local.open("rb") as file:
                pieces = iter(lambda: file.read(_READ_BYTES), b"")
                _write_whole(sandbox, _target_of(sandbox, local.name, path), pieces, mode & 0o777)
        else:
            raise InvalidArgumentError(f"{source}: neither a file nor a directory")
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {source}: {error.strerror}") from error


def _write_whole(sandbox: Sandbox, path: str, pieces: Iterator[bytes], mode: int) -> None:
    """Of a new file that does not fit, nothing stays; of one that was there, what the failure left."""
    was_there = sandbox.files.exists(path)
    try:
        sandbox.files.write(path, pieces, mode=mode)
    except BaseException:
        if not was_there:
            with contextlib.suppress(DsecError):
                sandbox.files.remove(path)
        raise


def _target_of(sandbox: Sandbox, name: str, path: str) -> str:
    """`path`, or below it where it is a directory."""
    try:
        is_directory = sandbox.files.stat(path).kind == "directory"
    except NotFoundError:
        is_directory = path.endswith("/")
    return posixpath.join(path, name) if is_directory else path


def _stdin() -> Iterator[bytes]:
    while data := os.read(0, _READ_BYTES):
        yield data


def _download(sandbox: Sandbox, path: str, target: str, bytes_max: int) -> None:
    entry = sandbox.files.stat(path)
    is_tree = entry.kind == "directory"
    sent = sandbox.files.download_tree(path) if is_tree else sandbox.files.open_read(path)
    with contextlib.closing(cast("Generator[bytes]", sent)) as pieces:  # what sends ends before the connection does
        if target == "-":
            for piece in pieces:
                write_all(1, piece)
            return
        try:
            with _place(path, target) as (parent, name):
                if not is_tree:
                    replace_file(parent, name, entry.mode, pieces, bytes_max)
                    return
                with opened(parent, [name] if name else []) as root:  # no name: `/`, whose contents go into TARGET
                    left_out = unpack(pieces, root, bytes_max)
        except OSError as error:
            raise InvalidArgumentError(f"cannot write {path} to {target}: {error.strerror}") from error
        except KeyboardInterrupt:
            click.echo(f"dsec: {target} has what came so far" if is_tree else f"dsec: {target} is as it was", err=True)
            raise
    for left in left_out.names:
        click.echo(f"dsec: left out {visible_line(left)}: neither a file, a directory nor a link", err=True)
    if more := left_out.count - len(left_out.names):
        click.echo(f"dsec: left out {more} more", err=True)


@contextlib.contextmanager
def _place(path: str, target: str) -> Iterator[tuple[int, bytes]]:
    """The directory that `path` is copied into, opened, and its name there, at which a link may lie in wait.

    An earlier copy may have brought the target itself, as a link: then it is no directory, unless the user says so by
    a slash (the kernel follows `link/` despite O_NOFOLLOW).  Directories on the way to it are the user's word.
    """
    local = Path(target)
    try:
        parent = os.open(target or ".", _PARENT | os.O_NOFOLLOW)
        name = posixpath.basename(posixpath.normpath(path))
    except (FileNotFoundError, NotADirectoryError):
        if local.is_dir():
            raise InvalidArgumentError(f"{target} is a link to a directory: {target}/ copies into it") from None
        parent, name = os.open(local.parent, _PARENT), local.name
    try:
        yield parent, os.fsencode(name)
    finally:
        os.close(parent)
