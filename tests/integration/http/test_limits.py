"""How much a caller of the HTTP port can make the service hold, and for how long it can hold the service up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from rollout.dialects import chat, completions, vllm
from rollout.main import load_tokenizer
from rollout.testing import Reply, ScriptedEngine

TOKENIZER = load_tokenizer()


def model() -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER, lambda _session, _turn: Reply("Hello."), chunk_tokens_count=3)


@pytest.mark.parametrize(
    ("head", "answer"),
    [("Transfer-Encoding: chunked", b"HTTP/1.1 411 "), ("Content-Length: 1", b"HTTP/1.1 413 ")],
)
async def test_who_asks_for_health_without_a_token_can_send_no_body(serving: Any, head: str, answer: bytes) -> None:
    async with serving(model(), token="secret") as (client, _):
        assert (await client.get("/health")).status_code == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(f"POST /health HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        assert await reader.read(len(answer)) == answer
        writer.close()


@pytest.mark.parametrize(
    ("dialect", "path", "asked"),
    [
        (chat, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]}),
        (completions, "/v1/completions", {"prompt": ["Hi."]}),
        (vllm, "/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}),
    ],
)
async def test_megabytes_of_prompts_are_read_beside_the_event_loop(
    serving: Any, monkeypatch: pytest.MonkeyPatch, dialect: Any, path: str, asked: dict[str, Any]
) -> None:
    threads, read = [], dialect.ask_of

    def seen(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(dialect, "ask_of", seen)
    async with serving(model()) as (client, _):
        assert (await client.post(path, json=asked)).status_code == 200
    assert threading.main_thread() not in threads
    assert len(threads) == 1


async def test_a_body_that_is_no_json_is_told_what_to_be(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(model()) as (client, _):
        plain = await client.post("/v1/completions", content='{"prompt": "Hi."}')
        assert (plain.status_code, "content-type: application/json" in plain.text) == (400, True)
        broken = await client.post(
            "/v1/completions", content='{"prompt": ', headers={"content-type": "application/json"}
        )
        assert (broken.status_code, "body: no JSON at character 11: " in broken.text) == (400, True)
        for _ in range(3):  # no line of ours for each packet of somebody else's
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert await reader.read(12) == b"HTTP/1.1 400"
            writer.close()
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []
