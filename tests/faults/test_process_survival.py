"""An Edge is killed while commands run: the next one collects each byte and each end, and says what it cannot know."""

import asyncio
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dsec.conformance.check import ENV, line
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import OutcomeUnknownError
from dsec.types import Command, SandboxId, SandboxSpec, TtySize

BOX = SandboxId("box")
OWNER = """
import asyncio, sys
from pathlib import Path
from dsec.edge.config import SubstrateConfig
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.types import Command, SandboxId, SandboxSpec, TtySize
from tests.faults.test_process_survival import script

async def main():
    substrate = ContainerSubstrate(SubstrateConfig(spool_bytes_max=1 << 20), state_dir=Path(sys.argv[1]))
    await substrate.open()
    box = await substrate.create(SandboxSpec(), SandboxId("box"))
%s
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def script(text: str, **options: object) -> Command:
    return Command(**{"argv": ("bash", "-c", text), "env": ENV, "timeout_s": 60.0, **options})  # type: ignore[arg-type]


def run_until_killed(state_dir: Path, body: str, after_s: float = 0.0) -> None:
    """Another process does `body` with a sandbox named box, says so, and is killed `after_s` later."""
    root = Path(__file__).resolve().parents[2]
    program = OWNER % textwrap.indent(textwrap.dedent(body), "    ")
    with subprocess.Popen([sys.executable, "-c", program, str(state_dir)], stdout=subprocess.PIPE, cwd=root) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        time.sleep(after_s)  # the moment of a kill is what varies here
        owner.kill()


def wait_until_childless(pid: str) -> None:
    while Path(f"/proc/{pid}/task/{pid}/children").read_text():
        time.sleep(0.01)


async def reopen(state_dir: Path) -> ContainerSubstrate:
    substrate = ContainerSubstrate(SubstrateConfig(spool_bytes_max=1 << 20), state_dir=state_dir)
    await substrate.open()
    return substrate


async def test_every_kind_of_command_is_collected(tmp_path: Path) -> None:
    run_until_killed(
        tmp_path,
        """
        await box.exec(script("echo one; echo err >&2; exit 1"))
        await box.start(script("sleep 1; echo two; exit 2"), 2)
        await box.start(script("cat; exit 3", keep_stdin_open=True, stdin=b"a"), 3)
        await box.start(script("read line; echo $line; stty size; exit 4", tty=TtySize()), 4)
        await box.start(script("exit 5", user="nosuchuser"), 5)
        await box.start(script("sleep 1000", timeout_s=0.5), 6)
        await box.start(script("sleep 1000", stdin=bytes(1000000)), 7)
        await (await box.start(script("sleep 1000 & echo back"), 8)).wait()
        """,
    )
    substrate = await reopen(tmp_path)
    box = substrate.adopted()[BOX]
    assert await box.resume_process(9, script("never started")) is None

    async def collected(number: int, command: Command) -> tuple[int, bytes, bytes]:
        process = await box.resume_process(number, command)
        assert process is not None
        assert await box.resume_process(number, command) is process
        if command.keep_stdin_open or command.tty:
            await process.resize(7, 9) if command.tty else await process.write_stdin(b"b")
            await process.write_stdin(b"typed\n")
            await process.close_stdin()
        result = await process.wait()
        assert await process.read_output("stdout", 0, 9) == result.stdout.data[:9]
        return result.exit_code, result.stdout.data, result.stderr.data

    assert await collected(1, script("")) == (1, b"one\n", b"err\n")
    assert await collected(2, script("")) == (2, b"two\n", b"")
    assert await collected(3, script("", keep_stdin_open=True)) == (3, b"abtyped\n", b"")
    assert await collected(4, script("", tty=TtySize())) == (4, b"typed\r\ntyped\r\n7 9\r\n", b"")
    assert await collected(6, script("", timeout_s=0.5)) == (137, b"", b"")
    assert await collected(8, script("")) == (0, b"back\n", b"")
    with pytest.raises(OutcomeUnknownError, match="stdin"):
        await collected(7, script("", stdin=bytes(1000000)))
    with pytest.raises(Exception, match="user"):
        await collected(5, script("", user="nosuchuser"))
    assert await line(box, "pgrep -c sleep") == "1", "what was cut off lives on, or the background does not"
    await substrate.close()
    assert not list((tmp_path / "spool").iterdir())


@pytest.mark.parametrize("seed", range(4))
async def test_no_byte_is_lost_wherever_the_kill_falls(tmp_path: Path, seed: int) -> None:
    moment = random.Random(seed).uniform(0, 0.3)
    print(f"killed after {moment:.3f} s")
    count = 120_000
    run_until_killed(tmp_path, f"await box.start(script('seq {count}; seq {count} >&2; exit 9'), 1)", moment)
    substrate = await reopen(tmp_path)
    process = await substrate.adopted()[BOX].resume_process(1, script("", output_bytes_max=4000))
    assert process is not None
    result = await process.wait()
    whole = b"".join(b"%d\n" % number for number in range(1, count + 1))
    assert result.exit_code == 9
    for stream, output in (("stdout", result.stdout), ("stderr", result.stderr)):
        assert (output.head, output.tail, output.total_bytes) == (whole[:2000], whole[-2000:], len(whole))
        seen = b""
        while part := await process.read_output("stdout" if stream == "stdout" else "stderr", len(seen), 1 << 20):
            seen += part
        assert seen == whole
    await substrate.close()


async def test_a_paused_sandbox_stays_paused_and_its_time_stands(tmp_path: Path) -> None:
    body = """
    process = await box.start(script("echo ready; read; echo done", keep_stdin_open=True, timeout_s=4.0), 1)
    await process.read_output("stdout", 0, 10)
    await box.start(script("while :; do :; done"), 2)
    await box.pause()
    """
    run_until_killed(tmp_path, body, 4.5)
    substrate = await reopen(tmp_path)
    box = substrate.adopted()[BOX]
    process = await box.resume_process(1, script("", keep_stdin_open=True, timeout_s=4.0))
    assert process is not None
    assert (box.seat.box.tracker / "cgroup.freeze").read_text() == "1\n"
    await process.write_stdin(b"\n")
    result = await process.wait()
    assert (result.exit_code, result.stdout.data, result.timed_out) == (0, b"ready\ndone\n", False)
    await substrate.close()


async def test_a_command_took_its_own_time_whoever_was_there_at_its_end(tmp_path: Path) -> None:
    body = """
    (Path(sys.argv[1]) / "guest").write_text(str(box.host_pid))
    process = await box.start(script("echo ready; sleep 0.3"), 1)
    await process.read_output("stdout", 0, 10)
    """
    begun_s = time.monotonic()
    run_until_killed(tmp_path, body)
    wait_until_childless((tmp_path / "guest").read_text())
    ended_s = time.monotonic() - begun_s
    await asyncio.sleep(ended_s)  # here time itself is what is checked
    substrate = await reopen(tmp_path)
    process = await substrate.adopted()[BOX].resume_process(1, script(""))
    assert process is not None
    assert 0.3 <= (await process.wait()).duration_s < ended_s
    await substrate.close()


async def test_ends_that_nobody_collected_are_remembered_up_to_a_bound(tmp_path: Path) -> None:
    run_until_killed(tmp_path, "for number in range(1, 151): await box.exec(script(f'exit {number}'))")
    substrate = await reopen(tmp_path)
    box = substrate.adopted()[BOX]
    remembered = await box.resume_process(150, script(""))
    assert remembered is not None
    assert (await remembered.wait()).exit_code == 150
    oldest = await box.resume_process(23, script(""))
    assert oldest is not None
    assert (await oldest.wait()).exit_code == 23
    with pytest.raises(OutcomeUnknownError):
        await box.resume_process(22, script(""))
    assert await box.resume_process(151, script("")) is None
    assert (await box.start(script("exit 1"))).number == 151
    await substrate.close()


async def test_a_terminal_that_an_edge_did_not_live_to_read_is_kept_by_the_next_one(tmp_path: Path) -> None:
    """It is typed at once, whichever Edge collects the command, and outlives that one too."""
    command = script("read a; echo got $a; read b; echo $b; exit 4", tty=TtySize(), stdin=b"one\n")
    run_until_killed(
        tmp_path,
        """
        import time
        start = box._guest.start

        async def start_and_stand_still(*arguments):
            await start(*arguments)
            print("ready", flush=True)
            time.sleep(1000)

        box._guest.start = start_and_stand_still
        await box.start(script("read a; echo got $a; read b; echo $b; exit 4", tty=TtySize(), stdin=b"one\\n"), 1)
        """,
    )
    for _ in range(2):  # in the first, nobody asks for the command
        substrate = await reopen(tmp_path)
        assert await line(substrate.adopted()[BOX], "true") == ""
        await substrate.detach()
    for typed in (b"", b"two\n"):
        substrate = await reopen(tmp_path)
        process = await substrate.adopted()[BOX].resume_process(1, command)
        assert process is not None
        assert await process.read_output("stdout", 5, 9) == b"got one\r\n"
        await process.write_stdin(typed)
        if not typed:
            await substrate.detach()
    result = await process.wait()
    assert (result.exit_code, result.stdout.data) == (4, b"one\r\ngot one\r\ntwo\r\ntwo\r\n")
    await substrate.close()


async def test_detaching_in_the_midst_of_commands_loses_none(tmp_path: Path) -> None:
    first = await reopen(tmp_path)
    box = await first.create(SandboxSpec(), BOX)
    process = await box.start(script("for i in $(seq 20000); do echo $i; done; exit 3"), 1)
    waiting = asyncio.create_task(process.wait())
    await process.read_output("stdout", 0, 10)
    await first.detach()
    with pytest.raises(Exception, match="next process"):
        await waiting
    second = await reopen(tmp_path)
    again = await second.adopted()[BOX].resume_process(1, script(""))
    assert again is not None
    result = await again.wait()
    assert (result.exit_code, result.stdout.data) == (3, b"".join(b"%d\n" % n for n in range(1, 20001)))
    await second.close()
