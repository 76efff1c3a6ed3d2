"""Put files and trees that a sandbox sent below a directory of this machine and nowhere else.

They were made inside and are hostile.  Every name is opened from its parent's descriptor, and no link
is followed on the way, so that neither `..`, nor an absolute name, nor a link that this archive or an earlier one
brought leads out.  Owners, set-id bits and devices stay behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from dsec.archive import DIRECTORY, FILE, HARD_LINK, LINK, Member, Stream, members, parts
from dsec.errors import InvalidArgumentError, ResourceExhaustedError

DOWNLOAD_BYTES_MAX = 64 << 30
"""How much one download may bring, unless the caller says otherwise: the sandbox decides what it sends."""
LEFT_OUT_NAMES_MAX = 10
_COPY_BYTES = 1 << 20
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LeftOut(msgspec.Struct):
    """What of an archive has no place here (devices, FIFOs): how many, and the names of the first."""

    count: int = 0
    names: list[str] = []

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if self.count <= LEFT_OUT_NAMES_MAX:
            self.names.append(name)


def unpack(pieces: Iterable[bytes], directory: Path | int, bytes_max: int = DOWNLOAD_BYTES_MAX) -> LeftOut:
    """Unpack a tar archive into a directory that is there.

    A path is the caller's, and a link there is followed; where its last name is the sandbox's choice too, or an
    earlier download may have made it, give a descriptor (`opened`).  What has a name of the archive's is replaced;
    directories are kept.  InvalidArgumentError for what is no archive, leads out, or meets something in its way,
    ResourceExhaustedError beyond `bytes_max` bytes of archive.
    """
    left_out = LeftOut()
    stream = Stream(_Reader(_bounded(pieces, bytes_max)).read, bytes_max)
    root = os.dup(directory) if isinstance(directory, int) else os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for member in members(stream):
            names = parts(member.path)
            try:
                if names and not _place(root, names, member, stream):
                    left_out.add(member.name)
            except OSError as error:
                raise InvalidArgumentError(f"cannot unpack {member.name!r:.200}: {error.strerror}") from error
    finally:
        os.close(root)
    return left_out


def replace_file(
    parent: int, name: bytes, mode: int, pieces: Iterable[bytes], bytes_max: int = DOWNLOAD_BYTES_MAX
) -> None:
    """Write a file of an opened directory anew; it takes the name when it is whole, from a file or from a link.

    InvalidArgumentError for a name that belongs to something else, ResourceExhaustedError beyond `bytes_max` bytes.
    """
    _require_replaceable(parent, name)
    fresh = b".dsec-" + secrets.token_hex(8).encode()  # no longer than any name may be, and nobody's guess
    fd, is_nameless = _open_fresh(parent, fresh)
    try:
        with os.fdopen(fd, "wb") as file:
            for piece in _bounded(pieces, bytes_max):
                file.write(piece)
            file.flush()
            os.fchmod(fd, mode & 0o777)
            if is_nameless:
                os.link(f"/proc/self/fd/{fd}", fresh, dst_dir_fd=parent, follow_symlinks=True)
        os.rename(fresh, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        _clear(parent, fresh)
        raise


def _open_fresh(parent: int, name: bytes) -> tuple[int, bool]:
    """A new file, without a name where the file system can do that: then a kill -9 leaves nothing of it."""
    with contextlib.suppress(OSError):
        if os.access("/proc/self/fd", os.X_OK):  # by which it gets its name
            return os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent), True
    return os.open(name, _NEW_FILE, 0o600, dir_fd=parent), False


def _require_replaceable(parent: int, name: bytes) -> None:
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        # /dev/stdout is a link, and whoever names it means no new file in /dev.
        is_replaceable = not os.readlink(name, dir_fd=parent).startswith(b"/proc/")
    else:
        is_replaceable = stat.S_ISREG(mode)
    if not is_replaceable:
        raise InvalidArgumentError(
            f"{os.fsdecode(name)!r} is there, and neither a file nor a link that may be replaced"
        )


def _bounded(pieces: Iterable[bytes], bytes_max: int) -> Iterator[bytes]:
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > bytes_max:
            raise ResourceExhaustedError(f"the sandbox sends more than {bytes_max} bytes, the bound of this download")
        yield piece


class _Reader:
    """Pieces of any size as reads of at most a given size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def read(self, count: int) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        data, self._rest = self._rest[:count], self._rest[count:]
        return bytes(data)


def _place(root: int, names: Sequence[bytes], member: Member, stream: Stream) -> bool:
    with opened(root, names[:-1]) as parent:
        name, mode = names[-1], member.mode & 0o777
        if member.kind == DIRECTORY:
            _make_directory(parent, name, mode | stat.S_IRWXU)
        elif member.kind == FILE:
            _clear(parent, name)
            _write(os.open(name, _NEW_FILE, mode, dir_fd=parent), member.size, stream)
        elif member.kind == LINK:
            _clear(parent, name)
            os.symlink(member.target, name, dir_fd=parent)
        elif member.kind == HARD_LINK:
            _link(root, parts(member.target), parent, name)
        else:
            return False
    return True


@contextlib.contextmanager
def opened(root: int, names: Sequence[bytes]) -> Iterator[int]:
    """A directory below the root, made where it is missing, reached through no link."""
    fd = os.dup(root)
    try:
        for name in names:
            _make_directory(fd, name, 0o755)
            below = os.open(name, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _make_directory(parent: int, name: bytes, mode: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=parent)
        return
    os.close(os.open(name, _DIRECTORY, dir_fd=parent))


def _clear(parent: int, name: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _link(root: int, source: Sequence[bytes], parent: int, name: bytes) -> None:
    if not source:
        raise InvalidArgumentError("the archive links to its own root")
    with opened(root, source[:-1]) as above:
        _clear(parent, name)
        os.link(source[-1], name, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)


def _write(fd: int, size: int, stream: Stream) -> None:
    with os.fdopen(fd, "wb") as file:
        while size:
            block = stream.take(min(size, _COPY_BYTES))
            if not block:
                raise InvalidArgumentError("the archive ends in the middle of a file")
            file.write(block)
            size -= len(block)
