"""What the client asks again: calls that were lost with their server, and nothing that a server answered."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dsec.errors import InvalidArgumentError, UnreachableError
from rollout.client import AsyncRolloutClient, connection
from rollout.errors import RolloutError
from rollout.pb.v1 import rollout_pb2 as pb
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceServicer, add_RolloutServiceServicer_to_server


class Going(RolloutServiceServicer):
    """Ends the first calls with statuses, then answers."""

    def __init__(self, *statuses: grpc.StatusCode) -> None:
        self.statuses = list(statuses)
        self.calls_count = 0

    async def _end(self, context: Any) -> None:
        self.calls_count += 1
        if self.statuses:
            await context.abort(self.statuses.pop(0), "as gRPC says it")

    async def Cancel(self, _request: Any, context: Any) -> Any:
        await self._end(context)
        return pb.CancelResponse(cancelled_count=3)

    async def ScoreTokens(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        self.calls_count += 1
        await asyncio.Event().wait()
        yield pb.ScoreTokensResponse()

    async def QuickInstruction(self, _request: Any, _context: Any) -> Any:
        self.calls_count += 1
        await asyncio.Event().wait()

    async def Attach(self, _request: Any, context: Any) -> AsyncIterator[Any]:
        await self._end(context)
        yield pb.Update(event=7, rollout_id="job/t.0", preempted=pb.Preempted(cause="lunch"), is_last=True)


async def asked(service: Going, patience_s: float = 60) -> tuple[int, list[int]]:
    """A call and a stream."""
    server = grpc.aio.server()
    add_RolloutServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncRolloutClient(f"127.0.0.1:{port}", patience_s=patience_s) as client:
            return await client.cancel("job"), [update.event async for update in client.attach("job")]
    finally:
        await server.stop(None)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"])
async def test_what_a_server_that_goes_cuts_short_is_asked_again(status: str) -> None:
    code = grpc.StatusCode[status]
    assert await asked(service := Going(code, code)) == (3, [7])
    assert service.calls_count == 4


async def test_a_call_that_is_always_cut_short_is_unreachable_in_the_end() -> None:
    with pytest.raises(UnreachableError, match="as gRPC says it"):
        await asked(Going(*[grpc.StatusCode.CANCELLED] * 2), patience_s=0)


async def test_what_a_paused_engine_never_answers_is_given_up_and_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "ALIVE_S", 0.2)
    server, service = grpc.aio.server(), Going()
    add_RolloutServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(60), AsyncRolloutClient(f"127.0.0.1:{port}", patience_s=0.1) as client:
        for name, call in (
            ("ScoreTokens", client.score_tokens([0, 5])),
            ("QuickInstruction", client.quick("job/t.0", ["title"])),
        ):
            with pytest.raises(UnreachableError, match=rf"^{name}: no answer for 0.2 s; a paused engine gives none"):
                await call
    assert service.calls_count == 2
    await server.stop(None)


async def test_a_server_that_is_away_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    unavailable = [grpc.StatusCode.UNAVAILABLE] * 3
    assert await asked(Going(*unavailable)) == (3, [7])
    assert [(record.levelname, record.args[-1]) for record in caplog.records if record.args] == [("WARNING", 60)]
    assert caplog.messages[0].endswith("as gRPC says it; it is asked again for 60 s")


@pytest.mark.parametrize("address", ["foo", "http://127.0.0.1:7710", "127.0.0.1", "tcp:127.0.0.1:99999"])
async def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is no address: give unix:PATH, HOST:PORT or tls:HOST:PORT"):
        AsyncRolloutClient(address)


async def test_who_speaks_no_grpc_is_not_asked_again() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with AsyncRolloutClient(f"127.0.0.1:{port}", patience_s=60) as client:
            with pytest.raises(InvalidArgumentError, match="does not speak gRPC: give the address of --listen"):
                await client.cancel("job")


async def test_a_host_that_nobody_has_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lookup(*_: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup, raising=False)
    async with AsyncRolloutClient("nosuch.invalid:7710", patience_s=60) as client:
        with pytest.raises(InvalidArgumentError, match=r"nosuch.invalid:7710: there is no host of that name"):
            await client.cancel("job")


async def test_what_a_server_answered_is_not_asked_again() -> None:
    service = Going(grpc.StatusCode.INTERNAL)
    with pytest.raises(RolloutError, match="as gRPC says it"):
        await asked(service)
    assert service.calls_count == 1
