"""Directories as sources of layers: one of the host's, or the disk of a frozen sandbox.

Everything is opened by name below its open parent and never through a link, so that whoever filled the
directory decides only what is in the layer.  On a sandbox's disk the owners are a range of the host's
ids, which become 0, 1, ... again, also where they hide in attributes; and overlayfs has left notes in
attributes that mean something to that one mount: all but `opaque` are dropped.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

from dsec.archive import DEPTH_MAX
from dsec.edge.images import content
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.tree import CAPABILITY, OPAQUE, Node, Tree, plain_capability
from dsec.errors import HostUnfitError, InvalidArgumentError

IDS_COUNT = 65536
_NOBODY = 65534
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
_KEPT_XATTRS = {CAPABILITY, b"system.posix_acl_access", b"system.posix_acl_default", OPAQUE}
_UNSUPPORTED_XATTRS = {b"trusted.overlay.redirect", b"trusted.overlay.metacopy"}
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 0x02, 0x08


class DirectoryReader:
    """Reads one directory into a writer.  `first_id` is what owner 0 of the layer is called there."""

    def __init__(self, writer: ImageWriter, first_id: int = 0) -> None:
        self._writer = writer
        self._first_id = first_id
        self._count = Tree().count
        self._linked: dict[tuple[int, int], Node] = {}

    def read(self, path: Path) -> Node:
        """The tree below `path`.  InvalidArgumentError if it changes meanwhile, or cannot be a layer."""
        try:
            fd = os.open(path, _OPEN | os.O_DIRECTORY)
        except OSError as error:
            raise InvalidArgumentError(f"{path}: {error.strerror}") from error
        try:
            return self._directory(fd, os.fstat(fd), 0)
        finally:
            os.close(fd)

    def _directory(self, fd: int, found: os.stat_result, depth: int) -> Node:
        if depth > DEPTH_MAX:
            raise InvalidArgumentError(f"directories deeper than {DEPTH_MAX}")
        node = self._node(found)
        node.xattrs = self._xattrs(fd)
        with os.scandir(fd) as entries:
            named = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        for name, status in sorted(named):
            self._count()
            if status.st_dev != found.st_dev:
                raise InvalidArgumentError(f"{name!r} is a mount point: a layer is made of one file system")
            node.children[os.fsencode(name)] = self._entry(fd, name, status, depth)
        return node

    def _entry(self, parent: int, name: str, found: os.stat_result, depth: int) -> Node:
        key = (found.st_dev, found.st_ino)
        if key in self._linked:
            return self._linked[key]
        if stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
            fd = _open(parent, name, found)
            try:
                node = self._directory(fd, found, depth + 1) if stat.S_ISDIR(found.st_mode) else self._file(fd, found)
            finally:
                os.close(fd)
        else:
            node = self._node(found)
            if stat.S_ISLNK(found.st_mode):
                node.target = os.fsencode(os.readlink(name, dir_fd=parent))
        if found.st_nlink > 1 and not node.is_directory:
            self._linked[key] = node
        return node

    def _file(self, fd: int, found: os.stat_result) -> Node:
        node = self._node(found)
        node.xattrs = self._xattrs(fd)
        has_holes = found.st_blocks * 512 < found.st_size
        node.data = self._writer.write_data(content.of_file(fd, found.st_size), found.st_size, has_holes=has_holes)
        return node

    def _node(self, found: os.stat_result) -> Node:
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
            return Node(stat.S_IFCHR)  # a whiteout: overlayfs made it, and looks at nothing but its type
        return Node(found.st_mode, self._id(found.st_uid), self._id(found.st_gid), found.st_mtime_ns, {}, found.st_rdev)

    def _id(self, host_id: int) -> int:
        if self._first_id == 0:
            return host_id
        return host_id - self._first_id if 0 <= host_id - self._first_id < IDS_COUNT else _NOBODY

    def _xattrs(self, fd: int) -> dict[bytes, bytes]:
        kept: dict[bytes, bytes] = {}
        try:
            names = os.listxattr(fd)
        except OSError as error:
            if error.errno == errno.ENOTSUP:  # a file system without any
                return kept
            raise
        for name in map(os.fsencode, names):
            if name in _UNSUPPORTED_XATTRS:
                raise HostUnfitError(f"the overlay wrote {name.decode()}: mount it with redirect_dir=off,metacopy=off")
            if name in _KEPT_XATTRS or name.startswith(b"user."):
                kept[name] = self._shifted(name, os.getxattr(fd, name))
        return kept

    def _shifted(self, name: bytes, value: bytes) -> bytes:
        """The value with its owners as the layer has them."""
        if name == CAPABILITY:
            return plain_capability(value)
        if self._first_id and name.startswith(b"system.posix_acl"):
            entries = [
                _ACL_ENTRY.pack(tag, permissions, self._id(owner) if tag in {_ACL_USER, _ACL_GROUP} else owner)
                for tag, permissions, owner in _ACL_ENTRY.iter_unpack(value[4:])
            ]
            return value[:4] + b"".join(entries)
        return value


def _open(parent: int, name: str, found: os.stat_result) -> int:
    try:
        fd = os.open(name, _OPEN, dir_fd=parent)
    except OSError as error:
        raise InvalidArgumentError(f"{name!r} changed while the directory was read: {error.strerror}") from error
    opened = os.fstat(fd)
    if (opened.st_dev, opened.st_ino, opened.st_size) != (found.st_dev, found.st_ino, found.st_size):
        os.close(fd)
        raise InvalidArgumentError(f"{name!r} changed while the directory was read")
    return fd
