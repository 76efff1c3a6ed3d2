"""Reading archives that somebody else made: tar streams, bounded, one pass, with nothing unpacked.

An archive is hostile: its paths are taken apart by name, its sizes are bounded, its damage is an error and no early
end.  Headers are read here and not by `tarfile`, which searches them with regular expressions in quadratic time, keeps
global headers and maps of sparse files without a bound, and calls itself for each header before a header.

Invariants:
    1. Time is linear in the bytes of the stream; no step looks at a byte of a header more than a few times.
    2. Memory is what a few headers of HEADER_BYTES_MAX say of one entry, and three numbers that are said of all.

See: POSIX.1-2024, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator

import msgspec

from dsec.errors import InvalidArgumentError, ResourceExhaustedError

HEADER_BYTES_MAX = 1 << 20
"""One header of attributes or of a long name: a file of a layer may have 256 KiB of attributes."""
NAME_BYTES_MAX = 255
DEPTH_MAX = 256
FILE, HARD_LINK, LINK, CHARACTER, BLOCK, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_COPY_BYTES = 1 << 20
_BLOCK_BYTES = 512
_END = bytes(_BLOCK_BYTES)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64s8s8s155s12x")
_SIGNED = struct.Struct("512b")
_GNU = b"ustar  \0"
_OLD_FILES, _SPARSE = {b"\0", b"7"}, b"S"
_PAX, _PAX_OF_SUN, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK = b"x", b"X", b"g", b"L", b"K"
_BEFORE_AN_ENTRY = {_PAX, _PAX_OF_SUN, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK}
_WITHOUT_DATA = {HARD_LINK, LINK, CHARACTER, BLOCK, DIRECTORY, FIFO}
_KEYS_OF_ALL, _KEYS_OF_ONE = {b"mtime", b"uid", b"gid"}, {b"path", b"linkpath", b"size"}
_SPARSE_KEYS, _XATTR = b"GNU.sparse.", b"SCHILY.xattr."
_LENGTH_DIGITS_MAX, _NUMBER_DIGITS_MAX = 7, 40


class Stream:
    """Bytes in order, no more than `bytes_max` of them, and their sha256.

    `is_packed`: they come out of a decompressor.  With `skip`, skipped bytes are neither read nor in the sha256.
    """

    def __init__(
        self,
        read: Callable[[int], bytes | None],
        bytes_max: int,
        *,
        is_packed: bool = False,
        skip: Callable[[int], None] | None = None,
    ) -> None:
        self.is_packed = is_packed
        self._read = read
        self._bytes_max = bytes_max
        self._skip = skip
        self._state = hashlib.sha256()
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end.

        InvalidArgumentError for damaged compression, ResourceExhaustedError beyond the bound.
        """
        taken = []
        while count:
            try:
                block = self._read(min(count, _COPY_BYTES))
            except (OSError, EOFError, zlib.error) as error:
                raise InvalidArgumentError(f"an archive cannot be read: {error}") from error
            if not block:
                break
            self._state.update(block)
            taken.append(block)
            count -= len(block)
            self.position += len(block)
            if self.position > self._bytes_max:
                raise ResourceExhaustedError(f"an archive unpacks to more than {self._bytes_max} bytes")
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def skip(self, count: int) -> None:
        """Go on by `count` bytes, or to the end."""
        if self._skip is not None:
            self._skip(count)
            self.position += count
            return
        while count > 0 and (block := self.take(min(count, _COPY_BYTES))):
            count -= len(block)

    @property
    def digest(self) -> str:
        """The sha256 of what was taken, in hex digits."""
        return self._state.hexdigest()


class Member(msgspec.Struct, frozen=True):
    """An entry: what its header says of it.  `size` bytes of data lie at `offset` of the stream."""

    path: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime_s: int
    size: int
    offset: int
    target: bytes
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]

    @property
    def name(self) -> str:
        """The path, to be shown."""
        return os.fsdecode(self.path)


def members(stream: Stream) -> Iterator[Member]:
    """The entries of a tar stream, to its very end; what of an entry's data is not taken is skipped.

    InvalidArgumentError for anything that is no tar, and for sparse files.
    """
    of_all: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    seen: set[bytes] = set()
    while (block := stream.take(_BLOCK_BYTES)) and block != _END:
        position = stream.position - len(block)
        header = _Header(block, position)
        if header.kind not in _BEFORE_AN_ENTRY:
            member = header.member(own, of_all, stream.position)
            yield member
            _pass(stream, member)
            own, seen = {}, set()
            continue
        if header.kind != _PAX_OF_ALL:
            if header.kind in seen:
                raise _damaged("two headers of one kind for one entry", position)
            seen.add(header.kind)
        data = header.data(stream)
        if header.kind in {_LONG_NAME, _LONG_LINK}:
            own[b"path" if header.kind == _LONG_NAME else b"linkpath"] = _text(data)
        elif header.kind == _PAX_OF_ALL:
            of_all.update(_said_of_all(data, position))
        else:
            own.update(_said_of_one(data, position))
    if seen:
        raise _damaged("a header without its entry", stream.position)
    if not stream.position:
        raise _damaged("nothing", 0)
    while padding := stream.take(_COPY_BYTES):
        if padding != bytes(len(padding)):
            raise InvalidArgumentError("a damaged tar archive: something follows its end")


class _Header:
    """A block that begins an entry, or that says something of the next one.  InvalidArgumentError for any other."""

    def __init__(self, block: bytes, position: int) -> None:
        if len(block) != _BLOCK_BYTES:
            raise _damaged("no whole header", position)
        self._position = position
        (
            self._name, self._mode, self._uid, self._gid, size, self._mtime, checksum, self.kind, self._target,
            magic, _, self._major, self._minor, self._prefix,
        ) = _HEADER.unpack(block)  # fmt: skip
        summed = block[:148] + b" " * 8 + block[156:]
        if self._number(checksum) not in {sum(summed), sum(_SIGNED.unpack(summed))}:
            raise _damaged("no header", position)
        if magic == _GNU:
            self._prefix = b""
        self._size = self._number(size)

    def data(self, stream: Stream) -> bytes:
        """What a header of more than one block says, taken from the stream."""
        if not 0 <= self._size <= HEADER_BYTES_MAX:
            raise InvalidArgumentError(f"an archive's header of {self._size} bytes")
        data = stream.take(_padded(self._size))
        if len(data) != _padded(self._size):
            raise _damaged("unexpected end of data", self._position)
        return data[: self._size]

    def member(self, own: dict[bytes, bytes], of_all: dict[bytes, bytes], offset: int) -> Member:
        """The entry, with what was said of it alone and of all."""

        def number(key: bytes, field: bytes) -> int:
            said = own.get(key) or of_all.get(key)
            return self._number(field) if said is None else _decimal(said, self._position)

        prefix = _text(self._prefix)
        path = own.get(b"path") or (prefix + b"/" if prefix else b"") + _text(self._name)
        kind = FILE if self.kind in _OLD_FILES else self.kind
        if self.kind == b"\0" and path.endswith(b"/"):
            kind = DIRECTORY  # as before there was a kind for it
        if kind == _SPARSE or _SPARSE_KEYS in own:
            raise InvalidArgumentError(f"{os.fsdecode(path)!r:.200} is a sparse file: pack it without --sparse")
        size = _decimal(own[b"size"], self._position) if b"size" in own else self._size
        if size < 0:
            raise InvalidArgumentError("an archive's sizes contradict each other")
        is_device = kind in {CHARACTER, BLOCK}
        return Member(
            path=path.rstrip(b"/") if kind == DIRECTORY else path,
            kind=kind,
            mode=self._number(self._mode),
            uid=number(b"uid", self._uid),
            gid=number(b"gid", self._gid),
            mtime_s=number(b"mtime", self._mtime),
            size=0 if kind in _WITHOUT_DATA else size,
            offset=offset,
            target=own.get(b"linkpath") or _text(self._target),
            device=(self._number(self._major), self._number(self._minor)) if is_device else (0, 0),
            xattrs={key[len(_XATTR) :]: value for key, value in own.items() if key.startswith(_XATTR)},
        )

    def _number(self, field: bytes) -> int:
        """In octal, or in base 256, as GNU tar writes what is too long for that."""
        if field[0] in {0x80, 0xFF}:
            return int.from_bytes(field[1:], "big") - ((field[0] & 1) << 8 * (len(field) - 1))
        digits = _text(field).strip(b" ")
        if digits.strip(b"01234567"):
            raise _damaged("no header", self._position)
        return int(digits or b"0", 8)


def _said_of_one(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    for key, value in _records(data, position):
        if key.startswith(_SPARSE_KEYS):
            yield _SPARSE_KEYS, b""
        elif key.startswith(_XATTR):
            yield key, value
        elif key in _KEYS_OF_ALL | _KEYS_OF_ONE and value:  # an empty one means nothing
            if b"\0" in value:
                raise _damaged(f"{key.decode()} with a zero byte", position)
            yield key, value


def _said_of_all(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Times and owners; `git archive` writes a comment.  What only one entry can have is refused."""
    for key, value in _records(data, position):
        if key in _KEYS_OF_ONE or key.startswith((_SPARSE_KEYS, _XATTR)):
            raise InvalidArgumentError(f"an archive that gives all entries one {key[:100]!r}, at byte {position}")
        if key in _KEYS_OF_ALL and value:
            _decimal(value, position)
            yield key, value


def _records(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header: lines `LENGTH KEY=VALUE`, where LENGTH is that of the whole line."""
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + _LENGTH_DIGITS_MAX + 1)
        digits = data[start : max(space, start)]
        end = start + int(digits) if digits.isdigit() else 0
        equals = data.find(b"=", space + 1, end)
        if not space < equals < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _damaged(f"no record {start} bytes into the pax header", position)
        yield data[space + 1 : equals], data[equals + 1 : end - 1]
        start = end


def _decimal(value: bytes, position: int) -> int:
    """A number of a pax header without its fraction."""
    whole, _, fraction = value.partition(b".")
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or len(value) > _NUMBER_DIGITS_MAX or fraction.strip(b"0123456789"):
        raise _damaged(f"{value[:40]!r} for a number", position)
    return int(whole)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    return size + -size % _BLOCK_BYTES


def _pass(stream: Stream, member: Member) -> None:
    """Go on to the next header; a stream that ends before is damaged, also one that skips without reading."""
    rest = member.offset + _padded(member.size) - stream.position
    if rest > 0:
        stream.skip(rest - 1)
        if not stream.take(1):
            raise _damaged("unexpected end of data", member.offset)


def _damaged(what: str, position: int) -> InvalidArgumentError:
    return InvalidArgumentError(f"not a tar archive, or a damaged one: {what} at byte {position}")


def parts(path: bytes) -> tuple[bytes, ...]:
    """The names in a path; a leading slash and `.` mean nothing.  InvalidArgumentError for `..` and the like."""
    names = tuple(name for name in path.split(b"/") if name not in {b"", b"."})
    if b".." in names or b"\0" in path or any(len(name) > NAME_BYTES_MAX for name in names):
        raise InvalidArgumentError(f"a path that no layer can have: {path[:200]!r}")
    if len(names) > DEPTH_MAX:
        raise InvalidArgumentError(f"a path of more than {DEPTH_MAX} names: {path[:200]!r}")
    return names
