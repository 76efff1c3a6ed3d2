"""A tree is built by name alone."""

import pytest

from dsec.archive import DEPTH_MAX, parts
from dsec.edge.images import tree
from dsec.edge.images.tree import OPAQUE, Node, Tree, below, directory, hide_missing
from dsec.errors import InvalidArgumentError

FILE = 0o100644


def test_a_path_is_its_names():
    assert parts(b"/a/./b//c/") == (b"a", b"b", b"c")
    assert parts(b"./") == ()


@pytest.mark.parametrize("path", [b"..", b"a/../b", b"/a/..", b"a\0b", b"x" * 256, b"a/" * (DEPTH_MAX + 1)])
def test_a_path_that_no_layer_can_have_is_refused(path):
    with pytest.raises(InvalidArgumentError):
        parts(path)


def test_directories_on_the_way_appear():
    made = Tree()
    made.add(b"a/b/c", Node(FILE))
    assert made.find(b"a/b").is_directory
    assert made.find(b"a/b/c").mode == FILE
    assert made.find(b"a/b/c/d") is None
    assert made.entries_count == 3


def test_nothing_lies_below_a_file_or_a_link():
    made = Tree()
    made.add(b"a", Node(0o120777, target=b"/etc"))
    with pytest.raises(InvalidArgumentError, match="no directory"):
        made.add(b"a/passwd", Node(FILE))


def test_the_later_of_two_entries_counts_and_a_directory_keeps_its_content():
    made = Tree()
    made.add(b"d/x", Node(FILE))
    made.add(b"d", directory(0o700))
    assert made.find(b"d").mode & 0o777 == 0o700
    assert made.find(b"d/x") is not None
    made.add(b"d", Node(FILE))
    assert made.find(b"d/x") is None


def test_the_root_can_be_described_but_only_as_a_directory():
    made = Tree()
    made.add(b"x", Node(FILE))
    made.add(b"./", directory(0o711))
    assert made.finish().mode & 0o777 == 0o711
    assert made.find(b"x") is not None
    with pytest.raises(InvalidArgumentError):
        made.add(b"/", Node(FILE))


def test_a_hard_link_is_another_name_of_a_file_before_it():
    made = Tree()
    made.add(b"a", Node(FILE))
    made.link(b"d/b", b"/a")
    assert made.find(b"d/b") is made.find(b"a")
    for target in (b"nothing", b"d", b"../a"):
        with pytest.raises(InvalidArgumentError):
            made.link(b"c", target)


def test_what_is_hidden_becomes_a_whiteout_unless_the_layer_has_it_itself():
    made = Tree()
    made.hide(b"gone")
    made.hide(b"file")
    made.hide(b"dir")
    made.add(b"file", Node(FILE))
    made.add(b"dir/x", Node(FILE))
    root = made.finish()
    assert root.children[b"gone"].mode == 0o020000
    assert root.children[b"gone"].rdev == 0
    assert root.children[b"file"].mode == FILE
    assert root.children[b"dir"].xattrs == {OPAQUE: b"y"}


def test_opaqueness_is_kept_whatever_comes_first():
    made = Tree()
    made.make_opaque(b"a")
    made.add(b"a", directory(0o700))
    made.make_opaque(b"b/c")
    root = made.finish()
    assert root.children[b"a"].xattrs == {OPAQUE: b"y"}
    assert root.children[b"a"].mode & 0o777 == 0o700
    assert root.children[b"b"].children[b"c"].xattrs == {OPAQUE: b"y"}


def test_the_root_cannot_be_hidden():
    with pytest.raises(InvalidArgumentError):
        Tree().hide(b"./")


def test_a_tree_can_be_put_below_a_path():
    root = below(b"/work/space", Node(0o040700))
    assert root.children[b"work"].children[b"space"].mode == 0o040700


def test_what_is_missing_is_hidden_where_its_directory_is_there():
    root = below(b"etc", directory())
    root.children[b"file"] = Node(FILE)
    hide_missing(root, ["etc", "etc/passwd", "var", "var/log", "file/x", "file"])
    assert root.children[b"etc"].children[b"passwd"].mode == 0o020000
    assert root.children[b"var"].mode == 0o020000
    assert root.children[b"var"].children == {}
    assert root.children[b"file"].mode == FILE
    assert root.children[b"etc"].is_directory


def test_the_count_of_entries_is_bounded(monkeypatch):
    monkeypatch.setattr(tree, "ENTRIES_COUNT_MAX", 3)
    made = Tree()
    made.add(b"a/b/c", Node(FILE))
    with pytest.raises(InvalidArgumentError, match="more than 3"):
        made.add(b"d", Node(FILE))


@pytest.mark.parametrize(
    "add",
    [
        lambda made, number: made.add(b"%d" % number, Node(FILE)),
        lambda made, number: made.add(b"%d/%d/x" % (number, number), Node(FILE)),
        lambda made, _: made.add(b"a", Node(FILE, xattrs={b"user.a": b"x" * 1000})),
        lambda made, _: made.add(b"a", Node(0o120777, target=b"x" * 1000)),
        lambda made, _: made.hide(b"a"),
        lambda made, _: made.make_opaque(b"."),
    ],
    ids=["names", "directories", "attributes", "targets", "hidden", "opaque"],
)
def test_what_a_tree_keeps_is_bounded(monkeypatch, add):
    monkeypatch.setattr(tree, "TEXT_BYTES_MAX", 10_000)
    made = Tree()
    with pytest.raises(InvalidArgumentError, match="more than 10000 bytes"):
        any(add(made, number) for number in range(200))
