"""Checks of whole trees as archives: there and back, and archives that mean harm.

The members of the hostile ones are those of common attacks on unpackers: paths upwards and absolute, links
that are made first and written through afterwards, hard links to what lies outside, devices and setuid bits.
"""

# ruff: noqa: D103, S108  (a check is described by its name; paths inside a sandbox)

from __future__ import annotations

import asyncio
import io
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from dsec.conformance.check import Check, check, fresh, line, refusal_of, require
from dsec.errors import DsecError, InvalidArgumentError, NotFoundError
from dsec.files import Files
from dsec.sandbox import Substrate

_UP = "../" * 9


class _Member(NamedTuple):
    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644


def _link(name: str, target: str) -> _Member:
    return _Member(name, kind=tarfile.SYMTYPE, link=target)


_OK = _Member("ok.txt", b"fine\n")
_HOSTILE: dict[str, tuple[_Member, ...]] = {
    "dotdot": (_OK, _Member(f"{_UP}var/tmp/evil", b"evil")),
    "absolute": (_OK, _Member("/var/tmp/evil", b"evil"), _Member("//var/tmp/evil2", b"evil")),
    "through a link": (_link("lnk", "/var/tmp"), _Member("lnk/evil", b"evil")),
    "through a chain": (
        _Member("a/", kind=tarfile.DIRTYPE, mode=0o755),
        _link("a/b", ".."),
        _link("a/b/c", f"{_UP}var/tmp"),
        _Member("a/b/c/evil", b"evil"),
        _Member("c/evil", b"evil"),
    ),
    "hard link": (
        _Member("hl", kind=tarfile.LNKTYPE, link=f"{_UP}var/tmp/victim"),
        _Member("hl", b"overwritten"),
        _Member("hl2", kind=tarfile.LNKTYPE, link="/var/tmp/victim"),
        _Member("hl2", b"overwritten"),
    ),
    "special": (
        _OK,
        _Member("block", kind=tarfile.BLKTYPE),
        _Member("character", kind=tarfile.CHRTYPE),
        _Member("fifo", kind=tarfile.FIFOTYPE),
        _Member("suid", b"x", mode=0o6755),
    ),
    "a link for a directory": (
        _Member("x/", kind=tarfile.DIRTYPE, mode=0o755),
        _link("x", "/var/tmp"),
        _Member("x/evil", b"evil"),
    ),
}


def _archive(members: tuple[_Member, ...]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.mode, info.size = member.kind, member.link, member.mode, len(member.data)
            info.devmajor, info.devminor = 1, 1
            archive.addfile(info, io.BytesIO(member.data))
    return out.getvalue()


async def _pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@check()
async def a_tree_goes_to_a_sandbox_and_from_it_to_another(substrate: Substrate) -> None:
    make = (
        "mkdir -p /srv/t/d/e; cd /srv/t; echo one > a; head -c 3000000 /dev/urandom > d/large; ln a d/hard; ln -s ../a "
        "d/link; ln -s /no/where broken; chmod 751 a; chmod 700 d/e; mkfifo d/fifo; touch -d 2001-02-03T04:05:06Z a; "
        "printf x > $'odd \\n name'"
    )
    shown = "cd /srv/t; find . -not -name . -printf '%p %y %m %n %l %Ts\\n' | grep -v ' d ' | sort; find . -type f | sort | xargs -d '\\n' -n 1 sha256sum 2>&1 | sort"  # noqa: E501
    async with fresh(substrate) as one, fresh(substrate) as two:
        await line(one, make)
        await Files(two).upload_tree(Files(one).download_tree("/srv/t"), "/srv/t")
        require(await line(one, shown) == await line(two, shown), await line(two, shown))
        require(isinstance(await refusal_of(_drain(Files(one).download_tree("/no/such"))), NotFoundError))
        require(isinstance(await refusal_of(_drain(Files(one).download_tree("/etc/passwd"))), InvalidArgumentError))


async def _drain(pieces: AsyncIterator[bytes]) -> int:
    return sum([len(piece) async for piece in pieces])


@check()
async def a_directory_of_this_machine_is_uploaded(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        with tempfile.TemporaryDirectory() as name:
            Path(name, "d").mkdir()
            Path(name, "d", "run.sh").write_bytes(b"#!/bin/sh\necho ran\n")
            Path(name, "d", "run.sh").chmod(0o755)
            Path(name, "link").symlink_to("d/run.sh")
            await Files(sandbox).upload_tree(Path(name), "/srv/up")
        require(await line(sandbox, "/srv/up/d/run.sh; readlink /srv/up/link") == "ran\nd/run.sh")


@check()
async def hostile_archives_write_nothing_outside(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        for name, members in _HOSTILE.items():
            await line(sandbox, "rm -rf /srv/up /var/tmp/*; echo whole > /var/tmp/victim")
            try:
                await files.upload_tree(_pieces(_archive(members)), "/srv/up")
            except DsecError as error:
                require(error.fault == "caller", (name, error))
            require(await line(sandbox, "cd /var/tmp; echo *; cat victim") == "victim\nwhole", name)
            require(await line(sandbox, "find /srv/up -type b -o -type c") == "", f"{name}: a device")


@check()
async def an_archive_that_is_none_or_ends_early_is_refused(substrate: Substrate) -> None:
    whole = _archive((_OK, _Member("large", bytes(100_000))))
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        for data in (b"", b"x", bytes(range(256)) * 40, whole[:700], whole[:50_000], b"\x1f\x8b" + whole):
            require(
                isinstance(await refusal_of(files.upload_tree(_pieces(data), "/srv/up")), InvalidArgumentError),
                data[:9],
            )
        await files.upload_tree(_pieces(whole, 511), "/srv/up")
        require(await line(sandbox, "stat -c %s /srv/up/large; cat /srv/up/ok.txt") == "100000\nfine")


@check()
async def a_reader_that_goes_away_ends_the_archive(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        await line(sandbox, "mkdir /srv/t; head -c 30000000 /dev/zero > /srv/t/f")
        pieces = Files(sandbox).download_tree("/srv/t")
        require(len(await anext(pieces)) > 0)
        await pieces.aclose()
        async with asyncio.timeout(10):
            while await line(sandbox, "pgrep -c tar || true") != "0":
                continue


CHECKS: tuple[Check, ...] = (
    a_tree_goes_to_a_sandbox_and_from_it_to_another,
    a_directory_of_this_machine_is_uploaded,
    hostile_archives_write_nothing_outside,
    an_archive_that_is_none_or_ends_early_is_refused,
    a_reader_that_goes_away_ends_the_archive,
)
