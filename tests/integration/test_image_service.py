"""Images of an Edge that is far away: what comes in, what is refused, and that what did not arrive leaves nothing."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dsec.client.connection import connect
from dsec.client.images import AsyncImages
from dsec.client.sandbox import AsyncSandbox
from dsec.edge import service
from dsec.edge.grpc_server import start_server
from dsec.edge.images.service import UPLOADS_COUNT_MAX, Images
from dsec.edge.images.store import LayerStore
from dsec.errors import (
    HostUnfitError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StateError,
    UnreachableError,
)
from dsec.listen import make_listen
from dsec.pb.v1 import edge_pb2 as pb
from dsec.testing import FakeSubstrate
from dsec.views import ImportOptions

TOKEN = "a token of some length"
MIB = 1 << 20


def tar(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.TarFile(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def saved(content: bytes, tag: str = "hi:1", **run: Any) -> dict[str, bytes]:
    """The files of what `docker save` writes for an image of one layer of one file."""
    layer = tar({"file": content})
    digest = hashlib.sha256(layer).hexdigest()
    config = {"rootfs": {"diff_ids": [f"sha256:{digest}"]}, "config": run}
    listed = [{"Config": "config.json", "Layers": ["layer.tar"], "RepoTags": [tag] if tag else []}]
    return {
        "manifest.json": json.dumps(listed).encode(), "config.json": json.dumps(config).encode(), "layer.tar": layer,
    }  # fmt: skip


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


class Far:
    """An Edge with a store, on TCP."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = LayerStore(directory / "store", 64 * MIB)
        self.service = Images(self.store, upload_bytes_max=20 * MIB)

    async def start(self) -> None:
        await self.store.open()
        self.edge = service.Edge(self.directory / "edge", FakeSubstrate())
        await self.edge.open()
        self.server = await start_server(self.edge, make_listen("tcp:127.0.0.1:0", TOKEN, None), self.service)
        self.url = self.server.url
        self.images = AsyncImages(self.url, TOKEN)

    async def stop(self) -> None:
        await self.images.close()
        await self.server.stop()
        await self.edge.close()
        self.store.close()

    @property
    def unfinished(self) -> list[Path]:
        return list((self.directory / "store" / "tmp").iterdir())

    async def until_unfinished(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.unfinished) != count:  # noqa: ASYNC110  the disk tells nobody
                await asyncio.sleep(0)


@pytest.fixture
async def far(tmp_path: Path) -> AsyncIterator[Far]:
    made = Far(tmp_path)
    await made.start()
    yield made
    assert made.unfinished == []
    await made.stop()


async def test_images_are_sent_listed_named_and_removed_from_far_away(far: Far, tmp_path: Path) -> None:
    files = saved(b"1" * MIB, Env=["A=b"], WorkingDir="/srv", User="joe", Entrypoint=["/run"], Cmd=["x"])
    archive = tmp_path / "hi.tar"
    archive.write_bytes(tar(files))
    sent: list[int] = []
    first = await far.images.import_archive(archive, progress=sent.append)
    assert (first.name, first.source, first.config.env) == ("hi:1", str(archive), {"A": "b"})
    assert (first.config.workdir, first.config.user, first.config.entrypoint) == ("/srv", "joe", ("/run",))
    assert sum(sent) == archive.stat().st_size
    root = tmp_path / "layout"
    root.mkdir()
    for name, content in saved(b"2", tag="").items():
        (root / name).write_bytes(content)
    second = await far.images.import_archive(root)
    third = await far.images.import_archive(
        pieces(gzip.compress(tar(saved(b"1" * MIB)))), ImportOptions(name="packed:1")
    )
    assert (second.name, third.name, third.layers) == ("layout:latest", "packed:1", first.layers)
    both = await far.images.tag("both", ["layout", "hi:1"])
    assert (both.layers, both.config.workdir) == (second.layers + first.layers, "/srv")
    assert await far.images.images() == [both, first, second, third]
    layers = {layer.id: layer for layer in await far.images.layers()}
    assert layers.keys() == {*first.layers, *second.layers}
    assert layers[first.layers[0]].content_bytes == MIB
    with pytest.raises(StateError, match="image"):
        await far.images.remove(first.layers[0])
    with pytest.raises(InvalidArgumentError, match="65 images"):
        await far.images.tag("many", ["hi:1"] * 65)
    for name in ("both", "hi:1", "packed:1"):
        await far.images.remove(name)
    assert await far.images.collect() == list(first.layers)
    for attempt in (far.images.remove("hi:1"), far.images.tag("x", ["hi:1"]), far.images.remove(first.layers[0])):
        with pytest.raises(NotFoundError):
            await attempt


async def test_what_cannot_become_an_image_is_refused_and_leaves_nothing(far: Far) -> None:
    whole = tar(saved(b"1"))
    wrong = saved(b"1") | {"layer.tar": tar({"file": b"2"})}
    for data, options in (
        (b"", ImportOptions()),
        (os.urandom(MIB), ImportOptions()),
        (whole[: len(whole) // 3], ImportOptions()),
        (tar(wrong), ImportOptions()),
        (tar({"manifest.json": b"[" * 100_000}), ImportOptions()),
        (whole, ImportOptions(name="../../etc/x")),
        (whole, ImportOptions(reference="other:1")),
        (whole, ImportOptions(source="x" * 5000)),
        (tar(saved(b"1", tag="")), ImportOptions()),
    ):
        with pytest.raises((InvalidArgumentError, NotFoundError)):
            await far.images.import_archive(pieces(data), options)
    for size in (21, 1000):  # more than an upload may have
        with pytest.raises(ResourceExhaustedError, match="more than"):
            await far.images.import_archive(pieces(bytes(size * MIB), MIB))
    assert (await far.images.images(), await far.images.layers(), far.unfinished) == ([], [], [])


async def test_the_quota_counts_what_is_on_its_way(far: Far, tmp_path: Path) -> None:
    far.service = Images(far.store)
    server = await start_server(far.edge, make_listen("tcp:127.0.0.1:0", TOKEN, None), far.service)
    async with AsyncImages(server.url, TOKEN) as images:
        for data in (os.urandom(100 * MIB), gzip.compress(tar({"x": bytes(100 * MIB)}), 1)):
            with pytest.raises(ResourceExhaustedError, match="raise the quota"):
                await images.import_archive(pieces(data, MIB))
    await server.stop()
    assert far.unfinished == []


async def test_a_client_that_goes_away_leaves_nothing(far: Far) -> None:
    arrived = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        arrived.set()
        await asyncio.Event().wait()

    async def failing() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        raise InvalidArgumentError("cannot read it any more")

    task = asyncio.create_task(far.images.import_archive(slowly()))
    await arrived.wait()
    await far.until_unfinished(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await far.until_unfinished(0)
    with pytest.raises(InvalidArgumentError, match="any more"):
        await far.images.import_archive(failing())
    await far.until_unfinished(0)
    assert await far.images.layers() == []


async def test_a_byte_now_and_then_holds_no_place(far: Far) -> None:
    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    with pytest.raises(InvalidArgumentError, match="too slowly"):
        await Images(far.store, upload_wait_s=0.1).receive(ImportOptions(), slow())


async def test_only_so_many_come_in_at_once_and_the_next_is_told(far: Far) -> None:
    proceed = asyncio.Event()

    async def held(number: int) -> AsyncIterator[bytes]:
        yield tar(saved(b"%d" % number, tag=f"held:{number}"))
        await proceed.wait()

    tasks = [asyncio.create_task(far.images.import_archive(held(number))) for number in range(UPLOADS_COUNT_MAX)]
    await far.until_unfinished(UPLOADS_COUNT_MAX)
    with pytest.raises(ResourceExhaustedError, match="already"):
        await far.images.import_archive(pieces(tar(saved(b"1"))))
    proceed.set()
    assert len({image.layers for image in await asyncio.gather(*tasks)}) == UPLOADS_COUNT_MAX


async def test_the_protocol_itself_and_the_token_are_insisted_on(far: Far) -> None:
    connection = connect(far.url, TOKEN)

    async def requests(*messages: pb.ImportImageRequest) -> AsyncIterator[pb.ImportImageRequest]:
        for message in messages:
            yield message

    for bad in ((), (pb.ImportImageRequest(data=b"x"),), (pb.ImportImageRequest(),)):
        with pytest.raises(InvalidArgumentError, match="first message"):
            async for _ in connection.exchange("ImportImage", requests(*bad)):
                pass
    await connection.close()
    async with AsyncImages(far.url, "another token of some length") as images:
        for attempt in (images.images(), images.collect(), images.import_archive(pieces(tar(saved(b"1"))))):
            with pytest.raises(InvalidArgumentError, match="token"):
                await attempt


async def test_a_server_that_goes_while_the_archive_is_read_is_out_of_reach(far: Far) -> None:
    connection = connect(far.url, TOKEN)
    stub, calls = connection.stub, list[Any]()

    class Noted:
        def ImportImage(self, **options: Any) -> Any:
            calls.append(stub.ImportImage(**options))
            return calls[0]

    async def late() -> AsyncIterator[bytes]:
        await far.server.stop()
        await calls[0].code()  # it is over before there is anything to send
        yield b"x"

    connection.stub = Noted()
    with pytest.raises(UnreachableError, match="broke"):
        await far.images.import_archive(late())
    connection.stub = stub
    await connection.close()
    await far.until_unfinished(0)


async def test_an_edge_without_a_store_says_so(far: Far) -> None:
    server = await start_server(far.edge, make_listen("tcp:127.0.0.1:0", TOKEN, None))
    async with AsyncImages(server.url, TOKEN) as images:
        with pytest.raises(HostUnfitError, match="no store"):
            await images.images()
        with pytest.raises(HostUnfitError, match="no store"):
            await images.import_archive(pieces(tar(saved(b"1"))))
    async with await AsyncSandbox.create(url=server.url, token=TOKEN) as sandbox:
        with pytest.raises(HostUnfitError, match="no store"):
            await sandbox.snapshot("name")
    await server.stop()


async def test_the_command_line_asks_the_edge_that_it_is_told_of(far: Far, tmp_path: Path) -> None:
    archive = tmp_path / "hi.tar"
    archive.write_bytes(tar(saved(b"1")))

    async def dsec(*arguments: object) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("dsec"), "image", *map(str, arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "DSEC_API_URL": far.url, "DSEC_API_KEY": TOKEN, "DSEC_IMAGES_DIRECTORY": "/nowhere"},
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    code, out, _ = await dsec("import", archive)
    assert (code, out.splitlines()[0]) == (0, "hi:1")
    assert json.loads((await dsec("ls", "--json"))[1])["images"][0]["name"] == "hi:1"
    assert json.loads((await dsec("inspect", "hi:1"))[1])["layers"][0]["content_bytes"] == 1
    assert (await dsec("tag", "there", "hi:1"))[1].startswith("there:latest\n")
    assert await dsec("rm", "hi:1", "there") == (0, "", "")
    assert len((await dsec("gc"))[1].splitlines()) == 1
    for refused in (("build", "directory", tmp_path), ("publish", "hi:1")):
        code, _, err = await dsec(*refused)
        assert (code, "DSEC_API_URL" in err) == (2, True)
    code, _, err = await dsec("rm", "hi:1")
    assert (code, len(err.splitlines())) == (2, 1)
