"""Tar streams as sources of layers: one pass, nothing unpacked.

`tarfile` reads the headers and nothing else; it never sees a path of the host.  An archive is
hostile: its paths are taken apart by name (`tree`), its sizes are bounded, its damage is an error
and no early end.  The marks by which an image's layer hides names of the layers below (`.wh.`) become
overlayfs's own.

See: docs/formats/layers.md, "Images"; the OCI image specification, "Image Layer Filesystem Changeset".
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from dsec.edge.images import content
from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.streams import Stream
from dsec.edge.images.tree import CAPABILITY, Node, Tree, plain_capability
from dsec.errors import InvalidArgumentError

HEADER_BYTES_MAX = 1 << 20
TIME_S_MAX = 1 << 34
_WHITEOUT, _OPAQUE, _AUFS = b".wh.", b".wh..wh..opq", b".wh..wh."
_XATTR = "SCHILY.xattr."
_ID_MAX = (1 << 32) - 2
_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG, tarfile.AREGTYPE: stat.S_IFREG, tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO,
}  # fmt: skip


class _Headers:
    """A stream as `tarfile` wants a file: it reads headers, and seeks over what it takes for data."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.last = b""

    def read(self, count: int) -> bytes:
        if not 0 <= count <= HEADER_BYTES_MAX:
            raise InvalidArgumentError(f"an archive's header of {count} bytes")
        self.last = self._stream.take(count)
        return self.last

    def tell(self) -> int:
        return self._stream.position

    def seek(self, position: int) -> None:
        if position < self._stream.position:
            raise InvalidArgumentError("an archive's sizes contradict each other")
        self._stream.skip(position - self._stream.position)


class _Archive(tarfile.TarFile):
    """By its constructor, which unlike `open` tries no compression; `members` is where it would keep every header."""

    members: list[tarfile.TarInfo]


def members(stream: Stream) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar stream, to its very end; what of an entry's data is not taken is skipped.

    InvalidArgumentError for anything that is no tar.
    """
    headers = _Headers(stream)
    try:
        archive = _Archive(fileobj=cast("IO[bytes]", headers), encoding="utf-8", errors="surrogateescape")
        while (member := archive.next()) is not None:
            archive.members.clear()
            yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"not a tar archive, or a damaged one: {error}") from error
    if any(headers.last):  # `tarfile` takes a broken header for the end; the end is zeros
        raise InvalidArgumentError(f"a damaged tar archive: no header at byte {stream.position - len(headers.last)}")
    while padding := stream.take(HEADER_BYTES_MAX):
        if padding != bytes(len(padding)):
            raise InvalidArgumentError("a damaged tar archive: something follows its end")


def read_archive(stream: Stream, writer: ImageWriter, *, is_lowest: bool = False) -> Node:
    """The tree of a tar stream.  In the lowest layer there is nothing to hide.

    InvalidArgumentError for anything that is no tar, or that no layer can have.
    """
    tree = Tree()
    for member in members(stream):
        _add(tree, member, stream, writer, is_lowest=is_lowest)
    return tree.finish()


def _add(tree: Tree, member: tarfile.TarInfo, stream: Stream, writer: ImageWriter, *, is_lowest: bool) -> None:
    path = _bytes(member.name)
    directory, _, name = path.rstrip(b"/").rpartition(b"/")
    if any(part.startswith(_AUFS) for part in directory.split(b"/")):
        return  # the books that an old storage driver kept
    if name.startswith(_WHITEOUT):
        if is_lowest:
            return
        if name == _OPAQUE:
            tree.make_opaque(directory)
        elif not name.startswith(_AUFS):
            tree.hide(directory + b"/" + name[len(_WHITEOUT) :])
    elif member.type == tarfile.LNKTYPE:
        tree.link(path, _bytes(member.linkname))
    else:
        tree.add(path, _node(member, stream, writer))


def _node(member: tarfile.TarInfo, stream: Stream, writer: ImageWriter) -> Node:
    kind = _TYPES.get(member.type)
    if kind is None or member.sparse is not None or member.size < 0:
        raise InvalidArgumentError(f"{member.name!r:.200} is of a kind ({member.type!r}) that no layer can have")
    if not (0 <= member.uid <= _ID_MAX and 0 <= member.gid <= _ID_MAX):
        raise InvalidArgumentError(f"{member.name!r:.200} has an owner beyond every range")
    node = Node(kind | member.mode & 0o7777, member.uid, member.gid)
    node.mtime_ns = int(member.mtime) * 1_000_000_000 if 0 <= member.mtime < TIME_S_MAX else 0
    if kind == stat.S_IFREG:
        node.data = writer.write_data(content.of_stream(stream.take, member.size), member.size)
    elif kind == stat.S_IFLNK:
        node.mode = kind | 0o777
        node.target = _bytes(member.linkname)
        if not 0 < len(node.target) < 4096:
            raise InvalidArgumentError(f"{member.name!r:.200} is a link to nothing, or to too long a path")
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        node.rdev = os.makedev(member.devmajor & 0xFFF, member.devminor & 0xFFFFF)
    if kind in {stat.S_IFREG, stat.S_IFDIR}:
        node.xattrs = {
            _bytes(key[len(_XATTR) :]): _bytes(value)
            for key, value in member.pax_headers.items()
            if key.startswith(_XATTR + "user.")
        }
        if (value := member.pax_headers.get(_XATTR + CAPABILITY.decode())) is not None:
            node.xattrs[CAPABILITY] = plain_capability(_bytes(value))
    return node


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
