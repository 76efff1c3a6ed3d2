"""A tar stream becomes a tree in one pass, however hostile it is."""

import contextlib
import gzip
import io
import stat
import subprocess
import tarfile

import pytest

from dsec.archive import Stream
from dsec.edge.images.archive import read_archive
from dsec.edge.images.streams import Section, unpacked
from dsec.edge.images.tree import CAPABILITY, OPAQUE
from dsec.errors import InvalidArgumentError, ResourceExhaustedError

DIR, LINK, HARD, CHAR = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE


@pytest.fixture
def read(write):
    """The tree of an archive, after its image was verified."""

    def read(data: bytes, **options):
        tree = None

        def make(writer):
            nonlocal tree
            tree = read_archive(Stream(io.BytesIO(data).read, 1 << 30), writer, **options)
            return tree

        write(make)
        return tree

    return read


def test_entries_of_every_kind_are_kept(read, tar, image, mounted, show):
    made = (
        tar()
        .add("d/", kind=DIR, mode=0o1750, uid=5, gid=6, mtime=1_600_000_000)
        .add("d/f", b"hello" * 1000, mode=0o4755, uid=70_000)
        .add("d/l", kind=LINK, linkname="/etc/passwd")
        .add("h", kind=HARD, linkname="./d/f")
        .add("c", kind=CHAR, devmajor=1, devminor=3, mode=0o600)
        .add("p", kind=tarfile.FIFOTYPE)
        .add("\udcff\n" + "long/" * 60 + "name", b"x")
    )
    read(made.bytes())
    shown = show(mounted(image))
    assert shown["d"] == ("drwxr-x--T", 5, 6, None)
    assert shown["d/f"] == ("-rwsr-xr-x", 70_000, 0, b"hello" * 1000)
    assert shown["d/l"] == ("lrwxrwxrwx", 0, 0, "/etc/passwd")
    assert shown["h"] == shown["d/f"]
    assert shown["c"][0] == "crw-------"
    assert shown["\udcff\n" + "long/" * 60 + "name"][3] == b"x"


def test_marks_of_image_layers_become_those_of_overlayfs(read, tar):
    made = (
        tar().add("a/.wh.gone").add("b/.wh..wh..opq").add("b/new", b"").add(".wh..wh.plnk/x", b"").add(".wh..wh.aufs")
    )
    tree = read(made.bytes())
    assert stat.S_ISCHR(tree.children[b"a"].children[b"gone"].mode)
    assert tree.children[b"b"].xattrs == {OPAQUE: b"y"}
    assert set(tree.children) == {b"a", b"b"}


def test_the_lowest_layer_hides_nothing(read, tar):
    tree = read(tar().add("a/.wh.gone").add("b/.wh..wh..opq").add("b/new", b"").bytes(), is_lowest=True)
    assert set(tree.children) == {b"b"}
    assert tree.children[b"b"].xattrs == {}


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../../b", "x" * 256, ".wh..", ".wh.", "a/.wh..."])
def test_a_path_that_leads_out_is_refused(read, tar, name):
    with pytest.raises(InvalidArgumentError):
        read(tar().add(name, b"").bytes())


def test_an_absolute_path_is_one_of_the_layer(read, tar):
    assert read(tar().add("/etc/passwd", b"x").bytes()).children[b"etc"].children[b"passwd"].data.size == 1


def test_nothing_is_written_through_a_link(read, tar):
    with pytest.raises(InvalidArgumentError, match="no directory"):
        read(tar().add("l", kind=LINK, linkname="/etc").add("l/shadow", b"x").bytes())


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "missing", "d"])
def test_a_hard_link_leads_to_a_file_of_the_layer_only(read, tar, target):
    with pytest.raises(InvalidArgumentError):
        read(tar().add("d", kind=DIR).add("h", kind=HARD, linkname=target).bytes())


@pytest.mark.parametrize("fields", [{"uid": -1}, {"gid": 1 << 40}, {"kind": b"Z"}, {"kind": LINK, "linkname": ""}])
def test_an_entry_that_no_file_system_has_is_refused(read, tar, fields):
    with pytest.raises(InvalidArgumentError):
        read(tar().add("a", **fields).bytes())


def test_times_beyond_reason_are_no_time(read, tar):
    tree = read(tar().add("a", mtime=-7).add("b", mtime=1 << 60).add("c", mtime=1.5e9).bytes())
    assert [tree.children[name].mtime_ns for name in (b"a", b"b", b"c")] == [0, 0, 1_500_000_000 * 10**9]


def test_attributes_are_kept_where_they_can_do_no_harm(read, tar):
    capability = b"\1\0\0\2" + bytes(16)
    headers = {
        "SCHILY.xattr.user.a": "\udcff\udc00"[:1] + "b",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.security.selinux": "x",
        "SCHILY.xattr.security.capability": capability.decode(),
    }
    tree = read(tar().add("a", b"", pax_headers=headers).bytes())
    assert tree.children[b"a"].xattrs == {b"user.a": b"\xffb", CAPABILITY: capability}


def test_odd_capabilities_are_refused(read, tar):
    with pytest.raises(InvalidArgumentError, match="capabilities"):
        read(tar().add("a", b"", pax_headers={"SCHILY.xattr.security.capability": "x"}).bytes())


def test_sparse_archive_members_are_refused(read, tar):
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000"}
    with pytest.raises(InvalidArgumentError):
        read(tar().add("a", b"1\n0\n1\n".ljust(512, b"\0") + b"x" * 512, pax_headers=headers).bytes())


def test_every_truncation_is_an_error_and_no_shorter_layer(read, tar):
    data = tar().add("a", b"x" * 1000).add("b", b"y").bytes().rstrip(b"\0")
    for length in (1, 300, 511, 600, 1500, 1540, 1800, 2047):
        with pytest.raises(InvalidArgumentError):
            read(data[:length])


def test_a_broken_header_is_an_error_and_no_end(read, tar):
    data = bytearray(tar().add("a", b"x").add("b", b"y").bytes())
    data[1024 + 150] ^= 1
    with pytest.raises(InvalidArgumentError, match="damaged"):
        read(bytes(data))


def test_something_behind_the_end_is_an_error(read, tar):
    with pytest.raises(InvalidArgumentError, match="follows its end"):
        read(tar().add("a").bytes() + b"more")


@pytest.mark.parametrize("data", [b"x", b"no tar at all" * 100, b"\xff" * 5000])
def test_what_is_no_archive_is_refused(read, data):
    with pytest.raises(InvalidArgumentError):
        read(data)


def test_a_header_that_wants_all_the_memory_is_refused(read, tar):
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, 1 << 33
    with pytest.raises(InvalidArgumentError, match="header of"):
        read(member.tobuf(tarfile.GNU_FORMAT))


def test_a_size_that_is_not_there_is_an_error(read):
    member = tarfile.TarInfo("a")
    member.size = 8 << 30
    with pytest.raises(InvalidArgumentError, match="middle of a file"):
        read(member.tobuf(tarfile.GNU_FORMAT))


def _packed(kind: str, data: bytes) -> bytes:
    if kind == "zstd":
        return subprocess.run(["zstd", "-q"], input=data, capture_output=True, check=True).stdout
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:]) if kind == "gzip" else data


@contextlib.contextmanager
def _unpacking(path, bytes_max=1 << 30):
    with path.open("rb") as file, unpacked(Section(file.fileno(), 0, path.stat().st_size), bytes_max) as stream:
        yield stream


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_compression_is_told_by_the_first_bytes(tmp_path, kind):
    data = bytes(range(256)) * 10_000
    path = tmp_path / "packed"
    path.write_bytes(b"before" + _packed(kind, data))
    with path.open("rb") as file:
        section = Section(file.fileno(), 6, path.stat().st_size - 6)
        with unpacked(section, 1 << 30) as stream:
            assert stream.take(1 << 30) == data
            assert stream.is_packed == (kind != "plain")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_damaged_compression_is_an_error(tmp_path, kind, harm):
    packed = bytearray(_packed(kind, bytes(range(256)) * 10_000))
    if harm == "cut":
        del packed[-20:]
    else:
        packed[len(packed) // 3] ^= 255
    path = tmp_path / "packed"
    path.write_bytes(packed)
    with _unpacking(path) as stream, pytest.raises(InvalidArgumentError, match="cannot be read"):
        stream.skip(1 << 30)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_goes_off_at_the_bound(tmp_path, kind):
    path = tmp_path / "bomb"
    path.write_bytes(_packed(kind, bytes(64 << 20)))
    with _unpacking(path, 8 << 20) as stream, pytest.raises(ResourceExhaustedError, match="unpacks to more"):
        stream.skip(64 << 20)
