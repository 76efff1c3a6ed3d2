"""A rollout service of doubles on a real socket, and its clients; prompts are conversations: they need no sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from dsec.testing import FakeSubstrate
from rollout.client import AsyncRolloutClient, Group, Update
from rollout.config import RolloutConfig
from rollout.jobs import make_conversation
from rollout.main import load_tokenizer
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.request import Conversation
from rollout.rpc.grpc_server import start_server
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService
from rollout.testing import Reply, ScriptedEngine

TOKENIZER = load_tokenizer()
PATIENCE_S = 60
SAID = Reply(reasoning="Be kind.", content="Hello.")
VERDICT = Reply(reasoning="Fair.", calls=[("verdict", {"score": 0.75, "reason": "well said"})])
EVERYTHING: tuple[Any, ...] = ("live_tokens", "tokens", "logprobs", "text")
ROUNDS_MAX = 100_000


@dataclass
class Setting:
    service: RolloutService
    engine: ScriptedEngine
    address: str
    client: AsyncRolloutClient
    stub: Any

    @staticmethod
    def ask(name: str = "hello", text: str = "Say hello.") -> Conversation:
        return make_conversation(name, messages_json=json.dumps([{"role": "user", "content": text}]))

    async def job(self, request_id: str = "job", **asked: Any) -> list[Update]:
        """All updates of a job of two groups of three."""
        prompts = [self.ask("one", "1?"), self.ask("two", "2?")]
        asked = {"group_size": 3, "request_id": request_id, "fields": EVERYTHING, **asked}
        return [update async for update in self.client.submit(prompts, **asked)]

    async def groups(self, *names: str, **asked: Any) -> list[Group]:
        prompts = [self.ask(name) for name in names]
        return [group async for group in self.client.rollouts(prompts, **{"request_id": "job", **asked})]

    async def until(self, condition: Callable[[], bool]) -> None:
        """What is waited for is what a user would see, not an event."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def _serving(
    directory: Path, port: int = 0, reply: Reply = SAID, judge: Reply = VERDICT, engine: Any = None, **config: Any
) -> AsyncIterator[Setting]:
    engine = engine or ScriptedEngine(TOKENIZER, lambda session, _turn: judge if "/judge." in session else reply)
    settings = RolloutConfig(**{"concurrency": 4, "log_sync": "os", "checkpoints_root": directory.parent, **config})
    async with RolloutService(directory, engine, FakeSubstrate(), TOKENIZER, settings) as service:
        await service.start()
        server = await start_server(service, listen_at(f"127.0.0.1:{port}"))
        address = f"127.0.0.1:{server.port}"
        try:
            async with (
                AsyncRolloutClient(address, patience_s=PATIENCE_S) as client,
                grpc.aio.insecure_channel(address) as channel,
            ):
                stub = RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
                yield Setting(service, engine, address, client, stub)
        finally:
            await server.stop()


@pytest.fixture
def serving() -> Callable[..., contextlib.AbstractAsyncContextManager[Setting]]:
    """Serves a directory, at a port, with a model that says `reply`, and as a judge `judge`."""
    return _serving


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    async with asyncio.timeout(3 * PATIENCE_S), _serving(tmp_path / "run") as setting:
        yield setting
