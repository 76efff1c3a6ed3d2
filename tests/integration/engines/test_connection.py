"""HTTP to a server that breaks off: a call and a stream end with an EngineError, and nobody waits for ever."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from rollout.engines.vllm.connection import BODY_BYTES_MAX, Connection
from rollout.errors import EngineError

ANSWERS = {
    "nothing": b"",
    "half a header": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n",
    "half a body": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc",
    "half an error": b"HTTP/1.1 500 no\r\ncontent-length: 100\r\n\r\nabc",
}
ENDLESS = {
    "an answer": b"HTTP/1.1 200 OK\r\n\r\n" + bytes(BODY_BYTES_MAX + 1),
    "an error": b"HTTP/1.1 500 no\r\n\r\n" + bytes(BODY_BYTES_MAX + 1),
}


@pytest.fixture
def arrived() -> asyncio.Queue[str]:
    """The paths that the server was asked for."""
    return asyncio.Queue()


@pytest.fixture
async def connection(arrived: asyncio.Queue[str]) -> AsyncIterator[Connection]:
    """To a server that is asked for an answer by path, begins with it, and ends by itself if asked for /end/."""
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().replace("%20", " ")
        writer.write((ANSWERS | ENDLESS)[path.rsplit("/", 1)[1]])
        arrived.put_nowait(path)
        if path.startswith("/end/"):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
    await connection.open()
    yield connection
    await connection.close()
    server.close()
    for writer in writers:
        writer.close()


async def take(connection: Connection, path: str) -> None:
    async with connection.stream(path, {}, 100) as payloads:
        async for _ in payloads:
            pass


@pytest.mark.parametrize("answer", ANSWERS)
async def test_what_a_server_breaks_off_is_an_engine_error(connection: Connection, answer: str) -> None:
    for call in (take(connection, f"/end/{answer}"), connection.post(f"/end/{answer}")):
        with pytest.raises(EngineError):
            await call


@pytest.mark.parametrize("answer", ENDLESS)
async def test_an_answer_is_read_up_to_its_bound(connection: Connection, answer: str) -> None:
    with pytest.raises(EngineError, match=f"more than {4 << 20} bytes"):
        await connection.post(f"/{answer}")
    if answer == "an error":
        with pytest.raises(EngineError, match=f"more than {4 << 20} bytes"):
            await take(connection, f"/{answer}")


@pytest.mark.parametrize("answer", ANSWERS)
async def test_closing_ends_every_call_and_stream_that_waits(
    connection: Connection, arrived: asyncio.Queue[str], answer: str
) -> None:
    calls = [take(connection, f"/wait/{answer}"), connection.post(f"/wait/{answer}", call_s_max=None)]
    tasks = [asyncio.ensure_future(call) for call in calls]
    for _ in tasks:
        await arrived.get()
    await connection.close()
    for task in tasks:
        with pytest.raises(EngineError):
            await asyncio.wait_for(task, 60)


async def test_who_comes_back_to_a_stream_that_was_closed_is_told(connection: Connection) -> None:
    async with connection.stream("/wait/half a body", {}, 100) as payloads:
        await connection.close()
        with pytest.raises(EngineError):
            await anext(payloads)
