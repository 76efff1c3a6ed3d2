"""What the tests of the network share: a box in a network namespace, and a gateway that serves it."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsec.edge.network.config import NetworkConfig
from dsec.edge.network.decisions import Decision
from dsec.edge.network.gateway import Gateway
from dsec.edge.network.listener import PROXY_ADDRESS, PROXY_PORT, enter_network
from dsec.types import NetworkPolicy, NetworkRule, SandboxId

BOX = SandboxId("box")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Box:
    """A process in a network namespace of its own, which has nothing but a loopback."""

    def __init__(self) -> None:
        script = "ip link set lo up && echo ready && exec cat"
        self._process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = os.pidfd_open(self._process.pid)

    def close(self) -> None:
        self._process.communicate()
        os.close(self.pid)

    def open(self) -> int:
        return os.dup(self.pid)

    def _run(self, work: Callable[[], socket.socket]) -> socket.socket:
        def inside() -> socket.socket:
            enter_network(self.pid)
            return work()

        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(inside).result()

    async def connect(self) -> Streams:
        made = self._run(lambda: socket.create_connection((PROXY_ADDRESS, PROXY_PORT)))
        return await asyncio.open_connection(sock=made)

    def listen(self) -> socket.socket:
        return self._run(lambda: socket.create_server((PROXY_ADDRESS, PROXY_PORT)))


class World:
    """A gateway with one box; names end in 127.0.0.1, but for `inwards.example`."""

    def __init__(self, config: NetworkConfig) -> None:
        self.box = Box()
        self.decisions: list[Decision] = []
        self.looked_up: list[str] = []
        self.ended: asyncio.Queue[Decision] = asyncio.Queue()
        self.gateway = Gateway(config, self._on_decision, self._resolve)

    def _on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)
        if decision.is_end:
            self.ended.put_nowait(decision)

    async def _resolve(self, name: str) -> list[str]:
        self.looked_up.append(name)
        if name == "nowhere.example":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return ["169.254.169.254", "127.0.0.2"] if name == "inwards.example" else ["127.0.0.1"]

    async def allow(self, *rules: NetworkRule) -> None:
        await self.gateway.apply(BOX, self.box.open, NetworkPolicy(rules=rules))

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back to `data`, until the other side ends."""
        reader, writer = await self.box.connect()
        writer.write(data)
        try:
            return await reader.read()
        finally:
            writer.close()

    async def tunnel(self, target: str) -> Streams:
        reader, writer = await self.box.connect()
        writer.write(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
        return reader, writer


@contextlib.asynccontextmanager
async def make_world(**bounds: float) -> AsyncIterator[World]:
    world = World(NetworkConfig(**bounds))
    try:
        yield world
    finally:
        await world.gateway.close()
        world.box.close()


@pytest.fixture
def a_world() -> Callable[..., contextlib.AbstractAsyncContextManager[World]]:
    """Make a world with bounds of its own."""
    return make_world


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with make_world() as made:
        yield made
