"""What goes wrong around the HTTP port: clients that go, stall, repeat or overfill, engines that fail in mid-stream."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rollout import journal
from rollout.dialects import http_guard, http_server
from rollout.engines.testing import MisbehavingEngine
from rollout.events import RolloutFinished, RolloutOpened
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine, reply_ids
from wal.tokens import TokensAppended

TOKENIZER = load_tokenizer()
SAID = Reply(reasoning="Look around.", content="All is well, é.")
IDS = list(reply_ids(SAID, TOKENIZER))
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What is here?"}], "return_token_ids": True}
NAMED = {**CHAT, "request_id": "mine"}
PATH = "/v1/chat/completions"


def model(reply: Reply = SAID, chunk_tokens_count: int = 3) -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER, lambda _session, _turn: reply, chunk_tokens_count=chunk_tokens_count)


def tokens_of(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for choice in chunk.get("choices", ()) for token in choice["token_ids"]]


async def test_one_id_asked_by_many_at_once_is_sampled_once(serving: Any, events: Any, seen: Any) -> None:
    async with serving(model()) as (client, service):
        await service.engine.pause("keep")
        asking = [asyncio.create_task(client.post(PATH, json=NAMED)) for _ in range(4)]
        streams = [asyncio.create_task(events(client, PATH, NAMED)) for _ in range(4)]
        await seen[RolloutOpened].wait()
        assert (await client.post(PATH, json={**NAMED, "temperature": 0.5})).status_code == 409
        await service.engine.resume()
        for each in asking:
            (choice,) = (await each).json()["choices"]
            assert choice["token_ids"] == IDS
        for stream in streams:
            assert tokens_of(await stream) == IDS
        assert service.engine.drawn_count == len(IDS)


@pytest.mark.parametrize("kind", ["nan", "early end"])
async def test_an_engine_that_fails_in_mid_stream_is_said_so_and_the_same_id_goes_on(
    serving: Any, events: Any, kind: Any
) -> None:
    engine = MisbehavingEngine(TOKENIZER, lambda _session, _turn: SAID, kind, chunks_count=4)
    async with serving(engine) as (client, service):
        *told, last = await events(client, PATH, NAMED)
        assert tokens_of(told) == IDS[:4]
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "ENGINE_ERROR")
        engine.fault = None
        assert tokens_of(await events(client, PATH, NAMED)) == IDS
        assert sum(service.ledger.tokens_regenerated.values()) == 0
        (choice,) = (await client.post(PATH, json=NAMED)).json()["choices"]
        assert (choice["token_ids"], choice["message"]["content"]) == (IDS, SAID.content)


async def test_members_of_a_stream_come_mixed_and_whole(serving: Any, events: Any) -> None:
    async with serving(model(chunk_tokens_count=1)) as (client, _):
        chunks = await events(client, PATH, {**CHAT, "n": 3})
    told = [chunk["choices"][0] for chunk in chunks]
    assert sorted({choice["index"] for choice in told}) == [0, 1, 2]
    for index in range(3):
        mine = [choice for choice in told if choice["index"] == index]
        assert [token for choice in mine for token in choice["token_ids"]] == IDS
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


async def test_a_client_that_leaves_a_silent_stream_ends_what_it_did_not_name(
    serving: Any, seen: Any, pausing: Any, tmp_path: Path
) -> None:
    async with serving(pausing(model(Reply(reasoning="thinking " * 400)), 10)) as (client, service):
        async with client.stream("POST", PATH, json={**CHAT, "stream": True}) as response:
            await anext(response.aiter_lines())
        await seen[RolloutFinished].wait()
        await service.engine.resume()
    values = [value for _, value in journal.replay(tmp_path / "served/wal")]
    assert [value.reason for value in values if isinstance(value, RolloutFinished)] == ["CANCELLED"]


async def test_a_client_that_stops_reading_costs_a_bounded_queue_and_nobody_else(serving: Any) -> None:
    long = Reply(reasoning="thinking " * 3000)
    bounds = {"watch_events_count_max": 64, "context_tokens_count_max": 1 << 14}
    async with serving(model(long, chunk_tokens_count=100), **bounds) as (client, service):
        body = {**NAMED, "n": 16, "logprobs": True, "stream": True}
        reader, writer = await connect(client, limit=1 << 10)
        writer.write(request(PATH, body, "Connection: close\r\n"))
        while "mine" not in service.ledger.jobs:
            (await client.get("/health")).raise_for_status()
        await service.wait("mine")
        assert service.watchers.count == 0
        assert (await client.get("/v1/models")).status_code == 200
        last = (await reader.read()).decode().split("data: ")[-2]
        assert "fell more than 64 events behind" in last
        writer.close()
        whole = (await client.post(PATH, json={**body, "stream": False})).json()
        assert {len(choice["token_ids"]) for choice in whole["choices"]} == {len(reply_ids(long, TOKENIZER))}


async def connect(client: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", client.base_url.port))
    return await asyncio.open_connection(sock=sock, **options)


def request(path: str, body: dict[str, Any], more: str = "") -> bytes:
    content = json.dumps(body).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n{more}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode() + content


async def test_prompts_that_are_far_too_long_are_refused_before_they_cost_anything(serving: Any) -> None:
    async with serving(model()) as (client, service):
        for size, status in ((64 << 20, 413), (31 << 20, 400)):
            response = await client.post("/v1/completions", json={"prompt": "x" * size})
            assert response.status_code == status, response.text[:200]
        response = await client.post("/v1/completions", json={"prompt": [1] * (8 << 20)})
        assert (response.status_code, "leave no room" in response.text) == (400, True), response.text[:200]
        assert service.ledger.jobs == {}


async def test_fields_that_nobody_knows_change_nothing(serving: Any) -> None:
    async with serving(model()) as (client, _):
        said = (await client.post(PATH, json={**CHAT, "user": "me", "metadata": {"a": "b"}, "store": False})).json()
        assert said["choices"][0]["token_ids"] == IDS


async def test_pipelined_requests_are_answered_in_their_order(serving: Any) -> None:
    async with serving(model()) as (client, _):
        reader, writer = await connect(client)
        writer.write(request(PATH, NAMED) + b"GET /is_paused HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = (await reader.read()).decode()
        writer.close()
        assert said.count("HTTP/1.1 200 OK") == 2
        assert said.index("chat.completion") < said.index("is_paused")


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(b"", b""), (b"POST /v1/chat/completions HTTP/1.1\r\nHos", b""), (request(PATH, CHAT)[:-1], b"HTTP/1.1 408 ")],
)
async def test_a_request_that_never_becomes_whole_is_given_up(
    serving: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes, answer: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.1)
    monkeypatch.setattr(http_guard, "BODY_S", 0.1)
    async with serving(model()) as (client, service):
        reader, writer = await connect(client)
        writer.write(sent)
        assert await reader.read(len(b"HTTP/1.1 408 ")) == answer
        writer.close()
        assert service.ledger.jobs == {}


async def test_there_is_room_for_so_many_bytes_and_connections(
    serving: Any, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_guard, "BODIES_BYTES_MAX", len(json.dumps(NAMED)) + 1)
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 4)
    async with serving(model()) as (client, service):
        await service.engine.pause("keep")
        first = asyncio.create_task(client.post(PATH, json=NAMED))
        await seen[RolloutOpened].wait()
        second = await client.post(PATH, json=NAMED)
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        writers = [(await connect(client))[1] for _ in range(3)]
        assert (await client.get("/v1/models")).status_code == 503
        for writer in writers:
            writer.close()
        await service.engine.resume()
        assert (await first).json()["choices"][0]["token_ids"] == IDS
        assert seen[TokensAppended].is_set()


@pytest.mark.parametrize("mode", ["keep", "abort"])
async def test_a_stream_that_a_pause_stops_goes_on_after_it(serving: Any, mode: str) -> None:
    engine = model(long := Reply(reasoning="thinking " * 2000), chunk_tokens_count=1)
    asked = {**CHAT, "stream": True}
    async with serving(engine) as (client, _), client.stream("POST", PATH, json=asked) as response:
        lines = response.aiter_lines()
        told = [await anext(lines)]
        assert (await client.post(f"/pause?mode={mode}")).status_code == 200
        assert engine.drawn_count < len(reply_ids(long, TOKENIZER))
        assert (await client.post("/resume")).status_code == 200
        told += [line async for line in lines]
    chunks = [json.loads(line.removeprefix("data: ")) for line in told if line.startswith("data: {")]
    assert tokens_of(chunks) == list(reply_ids(long, TOKENIZER))
