"""A server that answers for ever holds what is under way and what somebody may still ask for, and nothing else."""

from __future__ import annotations

import asyncio
import json
import types
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import wal
from dsec.testing import FakeSubstrate
from rollout import journal
from rollout.client import AsyncRolloutClient
from rollout.config import RolloutConfig, WorkerConfig
from rollout.dialects.http_server import listen, start_http_server
from rollout.events import JobSubmitted
from rollout.jobs import make_conversation
from rollout.ledger import Ledger
from rollout.main import load_tokenizer
from rollout.request import PolicyRule
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, handlers_of, start_server
from rollout.rpc.listening import listen_at
from rollout.testing import Reply, ScriptedEngine
from rollout.workers.forward import Router
from rollout.workers.index import Index, sqlite_url
from rollout.workers.partitions import Parts
from rollout.workers.worker import Worker

TOKENIZER = load_tokenizer()
MESSAGES = [{"role": "user", "content": "What is here?"}]
PATH = "/v1/chat/completions"
JOBS_MAX = 24
AT_ONCE = 8
BOUNDS = {"jobs_count_max": JOBS_MAX, "concurrency": 4, "log_sync": "os"}
SEGMENT_BYTES = 30_000
IN_THE_LOG_MAX = 80
"""Ids of jobs that the segments still there may speak of."""


class Server:
    """A worker of doubles in this process, with both of its ports."""

    def __init__(self, worker: Worker, http: httpx2.AsyncClient, grpc: AsyncRolloutClient, index: Index) -> None:
        self.worker, self.http, self.grpc, self.index = worker, http, grpc, index

    @property
    def service(self) -> Any:
        (owned,) = self.worker.owned.values()
        return owned.service

    async def generate(self, number: int) -> None:
        """One of the ways in which a generation comes to its end."""
        text = [{"role": "user", "content": f"What is {number}?"}]
        body: dict[str, Any] = {"messages": text, "n": 1 + number % 3, "max_tokens": 8}
        match number % 4:
            case 0 | 1:
                assert (await self.http.post(PATH, json=body)).status_code == 200
            case 2:
                assert "[DONE]" in (await self.http.post(PATH, json={**body, "stream": True})).text
            case _:
                async with self.http.stream("POST", PATH, json={**body, "stream": True, "max_tokens": 99}) as response:
                    await anext(response.aiter_lines())

    async def job(self, number: int) -> None:
        """A trainer's: taken whole, and acknowledged."""
        prompts = [make_conversation(f"p{number}", messages_json='[{"role": "user", "content": "Say hello."}]')]
        asked = self.grpc.rollouts(prompts, request_id=f"job-{number}", group_size=2, deadline_s=3600.0)
        ids = [member.rollout_id async for group in asked for member in group.trajectories]
        assert await self.grpc.ack(ids) == 2

    async def early(self, number: int) -> None:
        """A trainer's that waits for weights which never come."""
        request_id, prompts = f"early-{number}", [make_conversation("p", messages_json=json.dumps(MESSAGES))]
        asked = self.grpc.rollouts(prompts, request_id=request_id, group_size=2, policy=PolicyRule(min_version=1))
        asking = asyncio.ensure_future(anext(asked))
        await self.until(lambda: request_id in self.service.ledger.jobs)
        assert await self.grpc.cancel(request_id) == 2
        assert await self.grpc.ack([member.rollout_id for member in (await asking).trajectories]) == 2
        await asked.aclose()

    async def rounds(self, start: int, end: int) -> None:
        jobs = (self.job, self.early, None)
        for first in range(start, end, AT_ONCE):
            numbers = range(first, min(end, first + AT_ONCE))
            asked = [job(each) for each in numbers if (job := jobs[each % 3]) is not None]
            await asyncio.gather(*map(self.generate, numbers), *asked)

    async def rest(self) -> None:
        """Until all that comes behind the last answer is done too."""
        await self.until(lambda: not self.service.ledger.jobs)
        await self.until(lambda: not self.worker.news.rows_count)  # what the index was never told cannot be in it
        while await self.index.requests_of(".") or await self.index.rollouts():
            pass
        self.service.retention.look_after()
        await self.until(self.service.retention.is_idle)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Nothing tells a client when the log or the index let go."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    open_log = wal.Log.open
    monkeypatch.setattr(
        wal.Log, "open", lambda where, **given: open_log(where, **given, segment_bytes_max=SEGMENT_BYTES)
    )

    @asynccontextmanager
    async def serve() -> AsyncIterator[Server]:
        engine = ScriptedEngine(TOKENIZER, lambda _session, _turn: Reply(reasoning="thinking " * 12, content="Hello."))
        parts = Parts(engine, TOKENIZER, RolloutConfig(**BOUNDS), lambda _directory, _epoch: FakeSubstrate(), False)
        index = Index(sqlite_url(tmp_path / "run"))
        worker = Worker(tmp_path / "run", index, parts, WorkerConfig(lease_ttl_s=60), "a", is_alone=True)
        router = Router(handlers_of, REQUEST_BYTES_MAX)
        server = await start_server(None, listen_at("127.0.0.1:0"), [router])
        await worker.open(f"127.0.0.1:{server.port}")
        router.worker = worker
        http = start_http_server(worker.locate, listen(listen_at("127.0.0.1:0")))
        try:
            async with (
                httpx2.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=60) as client,
                AsyncRolloutClient(f"127.0.0.1:{server.port}") as grpc,
            ):
                yield Server(worker, client, grpc, index)
        finally:
            await http.stop()
            await server.stop()
            await worker.close()
            await router.close()

    return serve


async def test_what_was_answered_and_acknowledged_leaves_nothing_behind(serving: Any, tmp_path: Path) -> None:
    async with asyncio.timeout(240), serving() as server:
        await server.rounds(0, 60)
        await server.rest()
        before = entries(server.worker)
        await server.rounds(60, 300)
        await server.rest()
        after = entries(server.worker)
        grown = {
            name: (before.get(name, 0), count)
            for name, count in after.items()
            if count > before.get(name, 0) + IN_THE_LOG_MAX
        }
        assert grown == {}
        ledger: Ledger = server.service.ledger
        assert (ledger.jobs, ledger.rollouts, ledger.conversations, ledger.lsns) == ({}, {}, {}, {})
        assert len(list((tmp_path / "run/wal").glob("*.wal"))) <= 3
        assert server.service.journal.last_lsn > 3000


async def test_what_a_killed_server_left_of_generations_without_a_name_goes_with_the_next_start(
    serving: Any, tmp_path: Path
) -> None:
    async with asyncio.timeout(60):
        async with serving() as server:
            await server.service.engine.pause("keep")
            asking = asyncio.create_task(server.http.post(PATH, json={"messages": MESSAGES}))
            named = asyncio.create_task(server.http.post(PATH, json={"messages": MESSAGES, "request_id": "mine"}))
            await server.until(lambda: len(server.service.ledger.jobs) == 2)
            killed = list(journal.replay(tmp_path / "run/wal"))
            asking.cancel()
            named.cancel()
        assert {event.job.ends_with_caller for _, event in killed if isinstance(event, JobSubmitted)} == {True, False}
        again = tmp_path / "again/wal"
        with wal.Log.open(again) as log:  # as it stood when both were running
            for record, _ in killed:
                log.append(record.kind, record.payload)
        (tmp_path / "run/wal").rename(tmp_path / "old")
        again.rename(tmp_path / "run/wal")
        async with serving() as server:
            await server.until(lambda: server.service.ledger.jobs.keys() == {"mine"})
            said = await server.http.post(PATH, json={"messages": MESSAGES, "request_id": "mine"})
            assert said.status_code == 200
            while await server.index.requests_of(".") != {"mine"}:
                pass


def entries(root: object) -> dict[str, int]:
    """Where it is held -> how many things are, in all containers of our objects that can be reached."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    left: deque[tuple[str, object]] = deque([("", root)])
    while left:
        name, value = left.popleft()
        if id(value) in seen or isinstance(value, types.FunctionType | types.ModuleType | type | str | bytes):
            continue
        seen.add(id(value))
        inside: list[tuple[str, object]] = []
        if isinstance(value, dict):
            inside = [(f"{name}[]", each) for each in (*value.values(), *value.keys())]
        elif isinstance(value, set | frozenset | list | tuple | deque):
            inside = [(f"{name}[]", each) for each in value]
        elif isinstance(value, types.MethodType):
            left.append((name, value.__self__))
        elif type(value).__module__.partition(".")[0] in ("rollout", "wal", "dsec"):
            slots = [slot for base in type(value).__mro__ for slot in getattr(base, "__slots__", ())]
            held = {slot: getattr(value, slot) for slot in slots if slot[:2] != "__" and hasattr(value, slot)}
            held.update(getattr(value, "__dict__", {}))
            left.extend((f"{type(value).__name__}.{key}", each) for key, each in held.items())
        if inside:
            counts[name] = counts.get(name, 0) + len(inside)
            left.extend(inside)
    return counts
