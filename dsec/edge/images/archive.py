"""Tar streams as sources of layers: one pass, nothing unpacked.

The marks by which an image's layer hides names of the layers below (`.wh.`) become overlayfs's own.

See: dsec/archive.py; docs/formats/layers.md, "Images"; the OCI image specification, "Image Layer Filesystem Changeset".
"""

from __future__ import annotations

import os
import stat

from dsec.archive import BLOCK, CHARACTER, DIRECTORY, FIFO, FILE, HARD_LINK, LINK, Member, Stream, members
from dsec.edge.images import content
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.tree import CAPABILITY, Node, Tree, plain_capability
from dsec.errors import InvalidArgumentError

TIME_S_MAX = 1 << 34
_WHITEOUT, _OPAQUE, _AUFS = b".wh.", b".wh..wh..opq", b".wh..wh."
_ID_MAX = (1 << 32) - 2
_TYPES = {
    FILE: stat.S_IFREG, DIRECTORY: stat.S_IFDIR, LINK: stat.S_IFLNK, CHARACTER: stat.S_IFCHR, BLOCK: stat.S_IFBLK,
    FIFO: stat.S_IFIFO,
}  # fmt: skip


def read_archive(stream: Stream, writer: ImageWriter, *, is_lowest: bool = False) -> Node:
    """The tree of a tar stream.  In the lowest layer there is nothing to hide.

    InvalidArgumentError for anything that is no tar, or that no layer can have.
    """
    tree = Tree()
    for member in members(stream):
        _add(tree, member, stream, writer, is_lowest=is_lowest)
    return tree.finish()


def _add(tree: Tree, member: Member, stream: Stream, writer: ImageWriter, *, is_lowest: bool) -> None:
    directory, _, name = member.path.rstrip(b"/").rpartition(b"/")
    if any(part.startswith(_AUFS) for part in directory.split(b"/")):
        return  # the books that an old storage driver kept
    if name.startswith(_WHITEOUT):
        if is_lowest:
            return
        if name == _OPAQUE:
            tree.make_opaque(directory)
        elif not name.startswith(_AUFS):
            tree.hide(directory + b"/" + name[len(_WHITEOUT) :])
    elif member.kind == HARD_LINK:
        tree.link(member.path, member.target)
    else:
        tree.add(member.path, _node(member, stream, writer))


def _node(member: Member, stream: Stream, writer: ImageWriter) -> Node:
    kind = _TYPES.get(member.kind)
    if kind is None:
        raise InvalidArgumentError(f"{member.name!r:.200} is of a kind ({member.kind!r}) that no layer can have")
    if not (0 <= member.uid <= _ID_MAX and 0 <= member.gid <= _ID_MAX):
        raise InvalidArgumentError(f"{member.name!r:.200} has an owner beyond every range")
    node = Node(kind | member.mode & 0o7777, member.uid, member.gid)
    node.mtime_ns = member.mtime_s * 1_000_000_000 if 0 <= member.mtime_s < TIME_S_MAX else 0
    if kind == stat.S_IFREG:
        node.data = writer.write_data(content.of_stream(stream.take, member.size), member.size)
    elif kind == stat.S_IFLNK:
        node.mode = kind | 0o777
        node.target = member.target
        if not 0 < len(node.target) < 4096:
            raise InvalidArgumentError(f"{member.name!r:.200} is a link to nothing, or to too long a path")
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        node.rdev = os.makedev(member.device[0] & 0xFFF, member.device[1] & 0xFFFFF)
    if kind in {stat.S_IFREG, stat.S_IFDIR}:
        node.xattrs = {key: value for key, value in member.xattrs.items() if key.startswith(b"user.")}
        if (value := member.xattrs.get(CAPABILITY)) is not None:
            node.xattrs[CAPABILITY] = plain_capability(value)
    return node
