"""A service with the scripted double behind its HTTP port, in this process."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dsec.testing import FakeSubstrate
from rollout.config import RolloutConfig
from rollout.dialects.http_server import listen, start_http_server
from rollout.engine import Engine
from rollout.events import Event
from rollout.main import load_tokenizer
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService

TOKENIZER = load_tokenizer()
Seen = defaultdict[type, asyncio.Event]
"""Set once an event of the type is durable."""
Serving = Callable[..., AbstractAsyncContextManager[tuple[httpx2.AsyncClient, RolloutService]]]
Events = Callable[..., Any]


@pytest.fixture
def seen() -> Seen:
    return Seen(asyncio.Event)


@pytest.fixture
def serving(tmp_path: Path, seen: Seen) -> Serving:
    """`async with serving(engine, token=token, **bounds) as (client, service)`; again: the same log."""

    @asynccontextmanager
    async def serve(
        engine: Engine, *, token: str = "", **bounds: int
    ) -> AsyncIterator[tuple[httpx2.AsyncClient, RolloutService]]:
        config = RolloutConfig(log_sync="os", **bounds)

        def observe(event: Event) -> None:
            seen[type(event)].set()

        directory = tmp_path / "served"
        async with RolloutService(directory, engine, FakeSubstrate(), TOKENIZER, config, observe=observe) as service:
            await service.start()

            async def find(_request_id: str, **_options: Any) -> RolloutService:
                return service

            server = start_http_server(find, listen(listen_at("127.0.0.1:0")), token)
            try:
                async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
                    yield client, service
            finally:
                await server.stop()

    return serve


@pytest.fixture
def events() -> Events:
    """`await events(client, path, body)`: what a stream says."""

    async def ask(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = await client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        *lines, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    return ask
