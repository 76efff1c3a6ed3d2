"""Who may call a rollout service: tokens, certificates and sockets, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dsec.errors import InvalidArgumentError, ResourceExhaustedError
from dsec.listen import read_certificate, read_token
from rollout.client import AsyncRolloutClient
from rollout.dialects.http_server import listen, start_http_server
from rollout.rpc.grpc_server import start_server
from rollout.rpc.listening import listen_at
from rollout.service import RolloutService

TOKEN = "correct-horse-battery"
Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve(setting: Any) -> AsyncIterator[Serve]:
    """`await serve(where, token)`: the address of one more server of the service."""
    async with AsyncExitStack() as stack:

        async def start(*given: Any) -> str:
            server = await start_server(setting.service, listen_at(*given))
            stack.push_async_callback(server.stop)
            return server.address

        yield start


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of localhost, signed by itself."""
    chain, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ("-out", chain, "-keyout", key, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    subprocess.run(["openssl", "req", "-x509", *curve, *map(str, made)], check=True, capture_output=True)
    return chain, key


async def names(client: AsyncRolloutClient) -> list[str]:
    async with client:
        return [each.rollout_id async for each in client.list()]


async def test_who_has_no_token_gets_nothing_but_health(
    setting: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    await setting.job()
    address = await serve("127.0.0.1:0", TOKEN)
    for token in ("", "wrong", "Correct-horse-battery"):
        with pytest.raises(InvalidArgumentError, match=r"the token is missing or wrong: set DSEC_ROLLOUT_KEY"):
            await names(AsyncRolloutClient(address, token=token))
        async with AsyncRolloutClient(address, token=token) as client:
            with pytest.raises(InvalidArgumentError, match="DSEC_ROLLOUT_KEY"):
                await anext(client.attach("job"))
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[no-untyped-call]
        assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    assert len(await names(AsyncRolloutClient(address, token=TOKEN))) == 6
    monkeypatch.setenv("DSEC_ROLLOUT_URL", f"tcp:{address}")
    monkeypatch.setenv("DSEC_ROLLOUT_KEY", TOKEN)
    assert len(await names(AsyncRolloutClient())) == 6


async def test_a_certificate_hides_what_passes(
    setting: Any, serve: Serve, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = await serve("tls:localhost:0", TOKEN, read_certificate(*certificate))
    assert address.startswith("tls:localhost:")
    monkeypatch.setenv("DSEC_ROLLOUT_CA", str(certificate[0]))
    assert await names(AsyncRolloutClient(address, token=TOKEN)) == []
    monkeypatch.setenv("DSEC_ROLLOUT_CA", "/no/such")
    with pytest.raises(InvalidArgumentError, match="DSEC_ROLLOUT_CA"):
        AsyncRolloutClient(address)

    async def find(_request_id: str, **_options: Any) -> RolloutService:
        service: RolloutService = setting.service
        return service

    where = listen_at("tls:localhost:0", TOKEN, read_certificate(*certificate))
    http = start_http_server(find, listen(where), TOKEN, certificate)
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx2.AsyncClient(base_url=f"https://localhost:{http.port}", verify=trusted) as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
    await http.stop()


async def test_a_socket_is_its_users_alone_and_needs_no_token(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "below/rollouts.sock"
    address = await serve(f"unix:{path}", TOKEN)
    assert await names(AsyncRolloutClient(address)) == []
    assert os.stat(path).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("where", "token", "said"),
    [
        ("0.0.0.0:7710", "", "a token of at least 16 bytes: give --token-file, or set DSEC_ROLLOUT_KEY"),
        ("[::]:7710", "", "a token"),
        ("worker.example:7710", "", "a token"),
        ("127.0.0.1.example.org:7710", "", "a token"),
        ("127.0.0.1:7710", "short", "at least 16 bytes"),
        ("tls:127.0.0.1:7710", TOKEN, "--tls-cert and --tls-key"),
        ("7710", TOKEN, "no address"),
    ],
)
def test_an_address_that_others_reach_has_a_token(where: str, token: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        listen_at(where, token)


@pytest.mark.parametrize("where", ["127.0.0.1:7710", "127.5.0.1:0", "[::1]:7710", "localhost:7710"])
def test_a_loopback_address_may_do_without(where: str) -> None:
    assert listen_at(where).address.url == f"tcp:{where}"


async def test_calls_beyond_the_bound_are_refused_and_not_before_or_after(setting: Any) -> None:
    await setting.service.engine.pause("keep")
    server = await start_server(setting.service, listen_at("127.0.0.1:0"), calls_count_max=1)
    async with AsyncRolloutClient(server.address) as follower, AsyncRolloutClient(server.address) as other:
        updates = follower.submit([setting.ask()], request_id="job", fields=("live_tokens",))
        assert (await anext(updates)).what == "opened"
        with pytest.raises(ResourceExhaustedError, match="Concurrent RPC limit exceeded"):
            await names(other)
        await setting.service.engine.resume()
        assert [update.what async for update in updates][-1] == "finished"
    assert len(await names(AsyncRolloutClient(server.address))) == 1
    await server.stop()


def test_files_that_hold_no_certificate_and_its_key_are_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    chain, key = certificate
    (other := tmp_path / "other.pem").write_text("no PEM")
    for pair in ((chain, other), (other, key), (key, chain)):
        with pytest.raises(InvalidArgumentError, match=f"{pair[0]} and {pair[1]} are no chain"):
            read_certificate(*pair)
    with pytest.raises(InvalidArgumentError, match="No such file"):
        read_certificate(chain, tmp_path / "none.pem")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("\n", "token is empty"),
        ("short\n", "token holds 5 bytes, at least 16"),
        ("sixteen\nbytes\nand\nlines", "printable ASCII without spaces at its ends"),
    ],
)
def test_a_token_file_that_holds_no_token_opens_no_port(tmp_path: Path, held: str, said: str) -> None:
    (tmp_path / "token").write_text(held)
    with pytest.raises(InvalidArgumentError, match=said):
        read_token(tmp_path / "token")


async def test_clients_of_a_quiet_service_may_ask_as_often_as_they_like_whether_it_lives(serve: Serve) -> None:
    """HTTP/2 (RFC 9113): PING is frame type 6, flag 1 an acknowledgement; type 7, GOAWAY, would throw us out."""
    host, _, port = (await serve("127.0.0.1:0", TOKEN)).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    settings, ping = bytes(3) + b"\x04" + bytes(5), b"\x00\x00\x08\x06" + bytes(5) + b"anybody?"
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    async with asyncio.timeout(60):
        for _ in range(10):
            writer.write(ping)
            kind, flags = 0, 0
            while (kind, flags) != (6, 1):
                header = await reader.readexactly(9)
                kind, flags = header[3], header[4]
                await reader.readexactly(int.from_bytes(header[:3]))
                assert kind != 7
    writer.close()
    await writer.wait_closed()
