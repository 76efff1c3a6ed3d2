"""Commands of a container that a keeper and a spool hold: output on disk, places, and what is left of them."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from dsec.conformance.check import line, shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.errors import InvalidArgumentError, OutcomeUnknownError, OutOfRangeError, ResourceExhaustedError
from dsec.types import SandboxSpec, TtySize
from tests.unit.dsec.test_processes import read_whole, ready, script, turn

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def kept(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ContainerSubstrate]:
    config = SubstrateConfig(spool_bytes_max=1 << 20, spool_sandbox_bytes_max=8 << 20)
    containers = ContainerSubstrate(config, state_dir=tmp_path_factory.mktemp("state"))
    await containers.open()
    yield containers
    await containers.close()


@pytest_asyncio.fixture(loop_scope="module")
async def spooled(kept: ContainerSubstrate) -> AsyncIterator[ContainerSandbox]:
    sandbox = await kept.create(SandboxSpec())
    yield sandbox
    await sandbox.destroy()


async def test_disk_keeps_the_whole(spooled: ContainerSandbox) -> None:
    process = await spooled.start(script("seq 100000; seq 9 >&2", output_bytes_max=1000))
    whole = b"".join(b"%d\n" % number for number in range(1, 100001))
    assert await read_whole(process) == whole
    result = await process.wait()
    assert (result.stdout.head, result.stdout.tail) == (whole[:500], whole[-500:])
    assert await read_whole(process) == whole
    assert await process.read_output("stderr", 0, 100) == result.stderr.data == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"


async def test_disk_is_bounded_and_the_end_is_kept_beyond(spooled: ContainerSandbox) -> None:
    process = await spooled.start(script("yes 0123456 | head -c 20000000; echo end", output_bytes_max=1000))
    result = await process.wait()
    assert result.stdout.total_bytes == 20_000_004
    assert result.stdout.tail.endswith(b"0123456\nend\n")
    assert await process.read_output("stdout", (1 << 20) - 8, 100) == b"0123456\n"
    assert await process.read_output("stdout", 20_000_000, 100) == b"end\n"
    with pytest.raises(OutOfRangeError):
        await process.read_output("stdout", 1 << 20, 1)


async def test_output_on_disk_goes_with_its_sandbox(kept: ContainerSubstrate) -> None:
    assert kept.state_dir is not None
    sandbox = await kept.create(SandboxSpec())
    directory: Path = kept.state_dir / "spool" / sandbox.id
    await line(sandbox, "true")
    assert not directory.exists()
    assert await line(sandbox, "echo x") == "x"
    assert [path.read_bytes() for path in directory.iterdir()] == [b"x\n"]
    await sandbox.destroy()
    assert not directory.exists()


async def test_no_descriptor_stays_here_or_with_the_keeper(
    kept: ContainerSubstrate, descriptors: Callable[[], list[str]]
) -> None:
    def held() -> tuple[int, int]:
        assert kept.keeper is not None
        return len(descriptors()), len(os.listdir(f"/proc/{kept.keeper.pid}/fd"))

    before = held()
    sandbox = await kept.create(SandboxSpec())
    for _ in range(5):
        await shell(sandbox, "cat; echo x >&2", stdin=bytes(300_000))
        await sandbox.exec(script("echo x", tty=TtySize()))
        process = await sandbox.start(script("cat & sleep 300", keep_stdin_open=True))
        await process.kill()
        await process.wait()
        with pytest.raises(InvalidArgumentError):
            await sandbox.exec(script("true", cwd="/no/such", tty=TtySize()))
        running = asyncio.create_task(sandbox.exec(script("sleep 300")))
        await line(sandbox, "until pgrep sleep > /dev/null; do :; done")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await sandbox.start(script("sleep 300", stdin=bytes(300_000)))
    await sandbox.destroy()
    async with asyncio.timeout(60):
        while held() != before:
            await turn()


async def test_a_terminal_has_its_place_with_the_keeper_before_its_command_runs(
    kept: ContainerSubstrate, spooled: ContainerSandbox
) -> None:
    keeper = kept.keeper
    assert keeper is not None
    count_max, keeper._count_max = keeper._count_max, len(keeper._held)
    command = script("touch /tmp/ran; read; echo $REPLY", tty=TtySize())
    with pytest.raises(ResourceExhaustedError, match="keeper"):
        await spooled.start(command, 1)
    assert await spooled.resume_process(1, command) is None
    keeper._count_max += 1
    process = await spooled.start(command, 2)
    with pytest.raises(ResourceExhaustedError, match="keeper"):
        await spooled.start(command, 3)
    await process.write_stdin(b"typed\n")
    assert (await process.wait()).stdout.data == b"typed\r\ntyped\r\n"
    assert (await spooled.exec(script("echo x", tty=TtySize()))).stdout.data == b"x\r\n"
    keeper._count_max = count_max


async def test_output_that_is_gone_at_the_end_makes_the_outcome_unknown(
    kept: ContainerSubstrate, spooled: ContainerSandbox
) -> None:
    assert kept.state_dir is not None
    process = await spooled.start(script("echo ready; read; exit 3", keep_stdin_open=True))
    await ready(process)
    shutil.rmtree(kept.state_dir / "spool" / spooled.id)
    await process.write_stdin(b"\n")
    with pytest.raises(OutcomeUnknownError, match="its output is lost"):
        await process.wait()


async def test_a_resume_that_is_given_up_anywhere_leaves_no_note_of_the_pause(
    kept: ContainerSubstrate, spooled: ContainerSandbox
) -> None:
    assert kept.keeper is not None
    for turns in range(12):
        await spooled.pause()
        resuming = asyncio.create_task(spooled.resume())
        for _ in range(turns):
            await turn()
        resuming.cancel()
        await asyncio.gather(resuming, return_exceptions=True)
        notes = [key for key in kept.keeper._held if f"{spooled.id}/0/paused" in key]
        assert len(notes) == (spooled._paused_at is not None), f"given up after {turns} turns"
    await spooled.resume()
