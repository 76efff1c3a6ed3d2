"""Edges on doubles: a host that outlives them, a clock that stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.edge.edge_config import EdgeConfig
from dsec.edge.service import Edge
from dsec.testing import FakeClock, FakeHost, FakeSandbox, FakeSubstrate, Script, succeed
from dsec.types import Command, ExecResult


class Hosts:
    """One directory, one host, one clock; `edge` opens an Edge over them, `kill` forgets it as a kill -9 would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = FakeHost()
        self.clock = FakeClock()
        self.script: Script = succeed
        self.edges: list[Edge] = []

    async def edge(self, substrate: FakeSubstrate | None = None, **config: Any) -> Edge:
        settings = EdgeConfig(**{"log_sync": "os", "log_reserve_bytes": 0, **config})
        substrate = substrate or FakeSubstrate(self.answer, self.host)
        edge = Edge(self.directory, substrate, settings, clock=self.clock)
        await edge.open()
        self.edges.append(edge)
        return edge

    def answer(self, sandbox: FakeSandbox, command: Command) -> ExecResult | Awaitable[ExecResult]:
        """By the script of the moment."""
        return self.script(sandbox, command)

    async def kill(self, edge: Edge) -> None:
        """Its tasks and its lock are gone; nothing was written or destroyed on the way."""
        self.edges.remove(edge)
        edge._creation._under_way.clear()
        await edge.detach()

    @staticmethod
    async def until(condition: Callable[[], object]) -> None:
        """Let everything else run until this holds."""
        for _ in range(1_000_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never became so")

    def sandbox(self, sandbox_id: str) -> FakeSandbox:
        return next(sandbox for sandbox in self.host.sandboxes.values() if sandbox.id == sandbox_id)

    async def gone(self, edge: Edge, sandbox_id: str) -> str:
        """Wait for the end of a sandbox; the reason."""
        await self.until(lambda: sandbox_id not in edge._registry.live)
        return edge.get(sandbox_id).reason


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    made = Hosts(tmp_path / "edge")
    yield made
    for edge in made.edges:
        await edge.close()
    assert made.host.sandboxes == {}
