"""A guest that refuses, or is out of its mind: the caller learns whose fault it was, and nothing leaks."""

import asyncio
import ctypes
import errno
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dsec.conformance.check import ENV, shell
from dsec.edge.config import SubstrateConfig
from dsec.edge.native_wire import PROTOCOL_VERSION, MessageType, Stage, encode_string, encode_u32
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import (
    DsecError,
    HostUnfitError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SandboxLostError,
)
from dsec.types import Command, SandboxSpec

# A spawner and its guests as one process.  A command `answer HEX` is answered with these bytes, in which
# `id` stands for the command's number, and with a descriptor that nobody asked for; any other one exits well.
SPAWNER = """#!{python}
import os, socket, struct, sys, threading
from dsec.edge.native_wire import MessageReader, MessageType, encode_u32

def serve(guest):
    guest.send(encode_u32(MessageType.READY))
    while packet := socket.recv_fds(guest, 65536, 4)[0]:
        words = MessageReader(packet)
        exec_id = [words.u32() for _ in range(7)][1]
        words.string(), words.string()
        argv = [words.string() for _ in range(words.u32())]
        answer = encode_u32(MessageType.EXITED, exec_id, 0, 0, 0, 0)
        if argv[0] == "answer":
            answer = b"".join(encode_u32(exec_id) if part == "id" else bytes.fromhex(part) for part in argv[1:])
        with open("/dev/null") as extra:
            socket.send_fds(guest, [answer], [extra.fileno()])

control = socket.socket(fileno=int(sys.argv[2]))
control.recv(65536)
control.send(encode_u32(MessageType.INITED, 0, 256, {version}))
while packet := control.recv(65536):
    kind, slot = struct.unpack_from("<2I", packet)
    if kind == MessageType.DESTROY:
        control.send(encode_u32(MessageType.GONE, slot))
        continue
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, open("/dev/null") as extra:
        threading.Thread(target=serve, args=[ours], daemon=True).start()
        message = encode_u32(MessageType.CREATED, slot, os.getpid())
        socket.send_fds(control, [message], [theirs.fileno(), extra.fileno()])
"""


def write_spawner(program: Path, version: int = PROTOCOL_VERSION, step: str = "pass") -> None:
    text = SPAWNER.replace("{python}", sys.executable).replace("{version}", str(version))
    program.write_text(text.replace("    kind, slot =", f"    {step}\n    kind, slot ="))
    program.chmod(0o755)


async def test_a_spawner_of_another_build_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "spawner"
    write_spawner(program, PROTOCOL_VERSION + 1)
    with pytest.raises(HostUnfitError, match="another build"):
        await ContainerSubstrate(SubstrateConfig(binary_path=program)).open()


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[ContainerSubstrate]:
    program = tmp_path / "spawner"
    write_spawner(program)
    substrate = ContainerSubstrate(SubstrateConfig(binary_path=program))
    await substrate.open()
    yield substrate
    await substrate.close()


def answered(*parts: bytes | None) -> Command:
    return Command(argv=("answer", *("id" if part is None else part.hex() for part in parts)), output_bytes_max=4096)


def refused(stage: int, number: int) -> Command:
    return answered(encode_u32(MessageType.REFUSED), None, encode_u32(stage, number))


@pytest.mark.parametrize(
    ("stage", "number", "expected"),
    [
        (Stage.CWD, errno.ENOENT, InvalidArgumentError),
        (Stage.EXEC, errno.E2BIG, InvalidArgumentError),
        (Stage.EXEC, errno.EIO, ResourceExhaustedError),
        (Stage.FORK, errno.ENOMEM, ResourceExhaustedError),
        (Stage.FORK, errno.EAGAIN, ResourceExhaustedError),
        (Stage.COMMANDS, errno.EAGAIN, ResourceExhaustedError),
    ],
)
async def test_a_refused_command_leaves_a_working_sandbox(
    scripted: ContainerSubstrate, stage: Stage, number: int, expected: type[DsecError]
) -> None:
    sandbox = await scripted.create(SandboxSpec())
    with pytest.raises(expected) as caught:
        await sandbox.exec(refused(stage, number))
    assert os.strerror(number) in str(caught.value)
    assert (await sandbox.exec(Command(argv=("true",)))).exit_code == 0


@pytest.mark.parametrize("stage", [Stage.REQUEST, Stage.GROUP, Stage.ALONE])
async def test_a_sandbox_that_can_start_no_command_is_lost(scripted: ContainerSubstrate, stage: Stage) -> None:
    sandbox = await scripted.create(SandboxSpec())
    with pytest.raises(SandboxLostError, match=f"no longer works: .*{stage.name.lower()}"):
        await sandbox.exec(refused(stage, errno.EBUSY))
    with pytest.raises(SandboxLostError):
        await sandbox.exec(Command(argv=("true",)))
    await sandbox.destroy()


async def test_a_sandbox_full_of_its_own_processes_answers_as_a_shell_would(scripted: ContainerSubstrate) -> None:
    sandbox = await scripted.create(SandboxSpec())
    result = await sandbox.exec(refused(Stage.CROWDED, errno.EAGAIN))
    assert result.exit_code == 126
    assert result.stderr.data == (
        b"cannot start: Resource temporarily unavailable (too many processes in this sandbox)\n"
    )
    assert (await sandbox.exec(Command(argv=("true",)))).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        answered(encode_u32(99, 1)),
        answered(encode_u32(MessageType.READY)),
        answered(b"\1"),
        answered(encode_u32(MessageType.EXITED), None),
        answered(encode_u32(MessageType.FAILED, 1) + encode_string("late") + encode_u32(5)),
        refused(77, errno.EIO),
        refused(Stage.CWD, 1 << 31),
    ],
    ids=["unknown type", "ready twice", "a torn number", "a torn answer", "a late failure", "no stage", "no errno"],
)
async def test_a_guest_that_talks_nonsense_is_a_lost_sandbox(scripted: ContainerSubstrate, command: Command) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    sandbox = await scripted.create(SandboxSpec())
    with pytest.raises(SandboxLostError):
        await asyncio.wait_for(sandbox.exec(command), 60)
    await sandbox.destroy()
    assert problems == []


async def test_descriptors_that_nobody_asked_for_are_closed(
    scripted: ContainerSubstrate, descriptors: Callable[[], list[str]]
) -> None:
    before = descriptors()
    for _ in range(3):
        sandbox = await scripted.create(SandboxSpec())
        for _ in range(5):
            await sandbox.exec(Command(argv=("true",)))
        with pytest.raises(SandboxLostError):
            await sandbox.exec(answered(encode_u32(99, 1)))
        await sandbox.destroy()
    assert len(after := descriptors()) == len(before), (before, after)


async def test_a_spawner_that_talks_nonsense_is_replaced(tmp_path: Path) -> None:
    program = tmp_path / "spawner"
    once = f"os.path.exists({str(tmp_path)!r} + '/mad') and (os.unlink({str(tmp_path)!r} + '/mad'), control.send(b'x'))"
    write_spawner(program, step=once)
    substrate = ContainerSubstrate(SubstrateConfig(binary_path=program))
    await substrate.open()
    (tmp_path / "mad").touch()
    sandbox = await asyncio.wait_for(substrate.create(SandboxSpec()), 60)
    assert not (tmp_path / "mad").exists()
    assert (await sandbox.exec(Command(argv=("true",)))).exit_code == 0
    await substrate.close()


async def test_a_command_that_must_be_alone_is_not_started_beside_a_survivor() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    substrate = ContainerSubstrate()
    await substrate.open()
    sandbox = await substrate.create(SandboxSpec())
    await shell(sandbox, "setsid sleep 1000 > /dev/null 2>&1 &")
    until = "until pgrep -x sleep > /dev/null; do :; done"
    await shell(sandbox, until)
    (survivor,) = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_child(int(pid), sandbox.host_pid))
    # The corpse of a process that the host traces cannot be reaped by its parent: it stays.
    seize = 0x4206
    assert libc.ptrace(seize, survivor, 0, 0) == 0, os.strerror(ctypes.get_errno())
    alone = Command(argv=("touch", "/tmp/started"), env=ENV, kill_others=True, timeout_s=30)
    with pytest.raises(SandboxLostError, match="alone"):
        await sandbox.exec(alone)
    await asyncio.to_thread(os.waitpid, survivor, 0)
    await sandbox.destroy()
    await substrate.close()


def is_child(pid: int, parent: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[1]) == parent
