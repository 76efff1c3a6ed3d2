"""Servers that speak vLLM's wire, on ports of this host, and requests for them."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from rollout.engine import SampleRequest, Sampling
from rollout.engines import pool as pool_module
from rollout.engines.pool import EnginePool
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import VOCAB_COUNT, WireDouble, write_checkpoint


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[WireDouble]]]:
    """Servers with weights of a number, stopped at the end."""
    async with AsyncExitStack() as stack:

        async def make(number: int = 0, kind: type[WireDouble] = WireDouble, **options: Any) -> WireDouble:
            server = kind(write_checkpoint(tmp_path / f"weights-{number}", number), **options)
            await server.start()
            stack.push_async_callback(server.stop)
            return server

        yield make


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Awaitable[VllmEngine]]]:
    """Engines over servers, closed at the end."""
    async with AsyncExitStack() as stack:

        async def make(server: WireDouble, **options: Any) -> VllmEngine:
            engine = VllmEngine(server.url, **options)
            await engine.open()
            stack.push_async_callback(engine.close)
            return engine

        yield make


@pytest.fixture
async def make_pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Awaitable[EnginePool]]]:
    """Pools that ask again soon."""
    monkeypatch.setattr(pool_module, "AGAIN_S_MIN", 0.01)
    monkeypatch.setattr(pool_module, "AGAIN_S_MAX", 0.05)
    async with AsyncExitStack() as stack:

        async def make(
            *servers: WireDouble, silence_s_max: float = 30.0, kind: type[VllmEngine] = VllmEngine
        ) -> EnginePool:
            pool = EnginePool({server.url: kind(server.url) for server in servers}, silence_s_max)
            await pool.open()
            stack.push_async_callback(pool.close)
            return pool

        yield make


@pytest.fixture
def healthy() -> Callable[[EnginePool], Awaitable[None]]:
    """Waits until no engine is left out."""

    async def wait(pool: EnginePool) -> None:
        async with asyncio.timeout(20):
            while pool.faults:  # noqa: ASYNC110 - the pool mends by the clock
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def prompt() -> tuple[int, ...]:
    """A context of 91 tokens."""
    source = random.Random(11)
    return (0, *(source.randrange(2, VOCAB_COUNT) for _ in range(90)))


@pytest.fixture(scope="session")
def ask(prompt: tuple[int, ...]) -> Callable[..., SampleRequest]:
    """A request by chance, of so many tokens; `more` are fields of SampleRequest."""

    def make(count: int = 20, **more: Any) -> SampleRequest:
        fields: dict[str, Any] = {
            "session": "s",
            "token_ids": prompt,
            "sampling": Sampling(temperature=1.0, seed=3),
            "stream_key": 1,
            "stop_ids": frozenset(),
        }
        return SampleRequest(tokens_count_max=count, **fields | more)

    return make
