"""How a container's guest is met, without a container."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from dsec.edge.substrates import docker_sandbox
from dsec.errors import SpawnError


@pytest.fixture
def listener(tmp_path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(tmp_path / "met"))
    listening.listen(1)
    listening.setblocking(False)
    return listening


async def test_a_guest_is_met_at_whatever_moment_it_comes(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the very moment in which its container is looked at."""
    monkeypatch.setattr(docker_sandbox, "STARTED_POLL_S", 0)
    looks = 0

    async def end() -> str:
        nonlocal looks
        looks += 1
        if looks == 3:
            guest.connect(listener.getsockname())
        return ""

    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
        async with asyncio.timeout(60):
            with await docker_sandbox.accepted(listener, end) as meeting:
                guest.send(b"hello")
                assert meeting.recv(5) == b"hello"


async def test_a_container_that_ends_before_its_guest_comes_is_told(listener: socket.socket) -> None:
    async def end() -> str:
        return "exit code 3"

    with listener, pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_sandbox, "STARTED_POLL_S", 0)
        with pytest.raises(SpawnError, match="before it connected: exit code 3"):
            await docker_sandbox.accepted(listener, end)
