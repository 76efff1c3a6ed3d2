"""`dsec cp`: files and trees between this machine and a sandbox."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from pathlib import Path

import click

from dsec.cli_sandbox import example
from dsec.client.blocking import Sandbox
from dsec.client.connection import connect
from dsec.client.loop import LOOP
from dsec.client.sandbox import AsyncSandbox
from dsec.client.terminal import write_all
from dsec.client.unpack import unpack
from dsec.errors import InvalidArgumentError, NotFoundError
from dsec.terminal import visible_line
from dsec.types import SandboxId

_READ_BYTES = 1 << 18


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
def cp(source: str, target: str) -> None:
    """Copy SOURCE to TARGET; one of them is ID:PATH, and the other a path of this machine or `-`.

    A directory is copied with all below it: into TARGET where that is a directory, else as TARGET.  `-` is our stdin
    or stdout: a file's bytes, and for a directory (ID:PATH/ as a target) a tar archive.  Owners stay behind.
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
            _download(sandbox, path, target)
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
                sandbox.files.write(_target_of(sandbox, local.name, path), pieces, mode=mode & 0o777)
        else:
            raise InvalidArgumentError(f"{source}: neither a file nor a directory")
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {source}: {error.strerror}") from error


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


def _download(sandbox: Sandbox, path: str, target: str) -> None:
    is_tree = sandbox.files.stat(path).kind == "directory"
    if target == "-":
        for piece in sandbox.files.download_tree(path) if is_tree else sandbox.files.open_read(path):
            write_all(1, piece)
        return
    local = Path(target)
    if local.is_dir():
        local /= posixpath.basename(posixpath.normpath(path))
    try:
        if is_tree:
            local.mkdir(exist_ok=True)
            for name in unpack(sandbox.files.download_tree(path), local):
                click.echo(f"dsec: left out {visible_line(name)}: neither a file, a directory nor a link", err=True)
        else:
            _fetch(sandbox, path, local)
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {local}: {error.strerror}") from error


def _fetch(sandbox: Sandbox, path: str, local: Path) -> None:
    with local.open("wb") as file:
        for piece in sandbox.files.open_read(path):
            file.write(piece)
    local.chmod(sandbox.files.stat(path).mode & 0o777)
