"""A really full disk below the Edge's directory: new work is refused, what runs ends, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from dsec.edge.edge_config import EdgeConfig
from dsec.edge.service import Edge
from dsec.errors import ResourceExhaustedError
from dsec.testing import FakeHost, FakeSandbox, FakeSubstrate
from dsec.types import Command, ExecResult, Output
from dsec.views import CreateRequest

MIB = 1 << 20
CONFIG = EdgeConfig(disk_free_bytes_min=2 * MIB, log_reserve_bytes=4 * MIB, log_segment_bytes_max=MIB)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


class World:
    """`big` writes a megabyte, `wait` ends when it is told."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.may_end = asyncio.Event()
        self.runs: list[str] = []

    async def answer(self, _sandbox: FakeSandbox, command: Command) -> ExecResult:
        self.runs.append(command.argv[0])
        if command.argv[0] == "wait":
            await self.may_end.wait()
        return ExecResult(exit_code=0, stdout=Output(os.urandom(MIB // 2)))


@contextlib.asynccontextmanager
async def opened(disk: Path, world: World) -> AsyncIterator[Edge]:
    edge = Edge(disk / "edge", FakeSubstrate(world.answer, world.host), CONFIG)
    await edge.open()
    yield edge
    await edge.close()


def fill(path: Path, leave_bytes: int) -> Path:
    stat = os.statvfs(path)
    ballast = path / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(fd, 0, stat.f_bavail * stat.f_frsize - leave_bytes)
    os.close(fd)
    return ballast


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never became so")


async def test_a_full_disk_refuses_before_anything_runs_and_room_makes_it_work_again(disk: Path) -> None:
    world = World()
    async with opened(disk, world) as edge:
        box = (await edge.create(CreateRequest())).id
        first = await edge.exec(box, Command(argv=("big",)), "first")
        ballast = fill(disk, 0)
        with pytest.raises(ResourceExhaustedError, match="disk"):
            await edge.exec(box, Command(argv=("refused",)), "refused")
        with pytest.raises(ResourceExhaustedError, match="disk"):
            await edge.create(CreateRequest(request_id="r"))
        assert await edge.exec(box, Command(argv=("big",)), "first") == first
        ballast.unlink()
        assert "refused" not in world.runs
        await edge.exec(box, Command(argv=("refused",)), "refused")
        assert (await edge.create(CreateRequest(request_id="r"))).state == "running"
        assert world.runs == ["big", "refused"]


async def test_what_runs_when_the_disk_fills_up_ends_in_the_journal_and_survives(disk: Path) -> None:
    world = World()
    async with opened(disk, world) as edge:
        box = (await edge.create(CreateRequest())).id
        for number in range(8):
            await edge.start(box, Command(argv=("wait",)), f"k{number}")
        ballast = fill(disk, 0)
        world.may_end.set()
        ends = asyncio.gather(*(edge.wait(box, f"k{number}") for number in range(8)))
        await until(lambda: not (disk / "edge/log.reserve").exists())
        with pytest.raises(ResourceExhaustedError):
            await edge.exec(box, Command(argv=("refused",)), "refused")
        ballast.unlink()
        known = await ends
        assert await edge.exec(box, Command(argv=("wait",)), "k7") == known[7]
        await edge.detach()
    assert world.runs == ["wait"] * 8
    async with opened(disk, world) as edge:
        assert [await edge.exec(box, Command(argv=("wait",)), f"k{number}") for number in range(8)] == known
    assert world.runs == ["wait"] * 8
