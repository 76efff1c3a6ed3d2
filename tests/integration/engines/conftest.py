"""Servers that speak vLLM's wire, on ports of this host, and requests for them."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from rollout.engine import SampleRequest, Sampling
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.testing import VOCAB_COUNT, WireDouble, write_checkpoint


@pytest.fixture
async def make_server(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[WireDouble]]]:
    """Servers with weights of a number, stopped at the end."""
    async with AsyncExitStack() as stack:

        async def make(number: int = 0, **options: Any) -> WireDouble:
            server = WireDouble(write_checkpoint(tmp_path / f"weights-{number}", number), **options)
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
