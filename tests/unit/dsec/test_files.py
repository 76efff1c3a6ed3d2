"""Files of a container: contents, trees, events and archives, with hostile ones among them."""

import asyncio
import contextlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from dsec.conformance.check import line, shell
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from dsec.files import CHUNK_BYTES, Event, Files
from dsec.sandbox import Sandbox
from dsec.types import SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate() -> AsyncIterator[ContainerSubstrate]:
    containers = ContainerSubstrate()
    await containers.open()
    yield containers
    await containers.close()


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox(substrate: ContainerSubstrate) -> AsyncIterator[Sandbox]:
    sandbox = await substrate.create(SandboxSpec())
    yield sandbox
    await sandbox.destroy()


@pytest.fixture
def files(sandbox: Sandbox) -> Files:
    return Files(sandbox)


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def joined(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in stream])


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 << 20])
async def test_what_was_written_is_read_again(files: Files, size: int) -> None:
    data = os.urandom(size)
    await files.write("/tmp/whole", data)
    await files.write("/tmp/streamed", pieces(data))
    assert await files.read("/tmp/whole") == await files.read("/tmp/streamed") == data
    assert await joined(files.open_read("/tmp/whole")) == data
    assert (await files.stat("/tmp/whole")).size_bytes == size


async def test_ranges_are_read_and_written(files: Files) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    await files.write("/tmp/f", data)
    assert await files.read("/tmp/f", 5, 7) == data[5:12]
    assert await files.read("/tmp/f", 3, CHUNK_BYTES + 9) == data[3 : CHUNK_BYTES + 12]
    assert await files.read("/tmp/f", len(data), 9) == await files.read("/tmp/f", 0, 0) == b""
    await files.write("/tmp/text", "gr\u00fc\u00df")
    assert await files.read("/tmp/text") == "gr\u00fc\u00df".encode()
    await files.write("/tmp/text", b"a\xff")
    assert await files.read_text("/tmp/text") == "a\ufffd"
    await files.write("/tmp/f", b"middle", offset=10)
    await files.write("/tmp/f", b"end", append=True)
    assert await files.read("/tmp/f") == data[:10] + b"middle" + data[16:] + b"end"


async def test_modes_owners_and_parents_are_as_asked_for(sandbox: Sandbox, files: Files) -> None:
    await files.write("/tmp/a/b/c", b"x", mode=0o640, make_parents=True)
    entry = await files.stat("/tmp/a/b/c")
    assert (entry.kind, entry.mode, entry.size_bytes, entry.uid) == ("file", 0o640, 1, 0)
    await files.write("/tmp/a/b/c", b"yy", atomic=True)
    assert (await files.stat("/tmp/a/b/c")).mode == 0o640
    await files.make_dir("/tmp/d/e", mode=0o1777)
    await files.make_dir("/tmp/d/e")
    assert (await files.stat("/tmp/d/e")).mode == 0o1777
    other = Files(sandbox, user="77:88")
    await other.write("/tmp/d/e/mine", b"")
    assert ((await files.stat("/tmp/d/e/mine")).uid, (await files.stat("/tmp/d/e/mine")).gid) == (77, 88)
    with pytest.raises(InvalidArgumentError, match="Permission denied"):
        await other.write("/etc/passwd", b"x")


async def test_what_cannot_be_is_an_error_that_names_the_path(sandbox: Sandbox, files: Files) -> None:
    await shell(
        sandbox,
        "mkfifo /tmp/pipe; ln -s /tmp/loop /tmp/loop; ln -s /etc/passwd /tmp/link; mkdir /tmp/full; touch /tmp/full/x",
    )
    for path, expected in {
        "/no/such": NotFoundError,
        "/etc/passwd/x": NotFoundError,
        "/tmp": InvalidArgumentError,
        "/tmp/pipe": InvalidArgumentError,
        "/tmp/loop": InvalidArgumentError,
        "/dev/zero": InvalidArgumentError,
        "/tmp/" + "a" * 300: InvalidArgumentError,
    }.items():
        with pytest.raises(expected, match=path[:20]):
            await files.read(path)
    for path in ("", "relative", "/a\0b", "/" + "a/" * 3000):
        with pytest.raises(InvalidArgumentError, match="absolute path"):
            await files.read(path)
    for refused in (
        files.write("/tmp/pipe", b"x"),
        files.write("/dev/null", b"x"),
        files.write("/tmp", b"x"),
        files.write("/tmp/link", b"x", exclusive=True),
        files.write("/tmp/link", b"x", exclusive=True, atomic=True),
        files.remove("/tmp/full"),
        files.remove("/proc", recursive=True),
        files.rename("/tmp/pipe", "/tmp/full"),
        files.rename("/tmp/full", "/tmp/link", exclusive=True),
        files.make_dir("/tmp/link"),
        files.list("/tmp", 0),
    ):
        with pytest.raises(InvalidArgumentError):
            await refused


async def test_a_link_leads_nowhere_but_into_the_sandbox(sandbox: Sandbox, files: Files) -> None:
    canary = Path("/etc/dsec-files-canary")
    await shell(
        sandbox, f"ln -s {canary} /tmp/l1; ln -s /proc/1/root{canary} /tmp/l2; ln -s ../../../../..{canary} /tmp/l3"
    )
    canary.write_text("host")
    try:
        for name in ("l1", "l2", "l3"):
            with pytest.raises((NotFoundError, InvalidArgumentError)):
                await files.read(f"/tmp/{name}")
        await files.write("/tmp/l1", b"inside")
        assert canary.read_text() == "host"
        assert await files.read(str(canary)) == b"inside"
    finally:
        canary.unlink()


async def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(files: Files) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"new" * CHUNK_BYTES
        raise RuntimeError("the source broke")

    await files.write("/tmp/kept/file", b"old", make_parents=True)
    with pytest.raises(RuntimeError, match="the source broke"):
        await files.write("/tmp/kept/file", broken(), atomic=True)
    with pytest.raises(ResourceExhaustedError):
        await files.write("/tmp/kept/file", pieces(bytes(500 << 20), 4 << 20), atomic=True)
    assert await files.read("/tmp/kept/file") == b"old"
    assert [entry.path for entry in await files.list("/tmp/kept")] == ["file"]


async def test_a_tree_is_listed_to_the_asked_depth(sandbox: Sandbox, files: Files) -> None:
    odd = "'new\nline' $'\\xff\\xfe' '--parents' ' '"
    await shell(sandbox, f"mkdir -p /tmp/t/a/b; cd /tmp/t; touch -- a/b/c {odd}; ln -s /nowhere l; mkfifo p")
    shallow = await files.list("/tmp/t")
    assert [(entry.path, entry.kind) for entry in shallow] == [
        (" ", "file"), ("--parents", "file"), ("a", "directory"), ("l", "link"), ("new\nline", "file"), ("p", "fifo"),
        (os.fsdecode(b"\xff\xfe"), "file"),
    ]  # fmt: skip
    assert next(entry for entry in shallow if entry.path == "l").target == "/nowhere"
    assert {"a/b", "a/b/c"} <= {entry.path for entry in await files.list("/tmp/t", 9)}
    assert "a/b/c" not in {entry.path for entry in await files.list("/tmp/t", 2)}
    await files.remove("/tmp/t/" + os.fsdecode(b"\xff\xfe"))
    assert not await files.exists("/tmp/t/" + os.fsdecode(b"\xff\xfe"))
    assert await files.exists("/tmp/t/l")


async def test_removing_a_tree_spares_what_its_links_name(sandbox: Sandbox, files: Files) -> None:
    await line(sandbox, "mkdir -p /tmp/gone/x /tmp/spared; touch /tmp/spared/f; ln -s /tmp/spared /tmp/gone/x/l")
    await line(sandbox, "cd /tmp/gone; for i in $(seq 400); do mkdir d; cd d; touch f; done 2>/dev/null; true")
    await files.remove("/tmp/gone", recursive=True)
    assert [entry.path for entry in await files.list("/tmp/spared")] == ["f"]
    assert not await files.exists("/tmp/gone")
    with pytest.raises(NotFoundError):
        await files.remove("/tmp/gone", recursive=True)


async def test_a_file_takes_another_name(files: Files) -> None:
    await files.write("/tmp/one", b"1")
    await files.write("/tmp/two", b"2")
    await files.rename("/tmp/one", "/tmp/two")
    assert await files.read("/tmp/two") == b"1"
    with pytest.raises(NotFoundError, match="/tmp/one"):
        await files.rename("/tmp/one", "/tmp/three")


async def test_what_happens_in_a_tree_is_told_in_order(sandbox: Sandbox, files: Files) -> None:
    await files.make_dir("/tmp/w")
    seen: list[Event] = []
    async with aclosing(files.watch("/tmp/w", recursive=True)) as events:
        async with asyncio.timeout(60):
            async for event in events:
                if event.kind == "ready":
                    await line(sandbox, "cd /tmp/w; mkdir d; echo x > d/f; mv d e; echo y >> e/f; rm -r e; touch last")
                seen.append(event)
                if event == Event("created", "/tmp/w/last"):
                    break
    kinds = [event for event in seen if event.path in ("/tmp/w/d", "/tmp/w/e", "/tmp/w/e/f")]
    assert [event for event in kinds if event.kind != "written"][:3] == [
        Event("created", "/tmp/w/d"), Event("moved_from", "/tmp/w/d"), Event("moved_to", "/tmp/w/e")
    ]  # fmt: skip
    assert Event("removed", "/tmp/w/e/f") in seen
    assert seen.index(Event("removed", "/tmp/w/e/f")) < seen.index(Event("removed", "/tmp/w/e"))
    assert await line(sandbox, "pgrep -c init; true") == "1"


async def test_a_watch_ends_with_what_it_watches(files: Files) -> None:
    await files.write("/tmp/short", b"")
    async with asyncio.timeout(60):
        async for event in files.watch("/tmp/short"):
            if event.kind == "ready":
                await files.remove("/tmp/short")
    assert event.kind == "removed"


async def test_a_reader_that_stops_ends_its_command(sandbox: Sandbox, files: Files) -> None:
    await files.write("/tmp/f", bytes(4 << 20))
    async with aclosing(files.open_read("/tmp/f")) as stream:
        assert len(await anext(stream)) > 0
    assert await line(sandbox, "pgrep -c init; true") == "1"


# -- archives ------------------------------------------------------------------------------------


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def member(name: str, *, link: str = "", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o644
    return info


async def test_a_tree_goes_in_and_comes_out_again(files: Files, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.sh").write_bytes(b"#!/bin/sh\n" * 200_000)
    (tmp_path / "a/b/x.sh").chmod(0o755)
    (tmp_path / "a/link").symlink_to("b/x.sh")
    await files.upload_tree(tmp_path, "/tmp/in/there")
    assert (await files.stat("/tmp/in/there/a/b/x.sh")).mode == 0o755
    assert (await files.stat("/tmp/in/there/a/link")).target == "b/x.sh"
    with tarfile.open(fileobj=io.BytesIO(await joined(files.download_tree("/tmp/in/there")))) as tar:
        assert tar.extractfile("./a/b/x.sh").read() == b"#!/bin/sh\n" * 200_000  # type: ignore[union-attr]
        assert tar.getmember("./a/link").issym()


HOSTILE = {
    "dots": archive((member("../../../../tmp/evil"), b"x")),
    "absolute": archive((member("/tmp/evil"), b"x"), (member("//tmp/evil"), b"x")),
    "link then write": archive((member("l", link="/tmp", kind=tarfile.SYMTYPE), b""), (member("l/evil"), b"x")),
    "relative chain": archive(
        (member("a", kind=tarfile.DIRTYPE), b""),
        (member("a/b", link="..", kind=tarfile.SYMTYPE), b""),
        (member("a/b/c", link="../../../tmp", kind=tarfile.SYMTYPE), b""),
        (member("a/b/c/evil"), b"x"),
    ),
    "hard link out": archive(
        (member("h", link="../../../tmp/victim", kind=tarfile.LNKTYPE), b""), (member("h"), b"evil")
    ),
    "directory becomes link": archive(
        (member("x", kind=tarfile.DIRTYPE), b""),
        (member("x", link="/tmp", kind=tarfile.SYMTYPE), b""),
        (member("x/evil"), b"x"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_archive_is_refused_or_stays_in_its_directory(files: Files, name: str) -> None:
    await files.write("/tmp/victim", b"whole")
    host = set(os.listdir("/tmp"))
    with contextlib.suppress(InvalidArgumentError):
        await files.upload_tree(pieces(HOSTILE[name]), "/tmp/up/here")
    assert not await files.exists("/tmp/evil")
    assert await files.read("/tmp/victim") == b"whole"
    assert "evil" not in set(os.listdir("/tmp")) - host


async def test_devices_are_refused_aloud(files: Files) -> None:
    device = member("disk", kind=tarfile.BLKTYPE)
    device.devmajor = 254
    with pytest.raises(InvalidArgumentError, match="mknod"):
        await files.upload_tree(pieces(archive((member("ok"), b"1"), (device, b""))), "/tmp/up")


async def test_an_archive_that_is_cut_off_is_an_error_wherever_it_is_cut(files: Files) -> None:
    whole = archive((member("one"), b"1" * 600), (member("two"), b"2" * 600))
    for size in (0, 100, 512, 1024, 1536, 2000, 3072):
        with pytest.raises(InvalidArgumentError):
            await files.upload_tree(pieces(whole[:size]), "/tmp/cut")
    with pytest.raises(NotFoundError):
        await joined(files.download_tree("/no/such"))


async def test_a_source_that_breaks_never_looks_like_success(files: Files, sandbox: Sandbox) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield archive((member("one"), b"1" * 600))[:1000]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await files.upload_tree(broken(), "/tmp/broken")
    assert await line(sandbox, "pgrep -c tar; true") == "0"
