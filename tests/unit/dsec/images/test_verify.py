"""A damaged image, or one that shows something else than was meant, gets no name."""

import contextlib
import copy
import os
import stat

import pytest

from dsec.edge.images.erofs import ImageWriter
from dsec.edge.images.tree import Node, directory
from dsec.edge.images.verify import verify
from dsec.errors import HostUnfitError


@pytest.fixture
def tree(image, regular):
    with contextlib.closing(ImageWriter(image, bytes_max=1 << 30)) as writer:
        root = directory()
        root.children = {
            b"f": regular(writer, b"content" * 1000, xattrs={b"user.a": b"b"}),
            b"l": Node(stat.S_IFLNK | 0o777, target=b"target"),
            b"d": directory(),
            b"c": Node(stat.S_IFCHR | 0o600, rdev=os.makedev(1, 3)),
        }
        root.children[b"d"].children[b"hard"] = root.children[b"f"]
        writer.finish(root)
    verify(image, root)
    return root


def _other_content(root):
    data = root.children[b"f"].data
    root.children[b"f"].data = type(data)(data.size, b"?" * 32, block=data.block)


CHANGES = {
    "names": lambda root: root.children.pop(b"l"),
    "more names": lambda root: root.children.update({b"x": directory()}),
    "mode": lambda root: setattr(root.children[b"d"], "mode", 0o040700),
    "kind": lambda root: setattr(root.children[b"d"], "mode", stat.S_IFIFO | 0o755),
    "owner": lambda root: setattr(root.children[b"l"], "uid", 1),
    "group": lambda root: setattr(root, "gid", 1),
    "time": lambda root: setattr(root.children[b"c"], "mtime_ns", 1),
    "device": lambda root: setattr(root.children[b"c"], "rdev", os.makedev(1, 5)),
    "target": lambda root: setattr(root.children[b"l"], "target", b"tarGet"),
    "content": _other_content,
    "attributes": lambda root: setattr(root.children[b"f"], "xattrs", {b"user.a": b"c"}),
    "directory's attributes": lambda root: setattr(root.children[b"d"], "xattrs", {b"user.a": b"c"}),
    "hard link": lambda root: root.children[b"d"].children.update({b"hard": copy.copy(root.children[b"f"])}),
    "no hard link": lambda root: root.children.update({b"l": root.children[b"d"], b"d": root.children[b"d"]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_difference_is_found(image, tree, change):
    change(tree)
    with pytest.raises(HostUnfitError, match="differs at"):
        verify(image, tree)


def test_a_changed_byte_of_content_is_found(image, tree):
    offset = tree.children[b"f"].data.block * 4096
    os.pwrite(image, b"X", offset + 3000)
    with pytest.raises(HostUnfitError, match="content"):
        verify(image, tree)


def test_what_does_not_mount_is_an_error(image, tree):
    os.pwrite(image, b"X", 1024)
    with pytest.raises(HostUnfitError, match="cannot be mounted"):
        verify(image, tree)
