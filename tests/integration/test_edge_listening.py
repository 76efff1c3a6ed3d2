"""Where an Edge listens: who may call, whose socket it is, TLS, and peers that send garbage or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dsec.client.connection import Patience, connect
from dsec.client.host import host_view
from dsec.client.substrate import RemoteProcess, RemoteSandbox
from dsec.edge.grpc_server import start_server
from dsec.errors import (
    InvalidArgumentError,
    UnreachableError,
)
from dsec.listen import Certificate, make_listen
from dsec.pb.v1 import edge_pb2 as pb
from dsec.types import Command
from dsec.views import CreateRequest

TOKEN = "0123456789abcdef"
NOW = Patience(connect_s=0.0, lost_s=0.0)


async def test_a_port_without_its_token_answers_nobody(world: Any) -> None:
    (server,) = await world.start("tcp:127.0.0.1:0", token=TOKEN)
    assert (await host_view(server.url, TOKEN)).sandboxes == {}
    for token in ("", TOKEN + "x", TOKEN[:-1]):
        with pytest.raises(InvalidArgumentError, match="refuses the token"):
            await host_view(server.url, token)
    async with grpc.aio.insecure_channel(server.url.removeprefix("tcp:")) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await health.Check(health_pb2.HealthCheckRequest())


@pytest.mark.parametrize("has_answered", [True, False])
async def test_a_token_that_is_refused_after_a_break_says_nothing_of_the_command(
    world: Any, has_answered: bool
) -> None:
    """By an Edge that came back with another one: what was sent before may have run, and its key is not free."""
    (server,) = await world.start("tcp:127.0.0.1:0", token=TOKEN)
    view = await world.edge.create(CreateRequest())
    connection, command = connect(server.url, TOKEN), Command(argv=("wait",))
    if has_answered:
        await host_view(server.url, TOKEN)
    running = asyncio.create_task(RemoteSandbox(connection, view.id, NOW).exec(command, "k"))
    await world.arrived.get()
    await world.stop()
    with pytest.raises(UnreachableError):
        await running
    await world.start(server.url, token=TOKEN[::-1])
    with pytest.raises(UnreachableError, match="it refuses the token now"):
        await RemoteProcess(connection, view.id, "k", 1, command).signal(15)  # asked once, as soon as there is a peer
    await connection.close()


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [
        ("tcp:127.0.0.1:0", "", "needs a token"),
        ("tcp:localhost:0", "short", "at least 16"),
        ("tcp:127.0.0.1:0", TOKEN + "\n\xe9", "not printable"),
        ("tls:127.0.0.1:0", TOKEN, "--tls-cert"),
        ("tcp:7700", TOKEN, "no address"),
        ("tcp:127.0.0.1:65536", TOKEN, "no address"),
        ("http://localhost", TOKEN, "no address"),
        ("unix:", "", "no socket path"),
        ("unix:/" + "x" * 107, "", "no socket path"),
    ],
)
def test_an_address_where_anybody_could_call_or_nobody_is_refused(url: str, token: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        make_listen(url, token, None)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """Of localhost, signed by itself; in edge.pem, too."""
    chain, key = tmp_path / "edge.pem", tmp_path / "edge.key"
    made = ("-out", chain, "-keyout", key, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    subprocess.run(["openssl", "req", "-x509", *curve, *map(str, made)], check=True, capture_output=True)
    return Certificate(chain.read_bytes(), key.read_bytes())


async def test_tls_hides_the_token(
    world: Any, certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server,) = await world.start("tls:localhost:0", token=TOKEN, certificate=certificate)
    monkeypatch.setenv("DSEC_API_CA", str(tmp_path / "edge.pem"))
    assert (await host_view(server.url, TOKEN)).sandboxes == {}
    connection = connect(server.url.replace("tls:", "tcp:"), TOKEN)
    with pytest.raises(UnreachableError):
        await connection.call("GetHost", pb.GetHostRequest(), patience=NOW)
    await connection.close()


async def test_a_socket_is_its_users_alone_and_nobody_elses_is_taken(world: Any, tmp_path: Path) -> None:
    await world.start()
    path = Path(world.url.removeprefix("unix:"))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    with pytest.raises(InvalidArgumentError, match="another process does"):
        await start_server(world.edge, make_listen(world.url, "", None))
    assert (await host_view(world.url)).sandboxes == {}
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    world.servers.append(await start_server(world.edge, make_listen(f"unix:{stale}", "", None)))
    assert (await host_view(f"unix:{stale}")).sandboxes == {}
    (tmp_path / "file").write_text("mine")
    for url in (f"unix:{tmp_path}/file", f"unix:{tmp_path}/file/sock"):
        with pytest.raises(InvalidArgumentError, match="cannot listen"):
            await start_server(world.edge, make_listen(url, "", None))
    assert (tmp_path / "file").read_text() == "mine"
    taken = world.servers[0].url
    assert taken == world.url


async def test_a_port_in_use_is_refused(world: Any) -> None:
    (server,) = await world.start("tcp:127.0.0.1:0", token=TOKEN)
    with pytest.raises(InvalidArgumentError, match="in use or not ours"):
        await start_server(world.edge, make_listen(server.url, TOKEN, None))


async def test_garbage_and_silence_on_the_port_do_not_keep_it_from_answering(world: Any) -> None:
    (server,) = await world.start("tcp:127.0.0.1:0", token=TOKEN)
    host, port = server.url.removeprefix("tcp:").split(":")
    with contextlib.ExitStack() as stack:
        for number in range(200):
            peer = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 2:
                peer.sendall(os.urandom(4096))
        assert (await host_view(server.url, TOKEN)).sandboxes == {}


async def test_health_and_reflection_answer(world: Any) -> None:
    await world.start()
    async with grpc.aio.insecure_channel(world.url) as channel:
        checks = health_pb2_grpc.HealthStub(channel)
        for name in ("", "dsec.pb.v1.Edge"):
            reply = await checks.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for reply in stub.ServerReflectionInfo(iter([request])):
            assert "dsec.pb.v1.Edge" in {service.name for service in reply.list_services_response.service}
