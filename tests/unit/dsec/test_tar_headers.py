"""Tar headers are read as `tarfile` reads them where they are sound, and in bounded work where they mean harm."""

from __future__ import annotations

import gc
import io
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dsec.archive import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARD_LINK,
    HEADER_BYTES_MAX,
    LINK,
    Member,
    Stream,
    members,
)
from dsec.errors import InvalidArgumentError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BYTES_MAX = 1 << 40


def stream_of(data: bytes) -> Stream:
    return Stream(io.BytesIO(data).read, BYTES_MAX)


def read(data: bytes) -> list[tuple[Member, bytes]]:
    """Every entry with its data."""
    stream = stream_of(data)
    return [(member, stream.take(member.size)) for member in members(stream)]


def assert_read_as_tarfile_does(data: bytes) -> int:
    found = read(data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        expected = list(tar)
        contents = [file.read() if (file := tar.extractfile(e)) and e.isreg() else b"" for e in map(_itself, expected)]
    assert [os.fsdecode(member.path) for member, _ in found] == [entry.name for entry in expected]
    for (member, content), entry, expected_content in zip(found, expected, contents, strict=True):
        kind = FILE if entry.isreg() else entry.type
        assert (member.kind, member.mode, member.uid, member.gid) == (kind, entry.mode, entry.uid, entry.gid)
        assert (member.mtime_s, os.fsdecode(member.target)) == (int(entry.mtime), entry.linkname)
        assert member.offset == entry.offset_data
        assert (member.size, content) == (len(expected_content), expected_content)
        if kind in {CHARACTER, BLOCK}:
            assert member.device == (entry.devmajor, entry.devminor)
        xattrs = {key[13:]: value for key, value in entry.pax_headers.items() if key.startswith("SCHILY.xattr.")}
        assert {os.fsdecode(key): os.fsdecode(value) for key, value in member.xattrs.items()} == xattrs
    return len(found)


def _itself(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """So that `extractfile` follows no link."""
    return entry if entry.isreg() else tarfile.TarInfo()


def entry(name: str = "a", data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.size = len(data)
    for field, value in fields.items():
        setattr(made, field, value)
    return made, data


SOUND = {
    "nothing in it": [entry()],
    "sizes around a block": [entry(f"s{size}", b"x" * size) for size in (0, 1, 511, 512, 513, 1024, 10_000)],
    "names around the field": [entry("d/" + "n" * (length - 2), b"x") for length in (98, 99, 100, 101, 155, 156)],
    "a name with a prefix": [entry("p" * 120 + "/" + "n" * 90, b"x"), entry("a" * 155 + "/" + "b" * 100)],
    "a very long name": [entry("long/" * 500 + "end", b"x")],
    "a very long link": [entry("l", type=LINK, linkname="up/" * 700), entry("k" * 300, type=LINK, linkname="m" * 300)],
    "Unicode": [entry("ä/日本/🙂", "ü".encode()), entry("l", type=LINK, linkname="ö" * 90)],
    "names that are no text": [entry("\udcff\n\udc80", b"x"), entry("\udcff" * 120, b"y")],
    "a large size": [entry("large", type=FIFO, uid=0o10000000, gid=1 << 31)],
    "times": [entry(f"t{n}", mtime=t) for n, t in enumerate((-1, -(1 << 33), 0, 1.75, -1.75, 1 << 33, 1 << 40))],
    "every kind": [
        entry("d", type=DIRECTORY, mode=0o1777), entry("d/f", b"one", mode=0o4755),
        entry("h", type=HARD_LINK, linkname="d/f"), entry("whole", b"three", type=tarfile.CONTTYPE),
        entry("c", type=CHARACTER, devmajor=1, devminor=3), entry("b", type=BLOCK, devmajor=259, devminor=1 << 18),
        entry("p", type=FIFO), entry("old", b"two", type=tarfile.AREGTYPE),
        entry("dir/", type=tarfile.AREGTYPE), entry("slashes//", type=DIRECTORY), entry("unknown", b"", type=b"Q"),
    ],
    "attributes": [
        entry(pax_headers={"SCHILY.xattr.user.a": "\udcff b=c\n", "SCHILY.xattr.user.b": "", "comment": "-"}),
        entry("b"),
    ],
    "names of owners": [entry(uname="rööt", gname="g" * 31)],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_read_as_tarfile_reads_it(form: str, name: str) -> None:
    out = io.BytesIO()
    written = 0
    with tarfile.TarFile(
        fileobj=out, mode="w", format=FORMATS[form], encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for member, data in SOUND[name]:
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # what this format cannot say
                continue
            written += 1
    if written:
        assert assert_read_as_tarfile_does(out.getvalue()) == written


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar_are_read_as_tarfile_reads_them(form: str, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    deep = root / ("d" * 60) / ("e" * (30 if form == "v7" else 60))
    deep.mkdir(parents=True)
    (root / "f").write_bytes(b"x" * 3000)
    os.link(root / "f", root / "hard")
    (root / "link").symlink_to("../" * 20)
    if form != "v7":
        os.mkfifo(root / "fifo")
    (root / "ümlaut").write_bytes(b"")
    if form not in {"v7", "ustar"}:
        (deep / ("f" * 200)).write_bytes(b"y")
        os.utime(root / "f", (-5, -5))
    packed = subprocess.run(["tar", "-c", f"--format={form}", "-C", root, "."], capture_output=True, check=True)
    assert assert_read_as_tarfile_does(packed.stdout) >= 8 - (form == "v7")


def test_a_header_for_all_entries_is_read_as_git_writes_it(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "f").write_bytes(b"content")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "One"]):
        subprocess.run([*git, *command], check=True)
    packed = subprocess.run([*git, "archive", "HEAD"], capture_output=True, check=True).stdout
    assert b"comment=" in packed[:1024]
    assert assert_read_as_tarfile_does(packed) == 1


def header(kind: bytes, size: int = 0, name: str = "a", **fields: Any) -> bytes:
    return entry(name, type=kind, size=size, **fields)[0].tobuf(tarfile.GNU_FORMAT)


def before(kind: bytes, data: bytes) -> bytes:
    return header(kind, len(data)) + data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(rest) + len(b"%d" % length) != length:
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def pax(**said: bytes) -> bytes:
    return before(b"x", b"".join(record(key.replace("__", ".").encode(), value) for key, value in said.items()))


def test_what_is_said_of_all_holds_until_an_entry_says_otherwise() -> None:
    all_of = before(b"g", record(b"uid", b"7") + record(b"mtime", b"12.5") + record(b"comment", b"-"))
    later = before(b"g", record(b"uid", b"8"))
    found = read(all_of + header(FILE) + pax(uid=b"9") + header(FILE) + header(FILE) + later + header(FILE))
    assert [(member.uid, member.mtime_s) for member, _ in found] == [(7, 12), (9, 12), (7, 12), (8, 12)]
    assert_read_as_tarfile_does(
        all_of + header(FILE) + pax(uid=b"9") + header(FILE) + later + header(FILE) + bytes(1024)
    )


def test_the_largest_header_and_the_largest_size_are_read() -> None:
    most = HEADER_BYTES_MAX - len(record(b"SCHILY.xattr.user.a", b"x" * 1_000_000)) + 1_000_000
    said = record(b"SCHILY.xattr.user.a", b"x" * most)
    assert len(said) == HEADER_BYTES_MAX
    assert [member.xattrs for member, _ in read(before(b"x", said) + header(FILE))] == [{b"user.a": b"x" * most}]
    for data in (header(FILE, 1 << 60), pax(size=b"%d" % (1 << 60)) + header(FILE)):
        assert next(members(stream_of(data))).size == 1 << 60


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(10_240)])
def test_an_archive_ends_where_its_entries_do(end: bytes) -> None:
    assert len(read(header(FILE) + end)) == 1
    assert read(before(b"g", record(b"comment", b"of nothing")) + end) == []


DAMAGED = {
    "nothing": b"",
    "a short block of zeros": bytes(100),
    "a header before no entry": before(b"L", b"name") + bytes(1024),
    "a header before the end": pax(path=b"name"),
    "a header that is cut off": before(b"L", b"name")[:600],
    "a size below zero": header(FILE, -1),
    "a header's size below zero": header(b"x", -512),
    "another size below zero": pax(size=b"-1") + header(FILE),
    "data that is cut off": header(FILE, 1000) + bytes(1023),
    "a number that is none": header(FILE).replace(b"0000644", b"0000x44"),
    "a pax number that is none": pax(uid=b"1_0") + header(FILE),
    "a pax number with a fraction that is none": pax(mtime=b"1.x") + header(FILE),
    "a pax number that is too long": pax(size=b"1" * 41) + header(FILE),
    "a fraction that is too long": before(b"g", record(b"mtime", b"1." + b"0" * 100_000)) + header(FILE),
    "a zero in a path": pax(path=b"a\0b") + header(FILE),
    "a zero in a link": pax(linkpath=b"a\0b") + header(LINK, linkname="x"),
    "a record of no length": before(b"x", b"0 a=b\n") + header(FILE),
    "a record shorter than its key": before(b"x", b"3 a=b\n") + header(FILE),
    "a record beyond its header": before(b"x", b"7 a=b\n") + header(FILE),
    "a record far beyond its header": before(b"x", b"9999999 a=b\n") + header(FILE),
    "a record without a length": before(b"x", b" a=b\n") + header(FILE),
    "a record without a value": before(b"x", b"5 ab\n") + header(FILE),
    "a record without an end": before(b"x", b"6 a=bc") + header(FILE),
    "a path for all entries": before(b"g", record(b"path", b"a")) + header(FILE),
    "attributes for all entries": before(b"g", record(b"SCHILY.xattr.user.a", b"a")) + header(FILE),
    "a header beyond the bound": before(b"x", record(b"comment", b"x" * HEADER_BYTES_MAX)) + header(FILE),
    "two names": before(b"L", b"one") * 2 + header(FILE),
    "two pax headers": pax(uid=b"1") * 2 + header(FILE),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_or_beyond_the_bounds_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"damaged|an archive"):
        read(DAMAGED[name])


SPARSE_1_0 = {"GNU__sparse__major": b"1", "GNU__sparse__minor": b"0", "GNU__sparse__name": b"f"}


@pytest.mark.parametrize(
    "headers",
    [header(b"S"), pax(**SPARSE_1_0) + header(FILE), pax(GNU__sparse__map=b"0,1") + header(FILE)],
    ids=["old GNU", "1.0", "0.1"],
)
def test_a_sparse_file_is_refused_before_anything_of_its_map_is_read(headers: bytes) -> None:
    stream = stream_of(headers + b"99999999999\n" + b"0\n" * 100_000)
    with pytest.raises(InvalidArgumentError, match="sparse file: pack it without"):
        next(members(stream))
    assert stream.position == len(headers)


# -- work: no regular expression, no search beyond a record, no call for each byte, nothing kept -----


def calls_of(data: bytes) -> int:
    """How many functions, of Python or of C, it takes to read an archive or to refuse it."""
    count = 0

    def profile(_frame: object, event: str, _what: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    found = members(stream_of(data))
    gc.disable()  # what other tests left would be counted when it is collected
    sys.setprofile(profile)
    try:
        for _ in found:
            pass
    except InvalidArgumentError:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("byte", [b"1", b" ", b"=", b"\n", b"\0", b"1 ", b"1 hdrcharset=", b"4 = "])
def test_a_header_of_one_byte_over_and_over_takes_the_work_of_a_short_one(byte: bytes) -> None:
    short, long = (before(b"x", (byte * size)[:size]) + header(FILE) for size in (1 << 9, HEADER_BYTES_MAX))
    assert calls_of(long) - calls_of(short) <= 1  # one block more or less
    assert "re" not in vars(sys.modules[Member.__module__])
    assert "tarfile" not in vars(sys.modules[Member.__module__])


def test_work_grows_with_the_records_of_a_header() -> None:
    one, two = (before(b"x", b"4 =\n" * (count << 9)) + header(FILE) for count in (8, 16))
    assert calls_of(two) < 2 * calls_of(one)


def test_a_long_row_of_headers_is_no_depth() -> None:
    comment = before(b"g", record(b"comment", b"-"))
    assert len(read(comment * 5000 + header(FILE))) == 1
    assert calls_of(before(b"L", b"name") * 5000 + header(FILE)) < 200


def test_headers_are_not_kept() -> None:
    said = b"".join(
        before(kind, record(b"comment%d" % index, b"x" * 900_000)) + header(FILE)
        for index in range(20)
        for kind in (b"g", b"x")
    )
    data = io.BytesIO(said)
    del said
    tracemalloc.start()
    try:
        count = sum(1 for _ in members(Stream(data.read, BYTES_MAX)))
        assert tracemalloc.get_traced_memory()[1] < 4 * HEADER_BYTES_MAX
    finally:
        tracemalloc.stop()
    assert count == 40


def test_no_archive_does_more_than_be_refused() -> None:
    """Blocks of sound archives, changed at random, with right checksums, so that what lies behind them is reached."""
    chance = random.Random(20)
    sound = pax(path=b"p", SCHILY__xattr__user__a=b"x", size=b"3") + header(FILE) + b"abc".ljust(512, b"\0")
    sound += before(b"L", b"n" * 200) + before(b"K", b"m" * 200) + header(LINK) + before(b"g", record(b"uid", b"1"))
    sound += header(FILE, 600) + b"x" * 1024 + bytes(1024)
    refused = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice(b"\0\1 01789=x\n\x80\xffLKgxS/")
        for at in range(0, len(data), 512):
            if data[at + 257 : at + 262] == b"ustar":
                total = 256 + sum(data[at : at + 148]) + sum(data[at + 156 : at + 512])
                data[at + 148 : at + 156] = b"%06o\0 " % total
        try:
            read(bytes(data))
        except InvalidArgumentError:
            refused += 1
    assert 300 < refused < 2900
