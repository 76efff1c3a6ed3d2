"""Connections to a server that begins to answer and then says nothing."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from rollout.engines.vllm.connection import Connection
from rollout.errors import EngineError

BEGUN = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
PATIENCE_S = 20


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(BEGUN)
        await reader.read()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_who_waits_for_more_of_an_answer_is_told_when_the_connection_closes(silent: str) -> None:
    connection = Connection(silent, "")
    await connection.open()
    async with asyncio.timeout(PATIENCE_S), connection.stream("/", {}, 100) as payloads:
        assert await anext(payloads) == b"1"
        waiting = [asyncio.ensure_future(anext(payloads)), asyncio.create_task(connection.get("/"))]
        while len(connection._responses) < 2:  # noqa: ASYNC110 - both are being read then
            await asyncio.sleep(0)
        await connection.close()
        for each in waiting:
            with pytest.raises(EngineError):
                await each
