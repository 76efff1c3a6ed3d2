"""Directories become layers as they are; a sandbox's disk becomes one with the sandbox's own owners."""

import os
import socket
import stat
import struct
from pathlib import Path

import pytest

from dsec.archive import DEPTH_MAX
from dsec.edge.images.directory import IDS_COUNT, DirectoryReader
from dsec.edge.images.tree import OPAQUE
from dsec.errors import HostUnfitError, InvalidArgumentError

FIRST = 0x10000000
ACL = struct.Struct("<HHI")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    return path


def test_a_directory_reads_back_as_it_is(source, write, image, mounted, show):
    (source / "a").write_text("hello")
    (source / "a").chmod(0o4711)
    os.chown(source / "a", 1000, 2000)
    os.link(source / "a", source / "b")
    (source / "l").symlink_to("/nowhere")
    (source / "d").mkdir(mode=0o700)
    os.mkfifo(source / "d" / "p")
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(source / "a", "user.x", b"y")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "s"))
    written = write(lambda writer: DirectoryReader(writer).read(source))
    assert written.entries_count == 7
    assert show(mounted(image)) == show(source)


def test_a_sandboxs_owners_are_counted_from_its_first(source, write):
    for n, name in ((0, "root"), (1000, "user"), (IDS_COUNT - 1, "last")):
        (source / name).touch()
        os.chown(source / name, FIRST + n, FIRST + n)
    for name, owner in (("below", FIRST - 1), ("host", 0), ("above", FIRST + IDS_COUNT)):
        (source / name).touch()
        os.chown(source / name, owner, owner)
    os.chown(source, FIRST, FIRST)
    tree = None

    def make(writer):
        nonlocal tree
        tree = DirectoryReader(writer, FIRST).read(source)
        return tree

    write(make)
    found = {name.decode(): (node.uid, node.gid) for name, node in tree.children.items()}
    assert found == {
        "root": (0, 0), "user": (1000, 1000), "last": (65535, 65535),
        "below": (65534, 65534), "host": (65534, 65534), "above": (65534, 65534),
    }  # fmt: skip
    assert (tree.uid, tree.gid) == (0, 0)


def test_owners_in_attributes_are_counted_too(source, write):
    (source / "f").touch()
    entries = [(1, 6, 0xFFFFFFFF), (2, 7, FIRST + 5), (4, 4, 0xFFFFFFFF), (8, 4, FIRST + 6), (16, 7, 0xFFFFFFFF),
               (32, 0, 0xFFFFFFFF)]  # fmt: skip
    acl = struct.pack("<I", 2) + b"".join(ACL.pack(*entry) for entry in entries)
    os.setxattr(source / "f", "system.posix_acl_access", acl)
    os.setxattr(source / "f", "security.capability", struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, FIRST))
    tree = None

    def make(writer):
        nonlocal tree
        tree = DirectoryReader(writer, FIRST).read(source)
        return tree

    write(make)
    xattrs = tree.children[b"f"].xattrs
    kept = list(ACL.iter_unpack(xattrs[b"system.posix_acl_access"][4:]))
    assert [entry[2] for entry in kept] == [0xFFFFFFFF, 5, 0xFFFFFFFF, 6, 0xFFFFFFFF, 0xFFFFFFFF]
    assert xattrs[b"security.capability"] == struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


def test_what_an_overlay_notes_for_itself_is_left_out(source, write):
    (source / "d").mkdir()
    os.setxattr(source / "d", "trusted.overlay.opaque", b"y")
    for name in ("trusted.overlay.origin", "trusted.overlay.impure", "trusted.other", "security.selinux"):
        os.setxattr(source / "d", name, b"y")
    os.mknod(source / "gone", stat.S_IFCHR | 0o644, 0)
    tree = None

    def make(writer):
        nonlocal tree
        tree = DirectoryReader(writer, FIRST).read(source)
        return tree

    write(make)
    assert tree.children[b"d"].xattrs == {OPAQUE: b"y"}
    assert (tree.children[b"gone"].mode, tree.children[b"gone"].uid) == (stat.S_IFCHR, 0)


@pytest.mark.parametrize("name", ["redirect", "metacopy"])
def test_an_upper_that_is_not_whole_by_itself_is_refused(source, write, name):
    (source / "d").mkdir()
    os.setxattr(source / "d", f"trusted.overlay.{name}", b"/x")
    with pytest.raises(HostUnfitError, match=name):
        write(lambda writer: DirectoryReader(writer, FIRST).read(source))


def test_links_are_kept_and_never_followed(source, write, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    (source / "l").symlink_to(tmp_path / "secret")
    written = write(lambda writer: DirectoryReader(writer).read(source))
    assert written.entries_count == 2
    with pytest.raises(InvalidArgumentError):
        write(lambda writer: DirectoryReader(writer).read(source / "l"))


def test_a_mount_point_is_refused(write):
    with pytest.raises(InvalidArgumentError, match="mount point"):
        write(lambda writer: DirectoryReader(writer).read(Path("/dev")))


@pytest.mark.parametrize("name", ["missing", "file"])
def test_only_a_directory_can_be_read(source, write, name):
    (source / "file").touch()
    with pytest.raises(InvalidArgumentError, match=name):
        write(lambda writer: DirectoryReader(writer).read(source / name))


def test_a_tree_that_is_too_deep_is_refused(source, write):
    path = source
    for _ in range(DEPTH_MAX + 2):
        path /= "d"
    path.mkdir(parents=True)
    with pytest.raises(InvalidArgumentError, match="deeper"):
        write(lambda writer: DirectoryReader(writer).read(source))


def test_a_sparse_file_stays_small(source, write, image):
    with (source / "sparse").open("wb") as file:
        file.write(b"a")
        file.truncate(8 << 30)
    written = write(lambda writer: DirectoryReader(writer).read(source))
    assert written.content_bytes == 8 << 30
    assert os.fstat(image).st_size < 2 << 20
