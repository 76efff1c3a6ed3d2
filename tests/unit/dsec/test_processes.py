"""Commands of a container as processes: waiting, input, output by offset, pauses, and hostile neighbours."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from dsec.conformance.check import ENV, line, shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.edge.substrates.container_sandbox import ContainerSandbox
from dsec.edge.substrates.processes import GuestProcess
from dsec.errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    OutOfRangeError,
    ResourceExhaustedError,
    SandboxLostError,
)
from dsec.types import Command, ExecResult, SandboxSpec, TtySize

pytestmark = pytest.mark.asyncio(loop_scope="module")

PIPE_BYTES = 65536
STORM = """
import os, signal
print("go", flush=True)
while True:
    try: os.kill(-1, signal.SIGSTOP)
    except ProcessLookupError: pass
"""


def script(text: str, **options: object) -> Command:
    return Command(**{"argv": ("bash", "-c", text), "env": ENV, "timeout_s": 60.0, **options})  # type: ignore[arg-type]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate() -> AsyncIterator[ContainerSubstrate]:
    containers = ContainerSubstrate(SubstrateConfig(answer_grace_s=2.0))
    await containers.open()
    yield containers
    await containers.close()


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox(substrate: ContainerSubstrate) -> AsyncIterator[ContainerSandbox]:
    sandbox = await substrate.create(SandboxSpec())
    yield sandbox
    await sandbox.destroy()


async def read_whole(process: GuestProcess, offset: int = 0) -> bytes:
    parts = []
    while part := await process.read_output("stdout", offset, 1 << 18):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


async def ready(process: GuestProcess) -> None:
    assert await process.read_output("stdout", 0, 6) == b"ready\n"


async def turn() -> None:
    await asyncio.sleep(0)


# -- numbers and ends ----------------------------------------------------------------------------


async def test_a_number_names_one_command_for_ever(sandbox: ContainerSandbox) -> None:
    first = await sandbox.start(script("exit 3"))
    again = await sandbox.start(script("exit 4"), 40)
    assert (first.number, again.number) == (1, 40)
    assert [(await process.wait()).exit_code for process in (first, again)] == [3, 4]
    assert await sandbox.resume_process(40, again.command) is again
    assert (await sandbox.start(script("true"))).number == 41
    assert await sandbox.resume_process(99, script("true")) is None
    for number in (0, -1, 1 << 32, 40):
        with pytest.raises(InvalidArgumentError):
            await sandbox.start(script("true"), number)
    await shell(sandbox, "true")
    with pytest.raises(OutcomeUnknownError):
        await sandbox.resume_process(42, script("true"))


async def test_a_start_that_was_given_up_before_the_guest_heard_of_it_never_was(sandbox: ContainerSandbox) -> None:
    command = script("touch /tmp/ran")
    async with sandbox._gate:  # as a snapshot holds it
        starting = asyncio.create_task(sandbox.start(command, 7))
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert (await (await sandbox.start(script("test -e /tmp/ran"), 8)).wait()).exit_code == 1
    assert await sandbox.resume_process(7, command) is None


async def test_a_waiter_that_goes_away_leaves_the_command(sandbox: ContainerSandbox) -> None:
    process = await sandbox.start(script("echo ready; read; exit 5", keep_stdin_open=True))
    waiters = [asyncio.create_task(process.wait()) for _ in range(3)]
    await ready(process)
    waiters[0].cancel()
    await process.write_stdin(b"\n")
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [result.exit_code for result in results[1:] if isinstance(result, ExecResult)] == [5, 5]


async def test_what_is_sent_after_the_end_is_without_effect(sandbox: ContainerSandbox) -> None:
    process = await sandbox.start(script("true", tty=TtySize()))
    await process.wait()
    await process.kill()
    await process.signal(9)
    await process.write_stdin(b"x" * (1 << 20))
    await process.close_stdin()
    await process.resize(1, 1)
    for refused in (process.signal(0), process.signal(65), process.resize(0, 1), process.read_output("stdout", -1, 1)):
        with pytest.raises(InvalidArgumentError):
            await refused


async def test_commands_of_a_lost_sandbox_are_lost(substrate: ContainerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    process = await sandbox.start(script("echo ready; sleep 100"))
    await ready(process)
    await sandbox.destroy()
    with pytest.raises(SandboxLostError):
        await process.wait()
    await process.kill()
    assert await process.read_output("stdout", 6, 10) == b""
    for call in (
        sandbox.pause(),
        sandbox.resume(),
        sandbox.start(script("true")),
        sandbox.resume_process(9, script("")),
    ):
        with pytest.raises(SandboxLostError):
            await call


async def test_an_exec_that_could_wait_for_input_for_ever_finds_its_end(sandbox: ContainerSandbox) -> None:
    assert (await sandbox.exec(script("cat; echo end", keep_stdin_open=True, stdin=b"a"))).stdout.data == b"aend\n"
    result = await sandbox.exec(script("cat; echo end", tty=TtySize(), stdin=b"a\n"))
    assert result.stdout.data == b"a\r\na\r\nend\r\n"


# -- input ---------------------------------------------------------------------------------------


async def test_a_command_that_does_not_read_slows_its_writer_only(sandbox: ContainerSandbox) -> None:
    process = await sandbox.start(script("echo ready; read; wc -c", keep_stdin_open=True))
    await ready(process)
    writing = asyncio.create_task(process.write_stdin(b"\n" + bytes(PIPE_BYTES * 8)))
    slow = await sandbox.start(script("sleep 100", keep_stdin_open=True))
    stuck = asyncio.create_task(slow.write_stdin(bytes(PIPE_BYTES * 8)))
    await writing
    await process.close_stdin()
    assert (await process.wait()).stdout.data.split()[-1] == b"%d" % (PIPE_BYTES * 8)
    assert not stuck.done()
    await slow.kill()
    await stuck


async def test_input_arrives_in_the_order_of_its_writers(sandbox: ContainerSandbox) -> None:
    first, second = b"1" * PIPE_BYTES * 3, b"2" * PIPE_BYTES * 3
    process = await sandbox.start(script("sleep 0.2; cat", keep_stdin_open=True, stdin=b"0" * PIPE_BYTES * 3))
    await asyncio.gather(process.write_stdin(first), process.write_stdin(second))
    await process.close_stdin()
    assert (await process.wait()).stdout.data == b"0" * PIPE_BYTES * 3 + first + second
    with pytest.raises(InvalidArgumentError, match="keep_stdin_open"):
        await (await sandbox.start(script("true"))).write_stdin(b"x")


# -- output --------------------------------------------------------------------------------------


async def test_output_is_read_while_it_comes_and_again_later(sandbox: ContainerSandbox) -> None:
    process = await sandbox.start(script("echo ready; read; echo more; echo oops >&2", keep_stdin_open=True))
    await ready(process)
    more = asyncio.create_task(process.read_output("stdout", 6, 100))
    await process.write_stdin(b"\n")
    assert await more == b"more\n"
    await process.wait()
    assert await process.read_output("stdout", 0, 8) == b"ready\nmo"
    assert await process.read_output("stdout", 11, 8) == b""
    assert await process.read_output("stderr", 0, 100) == b"oops\n"


async def test_memory_keeps_both_ends_and_says_what_it_dropped(sandbox: ContainerSandbox) -> None:
    process = await sandbox.start(script("seq 100000", output_bytes_max=1000))
    result = await process.wait()
    whole = b"".join(b"%d\n" % number for number in range(1, 100001))
    assert result.stdout.total_bytes == len(whole)
    assert await process.read_output("stdout", 100, 50) == whole[100:150]
    assert await read_whole(process, len(whole) - 500) == whole[-500:]
    with pytest.raises(OutOfRangeError):
        await process.read_output("stdout", 600, 1)


# -- pauses --------------------------------------------------------------------------------------


async def test_a_pause_longer_than_every_timeout_costs_a_command_nothing(
    substrate: ContainerSubstrate, sandbox: ContainerSandbox
) -> None:
    process = await sandbox.start(script("echo ready; read; echo done", keep_stdin_open=True, timeout_s=4.0))
    await ready(process)
    await sandbox.pause()
    other = await substrate.create(SandboxSpec())
    assert (await other.exec(script("sleep 300", timeout_s=7.0))).timed_out, "longer than its timeout and the grace"
    await other.destroy()
    assert await process.read_output("stdout", 0, 100) == b"ready\n"
    await process.write_stdin(b"\n")
    result = await process.wait()
    assert (result.exit_code, result.stdout.data, result.timed_out) == (0, b"ready\ndone\n", False)


async def test_pauses_and_commands_race_and_every_command_ends(sandbox: ContainerSandbox) -> None:
    async def pause() -> None:
        for _ in range(15):
            await sandbox.pause()
            await asyncio.sleep(0)

    async def run() -> list[int]:
        return [(await sandbox.exec(script("exit 7"))).exit_code for _ in range(15)]

    stubborn = await sandbox.start(script("echo ready; while :; do :; done"))
    await ready(stubborn)
    racing = asyncio.gather(pause(), run(), run(), pause())
    async with asyncio.timeout(60):
        while not racing.done():
            await sandbox.resume()
            await asyncio.sleep(0)
    _, first, second, _ = await racing
    assert first == second == [7] * 15
    await sandbox.pause()
    await asyncio.gather(stubborn.kill(), sandbox.pause(), sandbox.resume())
    await sandbox.resume()
    assert (await stubborn.wait()).exit_code == 137


async def test_what_could_not_go_on_is_paused_still_and_goes_on_with_the_next_request(
    sandbox: ContainerSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise ResourceExhaustedError("Docker: no")

    process = await sandbox.start(script("echo ready; read; exit 3", keep_stdin_open=True))
    await ready(process)
    await sandbox.pause()
    monkeypatch.setattr(sandbox, "_thaw", fail)
    for _ in range(2):
        with pytest.raises(ResourceExhaustedError):
            await sandbox.start(script("true"), 7)
    monkeypatch.undo()
    assert await sandbox.resume_process(7, script("true")) is None
    await process.write_stdin(b"\n")
    assert (await process.wait()).exit_code == 3


async def test_a_paused_sandbox_is_destroyed_like_any_other(substrate: ContainerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec())
    process = await sandbox.start(script("sleep 300"))
    await sandbox.pause()
    await sandbox.destroy()
    with pytest.raises(SandboxLostError):
        await process.wait()


# -- hostile neighbours --------------------------------------------------------------------------


async def test_a_storm_of_stop_signals_stops_commands_and_not_the_guest(sandbox: ContainerSandbox) -> None:
    storm = await sandbox.start(Command(argv=("python3", "-c", STORM), env=ENV, timeout_s=60))
    assert await storm.read_output("stdout", 0, 3) == b"go\n"
    results = [await sandbox.exec(Command(argv=("/bin/true",), env=ENV, timeout_s=0.5)) for _ in range(3)]
    assert [result for result in results if not result.timed_out and result.exit_code != 0] == []
    alone = await sandbox.exec(Command(argv=("echo", "alone"), env=ENV, kill_others=True))
    assert (alone.exit_code, alone.stdout.data) == (0, b"alone\n")
    assert (await storm.wait()).exit_code == 137


async def test_a_user_keeps_nothing_of_roots_rights(sandbox: ContainerSandbox) -> None:
    await line(sandbox, "chmod 700 /root")
    with pytest.raises(InvalidArgumentError, match=r"cwd '/root': Permission denied"):
        await sandbox.exec(script("true", user="77:88", cwd="/root"))
    with pytest.raises(InvalidArgumentError, match=r"cwd '/root': Permission denied"):
        await sandbox.exec(script("true", user="77:88", cwd="/root", tty=TtySize()))


async def test_a_terminal_is_of_this_sandbox_alone(sandbox: ContainerSandbox) -> None:
    inject = (
        "import fcntl, termios, os\n"
        "try: fcntl.ioctl(0, termios.TIOCSTI, b'x')\n"
        "except OSError as error: print('TIOCSTI', error.strerror)\n"
        "print(os.ttyname(0), os.major(os.fstat(0).st_rdev))\n"
        "made = []\n"
        "try:\n"
        "    while True: made.append(os.openpty())\n"
        "except OSError as error: print(len(made) < 64, error.strerror)\n"
    )
    command = Command(argv=("python3", "-c", inject), env=ENV, tty=TtySize(), timeout_s=60)
    result = await sandbox.exec(command)
    assert result.stdout.data == (
        b"TIOCSTI Operation not permitted\r\n/dev/pts/0 136\r\nTrue No space left on device\r\n"
    )
    assert (await sandbox.exec(script("tty", tty=TtySize()))).stdout.data == b"/dev/pts/0\r\n"
