"""What the writer writes, the kernel shows; and mkfs.erofs's own checker finds nothing."""

import contextlib
import hashlib
import os
import stat
import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsec.edge.images import content
from dsec.edge.images.erofs import BLOCK, INLINE_BYTES_MAX, ImageWriter
from dsec.edge.images.tree import Node, directory
from dsec.edge.images.verify import verify
from dsec.errors import InvalidArgumentError, ResourceExhaustedError

SIZES = (0, 1, INLINE_BYTES_MAX - 1, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, BLOCK - 1, BLOCK, BLOCK + 1, 300_000)


def test_files_of_every_size_read_back(write, regular, image, mounted):
    def make(writer):
        root = directory()
        for size in SIZES:
            root.children[b"%d" % size] = regular(writer, os.urandom(size))
        root.children[b"zeros"] = regular(writer, bytes(5000))
        root.children[b"few zeros"] = regular(writer, bytes(100))
        return root

    assert write(make).content_bytes == sum(SIZES) + 5100
    assert sorted(os.listdir(mounted(image))) == sorted(["zeros", "few zeros", *map(str, SIZES)])


@pytest.mark.parametrize("count", [0, 1, 2, 100, 101, 102, 103, 5000])
@pytest.mark.parametrize("length", [1, 28, 255])
def test_directories_of_every_size_read_back(write, count, length):
    names = {b"%0*d" % (length, n) for n in range(count if length > 3 else min(count, 10**length))} | {b"!", b"~"}

    def make(writer):
        root = directory()
        root.children = {name: Node(stat.S_IFIFO | 0o600) for name in names}
        return root

    assert write(make).entries_count == len(names) + 1


def test_every_kind_of_inode_reads_back(write, image, mounted):
    def make(writer):
        root = directory(0o1777)
        root.children = {
            b"link": Node(stat.S_IFLNK | 0o777, target=b"x" * 4095),
            b"short": Node(stat.S_IFLNK | 0o777, target=b"."),
            b"pipe": Node(stat.S_IFIFO | 0o622, 1, 2),
            b"socket": Node(stat.S_IFSOCK | 0o755),
            b"block": Node(stat.S_IFBLK | 0o660, rdev=os.makedev(4095, 1_000_000)),
            b"char": Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            b"whiteout": Node(stat.S_IFCHR),
            b"owned": Node(stat.S_IFDIR | 0o6750, (1 << 32) - 2, 70_000, 1_700_000_000_123_456_789),
            b"old": Node(stat.S_IFDIR | 0o755, mtime_ns=-5),
            b"\xff\n\x01": Node(stat.S_IFDIR | 0o755),
        }
        return root

    write(make)
    assert os.stat(mounted(image) / "owned").st_mtime_ns == 1_700_000_000_123_456_789


def test_hard_links_are_one_inode(write, regular, image, mounted):
    def make(writer):
        root = directory()
        root.children[b"a"] = root.children[b"b"] = regular(writer, b"x")
        root.children[b"d"] = directory()
        root.children[b"d"].children[b"c"] = root.children[b"a"]
        return root

    assert write(make).entries_count == 3
    root = mounted(image)
    assert {os.stat(root / name).st_ino for name in ("a", "b", "d/c")} == {os.stat(root / "a").st_ino}
    assert os.stat(root / "a").st_nlink == 3
    assert os.stat(f"{root}/").st_nlink == 3


def test_attributes_read_back(write, regular, image, mounted):
    def make(writer):
        root = directory()
        root.xattrs = {b"trusted.overlay.opaque": b"y"}
        root.children[b"a"] = regular(writer, b"x" * 1500, xattrs={b"user.big": b"v" * 9000, b"user.e": b""})
        root.children[b"b"] = regular(writer, b"x" * 5000, xattrs={b"security.capability": b"\1\0\0\2" + bytes(16)})
        root.children[b"c"] = regular(writer, b"", xattrs={b"user.%03d" % n: b"%d" % n for n in range(300)})
        return root

    write(make)
    assert os.getxattr(mounted(image) / "a", "user.big") == b"v" * 9000


@pytest.mark.parametrize(
    "xattrs",
    [{b"user." + b"n" * 256: b""}, {b"user.a": b"v" * 65536}, {b"system.other": b""}, {b"odd": b""}, {b"user.": b""}],
)
def test_an_attribute_that_erofs_cannot_hold_is_refused(write, xattrs):
    with pytest.raises(InvalidArgumentError, match="attribute"):
        write(lambda writer: Node(stat.S_IFDIR | 0o755, xattrs=xattrs))


def test_too_many_attributes_are_refused(write):
    xattrs = {b"user.%d" % n: b"v" * 60_000 for n in range(5)}
    with pytest.raises(InvalidArgumentError, match="too many"):
        write(lambda writer: Node(stat.S_IFDIR | 0o755, xattrs=xattrs))


@pytest.mark.parametrize("size", [1 << 20, (1 << 30) + 100, 1 << 45, (1 << 56) + 12345])
def test_a_file_of_holes_takes_no_room_and_no_time(write, image, mounted, tmp_path, size):
    marks = {0: b"start", size // 2: b"middle", size - 3: b"end"}

    def blocks():
        for offset, mark in sorted(marks.items()):
            start = offset - offset % content.BLOCK_BYTES
            length = min(content.BLOCK_BYTES, size - start)
            yield start, bytes(offset - start) + mark + bytes(length - (offset - start) - len(mark))

    def make(writer):
        root = directory()
        root.children[b"sparse"] = Node(stat.S_IFREG | 0o600, data=writer.write_data(blocks(), size, has_holes=True))
        return root

    with contextlib.closing(ImageWriter(image, bytes_max=1 << 44)) as writer:
        root = make(writer)
        written = writer.finish(root)
    assert written.content_bytes == size
    assert os.fstat(image).st_blocks * 512 < 4 << 20
    if size < 1 << 40:  # beyond, the kernel itself takes its time to find that nothing is there
        verify(image, root)
    with open(mounted(image) / "sparse", "rb") as file:
        for offset, mark in marks.items():
            assert os.pread(file.fileno(), len(mark), offset) == mark


def test_holes_and_zeros_have_the_same_digest(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x" + bytes(3 << 20) + b"y")
    with path.open("rb") as file:
        whole = content.digest(content.of_file(file.fileno(), path.stat().st_size))
    with open(tmp_path / "s", "w+b") as file:
        file.write(b"x")
        file.seek((3 << 20) + 1)
        file.write(b"y")
        file.flush()
        assert content.digest(content.of_file(file.fileno(), path.stat().st_size)) == whole


def test_an_image_is_bounded(write, regular):
    with pytest.raises(ResourceExhaustedError, match="65536 bytes"):
        write(lambda writer: regular(writer, bytes(70_000)), bytes_max=65_536)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    with path.open("rb") as file, pytest.raises(InvalidArgumentError, match="changed"):
        list(content.of_file(file.fileno(), 200))


def test_the_same_tree_gives_the_same_bytes(tmp_path, regular):
    digests = set()
    for order in (1, -1):
        fd = os.open(tmp_path / f"{order}", os.O_RDWR | os.O_CREAT)
        with contextlib.closing(ImageWriter(fd, bytes_max=1 << 30)) as writer:
            root = directory()
            one, two = regular(writer, b"1"), regular(writer, b"2" * 5000)
            root.children = dict([(b"one", one), (b"two", two)][::order])
            writer.finish(root)
        os.close(fd)
        digests.add(hashlib.sha256((tmp_path / f"{order}").read_bytes()).digest())
    assert len(digests) == 1


names = st.binary(min_size=1, max_size=20).filter(lambda n: n not in {b".", b".."} and not {0, 47} & set(n))
leaves = st.one_of(
    st.tuples(st.just("file"), st.integers(0, 9000)),
    st.tuples(st.just("link"), st.integers(1, 4095)),
    st.tuples(st.just("pipe"), st.just(0)),
)
trees = st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=8), max_leaves=60)
attributes = st.dictionaries(
    st.binary(min_size=1, max_size=20).filter(lambda n: 0 not in n), st.binary(max_size=300), max_size=3
)


@settings(max_examples=60)
@given(st.dictionaries(names, trees, max_size=40), attributes)
def test_any_tree_reads_back_and_passes_fsck(described, xattrs):
    def node(writer, what):
        if isinstance(what, dict):
            return Node(stat.S_IFDIR | 0o755, children={name: node(writer, child) for name, child in what.items()})
        kind, size = what
        named = {b"user." + name: value for name, value in xattrs.items()}
        if kind == "file":
            blocks = iter([(0, b"d" * size)] if size else [])
            return Node(stat.S_IFREG | 0o640, size, size, size, named, data=writer.write_data(blocks, size))
        return Node(stat.S_IFLNK | 0o777, target=b"t" * size) if kind == "link" else Node(stat.S_IFIFO)

    with tempfile.NamedTemporaryFile() as file:
        with contextlib.closing(ImageWriter(file.fileno(), bytes_max=1 << 30)) as writer:
            root = node(writer, described)
            writer.finish(root)
        verify(file.fileno(), root)
        subprocess.run(["fsck.erofs", file.name], check=True, capture_output=True)
