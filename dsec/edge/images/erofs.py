"""The writer of EROFS images: data first as it comes, then every inode, then the superblock.

Only what a read-only base needs: extended inodes, flat data, small data inline behind its inode, chunks
for files with holes, xattrs beside their inode; no compression.  The same tree with the same data gives the
same bytes.  Debian's mkfs.erofs (1.5) reads no archive, shifts no owner, leaves no xattr out and takes no
directory by descriptor, so that each source would first have to be unpacked, as root, on the host.

The kernel is the judge: an image gets a name only after it was mounted and compared (`verify`).

See: docs/formats/layers.md; Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import tempfile
from collections.abc import Callable

import msgspec

from dsec.edge.images.content import Blocks, update
from dsec.edge.images.tree import Data, Node
from dsec.errors import InvalidArgumentError, ResourceExhaustedError

BLOCK = 4096
INLINE_BYTES_MAX = 2048
HOLES_BYTES_MIN = 1 << 20
_CHUNKS_COUNT_MAX = 1 << 16
_CHUNK_BITS_MAX = 12 + 31
_MAGIC, _SUPERBLOCK_OFFSET = 0xE0F5E1E2, 1024
_COMPAT_MTIME, _INCOMPAT_CHUNKS = 2, 4
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBx")
_XATTR = struct.Struct("<BBH")
_XATTR_HEADER_BYTES = 12
_SLOT = 32
_EXTENDED, _PLAIN, _INLINE, _CHUNKED = 1, 0, 2, 4
_HOLE = 0xFFFFFFFF
_BLOCKS_COUNT_MAX = 0xFFFFFFFE
_FILE_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5,
               stat.S_IFSOCK: 6, stat.S_IFLNK: 7}  # fmt: skip
_XATTR_NAMES = {b"user.": 1, b"trusted.": 4, b"security.": 6}
_XATTR_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}


class Written(msgspec.Struct, frozen=True):
    """Facts of a finished image, in bytes; the metadata (every inode and small file) is one stretch at its end."""

    size_bytes: int
    metadata_offset: int
    entries_count: int
    content_bytes: int


class _Inode(msgspec.Struct, eq=False):
    """A node with its place in the image."""

    node: Node
    number: int
    parent: _Inode | None
    links_count: int = 0
    children: list[tuple[bytes, _Inode]] = []
    xattrs: bytes = b""
    payload_bytes: int = 0
    block: int = -1
    nid: int = 0

    @property
    def head_bytes(self) -> int:
        """The inode and what stands before its inline data."""
        return _INODE.size + len(self.xattrs)


class ImageWriter:
    """Writes one image into an empty file.  `bytes_max` bounds it, holes included; `step` is told of what is written.

    Small files wait in `spool`, another empty file (without one, in one below /tmp).  ResourceExhaustedError when the
    bound is met; what `step` raises passes through.
    """

    def __init__(
        self, file: int, *, bytes_max: int, step: Callable[[int], None] = lambda _: None, spool: int | None = None
    ) -> None:
        self._file = file
        self._blocks_max = min(bytes_max // BLOCK, _BLOCKS_COUNT_MAX)
        self._step = step
        self._next_block = 1
        self._content_bytes = 0
        self._has_chunks = False
        self._spool = tempfile.TemporaryFile() if spool is None else os.fdopen(os.dup(spool), "w+b")  # noqa: SIM115
        self._spool_bytes = 0

    def close(self) -> None:
        """Let go of the spool; the files are the caller's."""
        self._spool.close()

    def _take_blocks(self, size: int) -> int:
        first, self._next_block = self._next_block, self._next_block + -(-size // BLOCK)
        if self._next_block > self._blocks_max:
            raise ResourceExhaustedError(f"the layer needs more than {self._blocks_max * BLOCK} bytes")
        return first

    # -- data ------------------------------------------------------------------------------------

    def write_data(self, blocks: Blocks, size: int, *, has_holes: bool = False) -> Data:
        """A file's content; with `has_holes` (and some size) only chunks that hold data take room."""
        self._content_bytes += size
        state = hashlib.sha256()
        if size <= INLINE_BYTES_MAX:
            content = b"".join(block for _, block in self._tracked(state, blocks))
            if not content:  # zeros are no blocks
                content = bytes(size)
                self._step(size)
            self._spool.write(content)
            offset, self._spool_bytes = self._spool_bytes, self._spool_bytes + size
            return Data(size, state.digest(), inline=offset)
        if has_holes and size >= HOLES_BYTES_MIN:
            return self._write_chunks(blocks, size, state)
        first = self._take_blocks(size)
        for offset, block in self._tracked(state, blocks):
            write_all(self._file, block, first * BLOCK + offset)
        return Data(size, state.digest(), block=first)

    def _write_chunks(self, blocks: Blocks, size: int, state: hashlib._Hash) -> Data:
        self._has_chunks = True
        bits = max(18, ((size - 1) // _CHUNKS_COUNT_MAX).bit_length())
        if bits > _CHUNK_BITS_MAX:
            raise InvalidArgumentError(f"a file of {size} bytes is too large for a layer")
        chunk = 1 << bits
        table = [-1] * -(-size // chunk)
        for offset, block in self._tracked(state, blocks):  # a block never crosses a chunk: both are powers of two
            index = offset >> bits
            if table[index] < 0:
                table[index] = self._take_blocks(min(chunk, size - index * chunk))
            write_all(self._file, block, table[index] * BLOCK + offset % chunk)
        return Data(size, state.digest(), chunk_bits=bits, chunks=tuple(table))

    def _tracked(self, state: hashlib._Hash, blocks: Blocks) -> Blocks:
        self._step(0)
        for offset, block in blocks:
            update(state, offset, block)
            self._step(len(block))
            yield offset, block

    # -- metadata --------------------------------------------------------------------------------

    def finish(self, root: Node) -> Written:
        """Write every inode of the tree, then the superblock.  InvalidArgumentError for what EROFS cannot hold."""
        inodes = _number(root)
        for inode in inodes:
            inode.xattrs = _encode_xattrs(inode.node.xattrs)
            inode.payload_bytes = _payload_bytes(inode)
            if inode.node.data is None and inode.payload_bytes > INLINE_BYTES_MAX:
                inode.block = self._take_blocks(inode.payload_bytes)
        metadata_block = self._next_block
        self._take_blocks(_place(inodes))
        with io.FileIO(os.dup(self._file), "r+") as raw, io.BufferedWriter(raw, 1 << 20) as out:
            out.seek(metadata_block * BLOCK)
            position = 0
            for inode in inodes:
                start = inode.nid * _SLOT
                encoded = self._encode_inode(inode)
                out.write(bytes(start - position))
                out.write(encoded)
                position = start + len(encoded)
                self._step(len(encoded))
        os.ftruncate(self._file, self._next_block * BLOCK)
        self._write_superblock(inodes, metadata_block)
        return Written(self._next_block * BLOCK, metadata_block * BLOCK, len(inodes), self._content_bytes)

    def _encode_inode(self, inode: _Inode) -> bytes:
        node = inode.node
        layout, address, size, tail = self._encode_payload(inode)
        mtime_s, mtime_ns = divmod(max(node.mtime_ns, 0), 1_000_000_000)
        icount = 1 + (len(inode.xattrs) - _XATTR_HEADER_BYTES) // 4 if inode.xattrs else 0
        head = _INODE.pack(_EXTENDED | layout << 1, icount, node.mode, 0, size, address, inode.number, node.uid,
                           node.gid, mtime_s, mtime_ns, inode.links_count)  # fmt: skip
        return head + inode.xattrs + tail

    def _encode_payload(self, inode: _Inode) -> tuple[int, int, int, bytes]:
        """Layout, the inode's address field, size, and what follows the inode."""
        node, data = inode.node, inode.node.data
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            return _PLAIN, _encode_device(node.rdev), 0, b""
        if data is None:
            payload = _encode_directory(inode) if node.is_directory else node.target
            if inode.block < 0:
                return (_INLINE if payload else _PLAIN), 0, len(payload), payload
            write_all(self._file, payload, inode.block * BLOCK)
            return _PLAIN, inode.block, len(payload), b""
        if data.chunk_bits:
            table = struct.pack(f"<{len(data.chunks)}I", *(_HOLE if block < 0 else block for block in data.chunks))
            return _CHUNKED, data.chunk_bits - 12, data.size, table
        if data.inline < 0 or not data.size:
            return _PLAIN, data.block, data.size, b""
        self._spool.seek(data.inline)
        return _INLINE, 0, data.size, self._spool.read(data.size)

    def _write_superblock(self, inodes: list[_Inode], metadata_block: int) -> None:
        encoded = _SUPERBLOCK.pack(
            _MAGIC, 0, _COMPAT_MTIME, 12, 0, inodes[0].nid, len(inodes), 0, 0, self._next_block, metadata_block, 0,
            bytes(16), bytes(16), _INCOMPAT_CHUNKS if self._has_chunks else 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        write_all(self._file, encoded, _SUPERBLOCK_OFFSET)


def write_all(file: int, data: bytes, offset: int) -> None:
    """Write every byte at `offset` of an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _number(root: Node) -> list[_Inode]:
    """Every inode once, directories before what is in them and siblings together, as `ls -l` reads them."""
    first = _Inode(root, 1, None, links_count=2)
    inodes, linked = [first], dict[int, _Inode]()
    for inode in inodes:  # grows while it is walked
        for name, node in sorted(inode.node.children.items()):
            child = linked.get(id(node))
            if child is None:
                child = _Inode(node, len(inodes) + 1, inode, links_count=1 if node.is_directory else 0)
                linked[id(node)] = child
                inodes.append(child)
            child.links_count += 1
            inode.links_count += node.is_directory
            inode.children.append((name, child))
    return inodes


def _place(inodes: list[_Inode]) -> int:
    """Give each inode its place in the metadata; bytes of all.  Inline data never crosses a block."""
    position = _SLOT  # not 0: no inode may have that number
    for inode in inodes:
        data = inode.node.data
        inline = inode.payload_bytes if inode.block < 0 and not (data and data.chunk_bits) else 0
        if position % BLOCK + _INODE.size > BLOCK:
            position += -position % BLOCK
        start = position + inode.head_bytes
        if inline and start // BLOCK != (start + inline - 1) // BLOCK:
            position += -start % BLOCK
            position += -position % _SLOT
        inode.nid = position // _SLOT
        position += inode.head_bytes + (4 * len(data.chunks) if data and data.chunk_bits else inline)
        position += -position % _SLOT
    return position + _SLOT  # fsck.erofs 1.5 looks for attributes behind the last inode, too


def _payload_bytes(inode: _Inode) -> int:
    """Bytes of what may stand inline behind the inode."""
    node = inode.node
    if node.data is not None:
        return node.data.size if node.data.inline >= 0 else 0
    if not node.is_directory:
        return len(node.target)
    *full, last = _directory_blocks(inode)
    return BLOCK * len(full) + sum(_DIRENT.size + len(name) for name, _ in last)


def _directory_blocks(inode: _Inode) -> list[list[tuple[bytes, _Inode]]]:
    """The entries of a directory, sorted, a list for each block they fill."""
    entries = sorted([(b".", inode), (b"..", inode.parent or inode), *inode.children], key=lambda entry: entry[0])
    blocks: list[list[tuple[bytes, _Inode]]] = [[]]
    room = BLOCK
    for entry in entries:
        needed = _DIRENT.size + len(entry[0])
        if needed > room:
            blocks.append([])
            room = BLOCK
        room -= needed
        blocks[-1].append(entry)
    return blocks


def _encode_directory(inode: _Inode) -> bytes:
    encoded = []
    for block in _directory_blocks(inode):
        offset = _DIRENT.size * len(block)
        for name, child in block:
            encoded.append(_DIRENT.pack(child.nid, offset, _FILE_TYPES[stat.S_IFMT(child.node.mode)]))
            offset += len(name)
        encoded += [name for name, _ in block]
        encoded.append(bytes(BLOCK - offset))
    return b"".join(encoded[:-1])


def _encode_xattrs(xattrs: dict[bytes, bytes]) -> bytes:
    if not xattrs:
        return b""
    encoded = bytearray(_XATTR_HEADER_BYTES)
    for name, value in sorted(xattrs.items()):
        prefix = next((prefix for prefix in _XATTR_NAMES if name.startswith(prefix)), name)
        index, rest = _XATTR_NAMES.get(prefix) or _XATTR_WHOLE.get(name, 0), name[len(prefix) :]
        if not index or not (rest or name in _XATTR_WHOLE) or len(rest) > 255 or len(value) > 0xFFFF:
            raise InvalidArgumentError(f"an attribute that no layer can have: {name[:100]!r}, {len(value)} bytes")
        encoded += _XATTR.pack(len(rest), index, len(value)) + rest + value
        encoded += bytes(-len(encoded) % 4)
    if len(encoded) > 4 * 0xFFFF:
        raise InvalidArgumentError(f"attributes of {len(encoded)} bytes on one file are too many for a layer")
    return bytes(encoded)


def _encode_device(rdev: int) -> int:
    """As the kernel's new_encode_dev."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12 & 0xFFFFFFFF
