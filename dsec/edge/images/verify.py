"""The judge of a written image: the kernel mounts it, and what it shows is compared with what was meant.

Every name, type, mode, owner, size, link count, time, device, link target, attribute and content is
compared; reading goes through the mount, after the image has left the page cache.
"""

from __future__ import annotations

import os
import stat

from dsec.edge.images import content
from dsec.edge.images.tree import Node
from dsec.edge.linux.mounts import mount_image
from dsec.errors import HostUnfitError


def verify(image: int, root: Node) -> None:
    """HostUnfitError, naming the first difference, unless the image open at `image` mounts as exactly this tree."""
    os.fsync(image)
    os.posix_fadvise(image, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        mount = mount_image(image)
    except OSError as error:
        raise HostUnfitError(f"the layer cannot be mounted: {error.strerror}; dsec doctor tells more") from error
    try:
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            _compare_status("/", os.fstat(top), root)
            _compare_directory(top, root, "/", {})
        finally:
            os.close(top)
    except OSError as error:
        raise HostUnfitError(f"the layer cannot be read back: {error}") from error
    finally:
        os.close(mount)


def _compare_directory(fd: int, node: Node, path: str, seen: dict[tuple[str, int], int]) -> None:
    _compare(path, "attributes", _xattrs(fd), node.xattrs)
    with os.scandir(fd) as entries:
        shown = {os.fsencode(entry.name): entry for entry in entries}
    _compare(path, "names", shown.keys(), node.children.keys())
    for name, entry in shown.items():
        child, place = node.children[name], f"{path}{entry.name}"
        found = entry.stat(follow_symlinks=False)
        _compare_status(place, found, child)
        pair = (seen.setdefault(("node", id(child)), found.st_ino), seen.setdefault(("inode", found.st_ino), id(child)))
        _compare(place, "hard link", pair, (found.st_ino, id(child)))
        if stat.S_ISLNK(child.mode):
            _compare(place, "target", os.fsencode(os.readlink(entry.name, dir_fd=fd)), child.target)
        if child.data is None and not child.is_directory:
            continue
        opened = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            if child.data is None:
                _compare_directory(opened, child, f"{place}/", seen)
            else:
                _compare(place, "attributes", _xattrs(opened), child.xattrs)
                _compare(place, "content", content.digest(content.of_file(opened, found.st_size)), child.data.digest)
        finally:
            os.close(opened)


def _compare_status(path: str, found: os.stat_result, node: Node) -> None:
    shown = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev)
    _compare(path, "status", shown, (node.mode, node.uid, node.gid, max(node.mtime_ns, 0), node.rdev))
    if not node.is_directory:
        _compare(path, "size", found.st_size, node.data.size if node.data else len(node.target))


def _xattrs(fd: int) -> dict[bytes, bytes]:
    return {os.fsencode(name): os.getxattr(fd, name) for name in os.listxattr(fd)}


def _compare(path: str, what: str, shown: object, meant: object) -> None:
    if shown != meant:
        raise HostUnfitError(f"the layer read back differs at {path!r}: {what} {shown!r:.200}, not {meant!r:.200}")
