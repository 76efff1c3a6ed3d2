"""Files on their way into a sandbox: a tree as tar bytes, and the command that unpacks them there.

Archives are made in memory with fixed owners, times and order, so that the same task always gives
the same commands (their digests are compared when a lost sandbox is rebuilt).  They are unpacked
inside the sandbox only: an archive that came with a task is never opened on the host.

See: docs/formats/task.md.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping

import msgspec

from dsec.types import STDIN_BYTES_MAX, Command

SETUP_TIMEOUT_S = 600.0
TAR_ROOM_BYTES = 4096
TAR_END_BYTES = 1 << 16
OUTPUT_KEPT_BYTES = 64 << 10
_BLOCK_BYTES = 512
_FLAG_OF_MAGIC = {b"\x1f\x8b": "-z", b"BZh": "-j", b"\xfd7zXZ": "-J"}


class TaskFile(msgspec.Struct, frozen=True):
    """Contents of one file, and whether it may be executed."""

    data: bytes
    is_executable: bool = False


def pack(files: Mapping[str, TaskFile]) -> bytes:
    """A tar whose bytes depend on names, contents and executable bits only."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name].data)
            info.mode = 0o755 if files[name].is_executable else 0o644
            tar.addfile(info, io.BytesIO(files[name].data))
    return raw.getvalue()


def setup_command(
    env: Mapping[str, str],
    argv: tuple[str, ...],
    *,
    cwd: str = "/",
    stdin: bytes = b"",
    timeout_s: float = SETUP_TIMEOUT_S,
    output_bytes_max: int = OUTPUT_KEPT_BYTES,
    merge_stderr: bool = True,
) -> Command:
    """A command of ours around the agent's, with the bounds that they share unless told otherwise."""
    return Command(
        argv=argv,
        cwd=cwd,
        env=dict(env),
        stdin=stdin,
        timeout_s=timeout_s,
        output_bytes_max=output_bytes_max,
        merge_stderr=merge_stderr,
    )


def packed_bytes_min(files: Mapping[str, TaskFile]) -> int:
    """The least that `pack` can come to, known without packing: a header and whole blocks for each file."""
    return sum(_BLOCK_BYTES + -(-len(file.data) // _BLOCK_BYTES) * _BLOCK_BYTES for file in files.values())


def make_folders(env: Mapping[str, str], *paths: str) -> Command:
    """The command that makes folders and their parents."""
    return setup_command(env, ("mkdir", "-p", "--", *paths))


def upload(files: Mapping[str, TaskFile], target: str, env: Mapping[str, str]) -> Iterator[Command]:
    """The commands that write `files` below the folder `target`, which must exist; none for no files.

    Each is packed when it is asked for, and takes at most STDIN_BYTES_MAX bytes of stdin.
    """
    argv = ("tar", "-x", "--no-same-owner", "-C", target)
    return (setup_command(env, argv, stdin=pack(part)) for part in _parts(files))


def unpack(archive: bytes, target: str, env: Mapping[str, str]) -> Command:
    """The command that unpacks an archive of the task's author (tar; plain, gzip, bzip2 or xz) in `target`."""
    flags = [flag for magic, flag in _FLAG_OF_MAGIC.items() if archive.startswith(magic)]
    return setup_command(env, ("tar", "-x", *flags, "--no-same-owner", "-C", target), stdin=archive)


def _parts(files: Mapping[str, TaskFile]) -> Iterator[dict[str, TaskFile]]:
    """Split so that each part's tar fits one command's stdin."""
    part: dict[str, TaskFile] = {}
    size = TAR_END_BYTES
    for name in sorted(files):
        need = len(files[name].data) + TAR_ROOM_BYTES
        if part and size + need > STDIN_BYTES_MAX:
            yield part
            part, size = {}, TAR_END_BYTES
        part[name] = files[name]
        size += need
    if part:
        yield part
