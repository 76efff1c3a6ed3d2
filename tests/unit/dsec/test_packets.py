"""Who waits to send to an end that goes away learns of it, each in the words of what was to be told."""

import asyncio
import os
import socket
from collections.abc import Coroutine, Iterable
from typing import Any

import pytest

from dsec.edge.guest import Guest
from dsec.edge.native_process import NativeProcess
from dsec.edge.native_wire import CgroupPlan
from dsec.edge.packets import PacketSocket
from dsec.edge.spawner import Spawner
from dsec.errors import SandboxLostError, SpawnError
from dsec.types import Command, SandboxSpec

PLAN = CgroupPlan("guest", "command", 0, "oom", ())
WAITING = 3


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def fill(packets: PacketSocket, more: Iterable[Coroutine[Any, Any, Any]]) -> list[asyncio.Task[Any]]:
    """Send until some wait for room."""
    tasks = []
    for work in more:
        tasks.append(asyncio.create_task(work))
        await asyncio.sleep(0)
        if packets._behind_count == WAITING:
            return tasks
    raise AssertionError("the socket was never full")


async def errors_of(tasks: list[asyncio.Task[Any]]) -> list[type[BaseException]]:
    """Of those that failed."""
    async with asyncio.timeout(60):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(end) for end in ends if isinstance(end, BaseException)]


@pytest.mark.parametrize("is_ours", [True, False])
async def test_who_waits_to_send_learns_that_the_socket_was_closed(*, is_ours: bool) -> None:
    ours, theirs = pair()
    closed = asyncio.Event()
    packets = PacketSocket(ours, lambda data, fds: None, closed.set)
    tasks = await fill(packets, (packets.send(bytes(1000)) for _ in range(10_000)))
    if is_ours:
        packets.close()
    else:
        theirs.close()
        await closed.wait()
    assert await errors_of(tasks) == [ConnectionError] * WAITING
    assert packets._behind_count == 0
    assert not packets._send_order.locked()
    theirs.close()


async def test_who_waits_to_start_a_command_learns_that_the_sandbox_is_lost() -> None:
    ours, theirs = pair()
    lost = asyncio.Event()
    guest = Guest(ours, lost.set, lambda number, master: None)
    command = Command(argv=("/bin/true",))
    starts = (guest.start(number, command, bytes(1000), []) for number in range(1, 10_000))
    tasks = await fill(guest._packets, starts)
    theirs.close()
    await lost.wait()
    assert await errors_of(tasks) == [SandboxLostError] * WAITING
    with pytest.raises(SandboxLostError):
        await guest.answer(1)


async def test_who_waits_to_ask_the_spawner_learns_that_it_died() -> None:
    ours, theirs = pair()
    spawner = Spawner(NativeProcess(os.getpid()), "spawner", [], ours)
    creates = (spawner.create(slot, SandboxSpec(), PLAN) for slot in range(10_000))
    tasks = await fill(spawner._packets, creates)
    tasks += [asyncio.create_task(spawner.destroy(0)), asyncio.create_task(spawner.mount(0, theirs.fileno()))]
    await asyncio.sleep(0)
    theirs.close()
    assert await errors_of(tasks) == [SpawnError] * len(tasks)
    await spawner.destroy(len(tasks))  # nothing is there, and nothing waits
    spawner.detach()
