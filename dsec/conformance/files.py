"""Checks of files: contents, the tree, watching, whole trees, and what hostile paths and links bring about."""

# ruff: noqa: D103, S108  (a check is described by its name; paths inside a sandbox)

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing

from dsec.conformance.check import Check, check, fresh, line, refusal_of, require
from dsec.errors import DsecError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from dsec.files import CHUNK_BYTES, Entry, Files
from dsec.sandbox import Sandbox, Substrate
from dsec.types import SandboxSpec

_BINARY = bytes(range(256)) * 4000


def _facts(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(entry.path, entry.kind, entry.size_bytes) for entry in entries]


async def _large(count: int) -> AsyncIterator[bytes]:
    for index in range(count):
        yield index.to_bytes(4, "little") * (1 << 18)  # 1 MiB


@check()
async def what_was_written_is_read_back_in_any_range(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        for data in (b"", b"x", b"\xff\0\n", _BINARY):
            await files.write("/srv/f", data)
            require(await files.read("/srv/f") == data, len(data))
        for offset, length in ((0, 10), (255, 3), (len(_BINARY) - 5, 100), (len(_BINARY), 10), (1 << 40, 10), (7, 0)):
            require(await files.read("/srv/f", offset, length) == _BINARY[offset : offset + length], (offset, length))
        require(await files.read("/srv/f", 1_000_000) == _BINARY[1_000_000:], "to the end")


@check()
async def a_large_file_goes_through_in_pieces(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files, count, digest = Files(sandbox), 0, hashlib.sha256()
        await files.write("/srv/large", _large(48))
        async for piece in files.open_read("/srv/large"):
            require(len(piece) <= CHUNK_BYTES, len(piece))
            count += len(piece)
            digest.update(piece)
        require(count == 48 << 20, count)
        require(await line(sandbox, "sha256sum < /srv/large") == f"{digest.hexdigest()}  -", "other bytes")
        async with aclosing(files.open_read("/srv/large", 1 << 20)) as pieces:
            async for piece in pieces:
                require(piece.startswith((1).to_bytes(4, "little")), piece[:8])
                break
        require(await files.read("/srv/large", 5 << 20, 4) == (5).to_bytes(4, "little"), "after a reader went away")


@check()
async def writing_keeps_to_what_was_asked(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        await files.write("/srv/a/b/f", b"0123456789", mode=0o640, make_parents=True)
        await files.write("/srv/a/b/f", b"AB", offset=4)
        await files.write("/srv/a/b/f", b"end", append=True)
        entry = await files.stat("/srv/a/b/f")
        require((entry.kind, entry.mode & 0o7777, entry.size_bytes) == ("file", 0o640, 13), entry)
        require(await files.read("/srv/a/b/f") == b"0123AB6789end", await files.read("/srv/a/b/f"))
        await line(sandbox, "ln -s /srv/a/b/f /srv/link")
        await files.write("/srv/link", b"through", atomic=False)
        require((await files.stat("/srv/link")).kind == "link" and await files.read("/srv/a/b/f") == b"through")
        await files.write("/srv/link", b"instead", atomic=True)
        require((await files.stat("/srv/link")).kind == "file" and await files.read("/srv/a/b/f") == b"through")
        require(isinstance(await refusal_of(files.write("/srv/link", b"x", exclusive=True)), InvalidArgumentError))
        require(isinstance(await refusal_of(files.write("/srv/no/f", b"x")), NotFoundError))
        require(await files.read("/srv/link") == b"instead", "a refused write wrote")


@check()
async def entries_are_listed_as_they_are(substrate: Substrate) -> None:
    make = (
        "cd /srv; mkdir -p d/e/f; printf 12345 > d/file; ln -s /no/where d/broken; ln -s . d/loop; mkfifo d/pipe; "
        "printf x > 'd/-n'; printf x > $'d/new\\nline'; printf x > $'d/\\xff\\xfe'; "
        "chown 7:8 d/file; chmod 4751 d/file; "
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"d/sock\")'"
    )
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        await line(sandbox, make)
        found = {entry.path: entry for entry in await files.list("/srv/d")}
        kinds = {"-n": "file", "broken": "link", "e": "directory", "file": "file", "loop": "link", "new\nline": "file",
                 "pipe": "fifo", "sock": "socket", "\udcff\udcfe": "file"}  # fmt: skip
        require({path: entry.kind for path, entry in found.items()} == kinds, found)
        file = found["file"]
        require((file.uid, file.gid, file.mode & 0o7777, file.size_bytes) == (7, 8, 0o4751, 5), file)
        require(found["broken"].target == "/no/where", found["broken"])
        paths = [entry.path for entry in await files.list("/srv", depth=2)]
        require("d/e" in paths and "d/e/f" not in paths and paths == sorted(paths), paths)
        require(not any(path.startswith("d/loop/") for path in [e.path for e in await files.list("/srv", depth=9)]))
        require(await files.read("/srv/d/-n") == b"x" and await files.read("/srv/d/new\nline") == b"x")
        require(await files.exists("/srv/d/broken") and not await files.exists("/srv/d/nothing"))


@check()
async def what_cannot_be_read_is_refused_by_its_reason(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox, timeout_s=20)
        await line(sandbox, "mkfifo /srv/pipe; ln -s loop /srv/loop")
        for path in ("", "srv", "\0", "/srv/a\0b", "/" + "a" * 5000, "/srv", "/srv/pipe", "/dev/zero", "/srv/loop",
                     "/" + "a" * 300):  # fmt: skip
            require(isinstance(await refusal_of(files.read(path)), InvalidArgumentError), path[:20])
        for path in ("/no/such", "/etc/passwd/x", "/srv/none"):
            require(isinstance(await refusal_of(files.read(path)), NotFoundError), path)
            require(isinstance(await refusal_of(files.list(path)), NotFoundError), path)
        require(isinstance(await refusal_of(files.write("/srv", b"x")), InvalidArgumentError), "onto a directory")
        require(isinstance(await refusal_of(files.write("/srv/pipe", b"x")), InvalidArgumentError), "into a pipe")
        require(await line(sandbox, "echo alive") == "alive")


@check()
async def the_tree_is_changed_and_no_link_followed(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        await files.make_dir("/srv/keep", mode=0o750)
        await files.write("/srv/keep/f", b"kept")
        await files.make_dir("/srv/d/e/f")
        await files.make_dir("/srv/d")
        await line(sandbox, "ln -s /srv/keep /srv/d/e/link; ln -s /srv/keep /srv/link; chmod 000 /srv/d/e/f")
        await files.rename("/srv/d/e", "/srv/d/g")
        require((await files.stat("/srv/keep")).mode & 0o7777 == 0o750, "its mode")
        for refused in (files.make_dir("/srv/d", parents=False), files.remove("/srv/d"),
                        files.rename("/srv/d", "/srv/keep", exclusive=True)):  # fmt: skip
            require(isinstance(await refusal_of(refused), InvalidArgumentError))
        await files.remove("/srv/d", recursive=True)
        await files.remove("/srv/link")
        require(isinstance(await refusal_of(files.remove("/srv/link")), NotFoundError))
        require(_facts(await files.list("/srv", depth=3)) == [("keep", "directory", (await files.stat("/srv/keep"))
                .size_bytes), ("keep/f", "file", 4)], await files.list("/srv", depth=3))  # fmt: skip


@check()
async def paths_and_links_end_within_the_sandbox(substrate: Substrate) -> None:
    links = (
        "echo inside > /etc/mark; cd /srv; ln -s /etc/mark l1; ln -s ../../../../../../etc/mark l2; mkdir dd; "
        "ln -s /etc dd/e; ln -s /proc/1/root/etc/mark l3; ln -s /proc/1/cwd l4"
    )
    async with fresh(substrate) as sandbox, fresh(substrate) as other:
        files = Files(sandbox)
        await line(sandbox, links)
        for path in ("/srv/l1", "/srv/l2", "/srv/dd/e/mark", "/srv/../../../etc/mark", "/proc/self/root/etc/mark"):
            require(await files.read(path) == b"inside\n", path)
        for path in ("/srv/l3", "/proc/1/root/etc/mark", "/proc/1/environ", "/proc/1/mem", "/proc/1/exe", "/srv/l4/x"):
            require((await refusal_of(files.read(path))).fault == "caller", path)
            require((await refusal_of(files.write(path, b"x"))).fault == "caller", path)
        await files.write("/srv/l1", b"written")
        require(not await Files(other).exists("/etc/mark"), "a link led out")


@check()
async def files_belong_to_the_user_who_asks(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox, user="77:88")
        await line(sandbox, "install -d -o 77 -g 88 /srv/own; umask 077; echo secret > /srv/secret")
        await files.write("/srv/own/f", b"x")
        entry = await files.stat("/srv/own/f")
        require((entry.uid, entry.gid) == (77, 88), entry)
        attempts = (
            files.write("/etc/passwd", b"x"), files.write("/srv/f", b"x"), files.read("/srv/secret"),
            files.remove("/etc/passwd"), files.list("/root"), files.rename("/etc", "/srv/own/etc"),
        )  # fmt: skip
        for attempt in attempts:
            require(isinstance(await refusal_of(attempt), InvalidArgumentError))
        require(await Files(sandbox).read("/srv/secret") == b"secret\n")


@check()
async def changes_are_watched(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox)
        await files.make_dir("/srv/w/deep")
        seen: list[tuple[str, str]] = []
        async with aclosing(files.watch("/srv/w", recursive=True)) as events, asyncio.timeout(20):
            async for event in events:
                seen.append((event.kind, event.path.rpartition("/")[2]))
                if event.kind == "ready":
                    await line(
                        sandbox, "cd /srv/w; echo x > f; mv f g; rm g; mkdir new; echo y > deep/h; touch deep/last"
                    )
                if event.path.endswith("last"):
                    break
        for wanted in (("created", "f"), ("written", "f"), ("moved_from", "f"), ("moved_to", "g"), ("removed", "g"),
                       ("created", "new"), ("created", "h")):  # fmt: skip
            require(wanted in seen, (wanted, seen))
        require(await line(sandbox, "ls /srv/w") == "deep\nnew", "watching changed something")


@check()
async def a_file_that_does_not_fit_is_no_room(substrate: Substrate) -> None:
    async with fresh(substrate, SandboxSpec(memory_bytes=128 << 20, disk_bytes=32 << 20)) as sandbox:
        files = Files(sandbox)
        await line(sandbox, "dd if=/dev/zero of=/dev/shm/fill bs=1M 2> /dev/null; true")
        refused = await refusal_of(files.write("/dev/shm/f", _large(64), atomic=True))
        require(isinstance(refused, ResourceExhaustedError), refused)
        await line(sandbox, "rm /dev/shm/fill")
        require(await line(sandbox, "ls -A /dev/shm | wc -l") == "0", "an atomic write left something")
        await files.write("/dev/shm/f", b"fits")
        require(await files.read("/dev/shm/f") == b"fits")


@check()
async def a_writer_that_goes_away_leaves_nothing_running(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        started = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield b"begun"
            started.set()
            await asyncio.Event().wait()

        writing = asyncio.create_task(Files(sandbox).write("/srv/f", endless(), atomic=True))
        await started.wait()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await _until_alone(sandbox)
        require(await line(sandbox, "ls -A /srv") == "", "part of an atomic write is there")


async def _until_alone(sandbox: Sandbox) -> None:
    """Until nothing runs but pid 1 and the command that looks."""
    async with asyncio.timeout(10):
        while (await line(sandbox, "pgrep -vc '^(init|bash|pgrep)$' || true")) != "0":
            continue


@check()
async def what_programs_inside_do_to_files_meanwhile_is_no_failure_of_ours(substrate: Substrate) -> None:
    async with fresh(substrate) as sandbox:
        files = Files(sandbox, timeout_s=30)
        racer = "while :; do ln -sfn /etc d/x; rm -f d/x; mkdir -p d/x; touch d/x/y; rm -rf d/x; done 2> /dev/null"
        await line(sandbox, f"mkdir -p /srv/d; cd /srv; nohup bash -c '{racer}' > /dev/null 2>&1 &")
        for _ in range(20):
            for attempt in (files.list("/srv", depth=5), files.remove("/srv/d/x", recursive=True)):
                try:
                    await attempt
                except DsecError as error:
                    require(error.fault == "caller", error)
        require(await line(sandbox, "test -s /etc/passwd && echo whole") == "whole", "a link was followed")


CHECKS: tuple[Check, ...] = (
    what_was_written_is_read_back_in_any_range,
    a_large_file_goes_through_in_pieces,
    writing_keeps_to_what_was_asked,
    entries_are_listed_as_they_are,
    what_cannot_be_read_is_refused_by_its_reason,
    the_tree_is_changed_and_no_link_followed,
    paths_and_links_end_within_the_sandbox,
    files_belong_to_the_user_who_asks,
    changes_are_watched,
    a_file_that_does_not_fit_is_no_room,
    a_writer_that_goes_away_leaves_nothing_running,
    what_programs_inside_do_to_files_meanwhile_is_no_failure_of_ours,
)
