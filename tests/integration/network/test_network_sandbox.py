"""Programs in real sandboxes and their way out: none, by environment, changed by phase, gone with the sandbox."""

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dsec.conformance.check import shell
from dsec.edge.substrates.container import ContainerSubstrate
from dsec.errors import InvalidArgumentError, SandboxLostError, StateError
from dsec.types import Command, NetworkPolicy, NetworkRule, SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")
LOOPBACK = NetworkPolicy(rules=(NetworkRule(cidr="127.0.0.1/32"), NetworkRule(host="localhost")))
FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read().decode(), end="")
"""
TAKE_THE_PORT = "import socket; s = socket.create_server(('127.0.0.1', 3128)); print(flush=True); s.accept()"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def substrate() -> AsyncIterator[ContainerSubstrate]:
    containers = ContainerSubstrate()
    await containers.open()
    yield containers
    await containers.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def url() -> AsyncIterator[str]:
    """Of a page on this host's loopback."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\npage")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://localhost:{server.sockets[0].getsockname()[1]}/"


def fetch(url: str) -> Command:
    return Command(argv=("/usr/bin/python3", "-c", FETCH, url))


async def test_a_program_reaches_what_its_policy_allows_and_nothing_else(
    substrate: ContainerSubstrate, url: str
) -> None:
    sandbox = await substrate.create(SandboxSpec(network=LOOPBACK))
    assert (await sandbox.exec(fetch(url))).stdout.data == b"page"
    refused = await sandbox.exec(fetch("http://example.com/"))
    assert refused.exit_code == 1
    assert b"403" in refused.stderr.data
    directly = await sandbox.exec(Command(argv=("/usr/bin/python3", "-c", FETCH, url), env={"http_proxy": ""}))
    assert directly.exit_code == 1
    await sandbox.destroy()


async def test_the_policy_changes_with_the_phase(substrate: ContainerSubstrate, url: str) -> None:
    sandbox = await substrate.create(SandboxSpec())
    assert (await sandbox.exec(fetch(url))).exit_code == 1
    for _ in range(2):
        await sandbox.update_network(LOOPBACK)
        assert (await sandbox.exec(fetch(url))).stdout.data == b"page"
        await sandbox.update_network(NetworkPolicy())
        assert b"proxy" not in (await shell(sandbox, "env")).stdout.data.lower()
        asked = f"from urllib.request import *; build_opener(ProxyHandler({{'http': '127.0.0.1:3128'}})).open('{url}')"
        refused = await sandbox.exec(Command(argv=("/usr/bin/python3", "-c", asked)))
        assert b"403" in refused.stderr.data
    await sandbox.destroy()


async def test_a_callers_own_environment_stays(substrate: ContainerSubstrate) -> None:
    sandbox = await substrate.create(SandboxSpec(network=LOOPBACK))
    result = await sandbox.exec(Command(argv=("/usr/bin/env",), env={"HTTP_PROXY": "mine"}))
    assert b"HTTP_PROXY=mine\n" in result.stdout.data
    assert b"https_proxy=http://127.0.0.1:3128\n" in result.stdout.data
    await sandbox.destroy()


async def test_a_process_that_waits_for_a_later_phase_on_the_proxys_port_is_found_out(
    substrate: ContainerSubstrate,
) -> None:
    sandbox = await substrate.create(SandboxSpec())
    taken = f'python3 -c "{TAKE_THE_PORT}" > /tmp/taken & until [ -s /tmp/taken ]; do :; done'
    assert (await shell(sandbox, taken)).exit_code == 0
    with pytest.raises(StateError):
        await sandbox.update_network(LOOPBACK)
    await sandbox.exec(Command(argv=("/bin/true",), kill_others=True))
    await sandbox.update_network(LOOPBACK)
    await sandbox.destroy()


async def test_a_sandbox_with_a_policy_that_says_nothing_clear_is_not_made(substrate: ContainerSubstrate) -> None:
    with pytest.raises(InvalidArgumentError):
        await substrate.create(SandboxSpec(network=NetworkPolicy(rules=(NetworkRule(cidr="1.2.3.4/8"),))))


async def test_nothing_of_the_network_stays_with_the_host(substrate: ContainerSubstrate, url: str) -> None:
    for _ in range(3):
        sandbox = await substrate.create(SandboxSpec(network=LOOPBACK))
        assert (await sandbox.exec(fetch(url))).stdout.data == b"page"
        await sandbox.destroy()
    plain = await substrate.create(SandboxSpec())
    connect = "import socket; socket.create_connection(('127.0.0.1', 3128))"
    result = await plain.exec(Command(argv=("/usr/bin/python3", "-c", connect)))
    assert b"ConnectionRefusedError" in result.stderr.data
    await plain.destroy()


async def test_no_process_is_entered_that_has_the_number_of_a_dead_guest(substrate: ContainerSubstrate) -> None:
    other, dead = [await substrate.create(SandboxSpec()) for _ in range(2)]
    guest = os.pidfd_open(dead.host_pid)
    os.kill(dead.host_pid, signal.SIGKILL)
    select.select([guest], [], [])  # and our loop has not heard of it
    os.close(guest)
    dead._host_pid = other.host_pid
    with pytest.raises(SandboxLostError), dead._disk():
        pass
    with pytest.raises(SandboxLostError):
        await dead.update_network(LOOPBACK)
    await other.update_network(LOOPBACK)  # nothing of ours listens there
    await other.destroy()


async def test_the_way_out_lives_on_with_its_sandbox(tmp_path: Path, url: str) -> None:
    first = ContainerSubstrate(state_dir=tmp_path)
    await first.open()
    made = [await first.create(SandboxSpec(network=policy)) for policy in (LOOPBACK, NetworkPolicy())]
    await made[1].update_network(LOOPBACK)
    dead = await first.create(SandboxSpec(network=LOOPBACK))
    await first.detach()
    end = os.pidfd_open(dead.host_pid)
    os.kill(dead.host_pid, signal.SIGKILL)
    select.select([end], [], [])
    os.close(end)
    second = ContainerSubstrate(state_dir=tmp_path)
    await second.open()
    try:
        assert second.adopted().keys() == {sandbox.id for sandbox in made}
        for sandbox in second.adopted().values():
            assert (await sandbox.exec(fetch(url))).stdout.data == b"page"
    finally:
        await second.close()
