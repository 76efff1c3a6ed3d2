"""The proxy in a network namespace, with friendly and hostile clients, and servers on this host's loopback."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from dsec.edge.network.config import NetworkConfig
from dsec.edge.network.gateway import Gateway
from dsec.errors import InvalidArgumentError, SandboxLostError, StateError
from dsec.types import NetworkPolicy, NetworkRule, SandboxId

BOX = SandboxId("box")
LOOPBACK = NetworkRule(cidr="127.0.0.1/32")
NAMED = NetworkRule(host="*.example")
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


World = Any  # of conftest.py
Worlds = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server on this host's loopback; its port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send all back once the client has ended its side."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write(b"<end>")
        writer.close()


def web(seen: list[bytes]) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    return handle


async def test_a_tunnel_carries_bytes_both_ways_and_each_end_by_itself(world: World) -> None:
    await world.allow(LOOPBACK, NAMED)
    async with serving(echo) as port:
        for target in (f"127.0.0.1:{port}", f"a.example:{port}"):
            reader, writer = await world.tunnel(target)
            writer.write(b"x" * 1_000_000)
            writer.write_eof()
            assert await reader.read() == b"x" * 1_000_000 + b"<end>"
            writer.close()
    await world.gateway.detach(BOX)
    told = world.decisions
    assert [(d.host, d.address, d.port, d.allowed, d.is_end, d.sent_bytes, d.received_bytes) for d in told] == [
        ("127.0.0.1", "127.0.0.1", port, True, False, 0, 0),
        ("127.0.0.1", "127.0.0.1", port, True, True, 1_000_000, 1_000_005),
        ("a.example", "127.0.0.1", port, True, False, 0, 0),
        ("a.example", "127.0.0.1", port, True, True, 1_000_000, 1_000_005),
    ]  # fmt: skip


async def test_a_plain_request_reaches_its_host_once_in_origin_form(world: World) -> None:
    await world.allow(LOOPBACK, NAMED)
    seen: list[bytes] = []
    async with serving(web(seen)) as port:
        host = f"a.example:{port}"
        one = f"GET http://{host}/p HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        answer = await world.ask(one + f"GET http://b.example:{port}/ HTTP/1.1\r\nHost: evil\r\n\r\n".encode())
    assert answer.endswith(b"\r\n\r\nhi")
    assert seen == [f"GET /p HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()]


def socks_greeting() -> bytes:
    return b"\x05\x01\x00"


def socks_connect(kind: bytes, port: int) -> bytes:
    return b"\x05\x01\x00" + kind + port.to_bytes(2, "big")


async def test_socks_reaches_names_and_addresses(world: World) -> None:
    await world.allow(LOOPBACK, NAMED)
    async with serving(echo) as port:
        for kind in (b"\x03\x09a.example", b"\x03\x09127.0.0.1", b"\x01\x7f\x00\x00\x01"):
            reader, writer = await world.box.connect()
            writer.write(socks_greeting() + socks_connect(kind, port) + b"early")
            assert await reader.readexactly(12) == b"\x05\x00\x05\x00\x00\x01" + bytes(6)
            writer.write_eof()
            assert await reader.read() == b"early<end>"
            writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x05\x01\x02", socks_greeting() + b"\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50",
     socks_greeting() + b"\x05\x01\x00\x09",
     socks_greeting() + socks_connect(b"\x03\x05127.1", 80), socks_greeting() + socks_connect(b"\x03\x00", 80)],
)  # fmt: skip
async def test_a_socks_request_that_is_not_served_is_refused(world: World, request_bytes: bytes) -> None:
    await world.allow(LOOPBACK, NAMED)
    answer = await world.ask(request_bytes)
    assert answer.startswith((b"\x05\xff", b"\x05\x00\x05\x01"))
    assert [decision.allowed for decision in world.decisions] == [False]


async def test_a_guarded_address_that_a_name_does_not_open_is_said_to_be_one(world: World) -> None:
    await world.allow(NAMED)
    for target, is_guarded in (("a.example:80", True), ("127.0.0.1:80", True), ("1.1.1.1:80", False)):
        answer = await world.ask(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        assert (b"need a CIDR" in answer) is is_guarded, answer


async def test_what_no_rule_allows_is_refused_and_never_looked_up(world: World) -> None:
    async with serving(echo) as port:
        await world.allow(NAMED)
        for target in (f"127.0.0.1:{port}", f"other.net:{port}", f"localhost:{port}", f"[::1]:{port}"):
            answer = await world.ask(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 ")
        assert world.looked_up == []
        assert (await world.ask(socks_greeting() + socks_connect(b"\x01\x7f\x00\x00\x01", port)))[
            :4
        ] == b"\x05\x00\x05\x02"
    assert [decision.allowed for decision in world.decisions] == [False] * 5


async def test_an_allowed_name_that_resolves_inwards_is_refused(world: World) -> None:
    await world.allow(NAMED, NetworkRule(cidr="0.0.0.0/0"))
    async with serving(echo) as port:
        for name in ("inwards.example", "a.example"):
            assert b" 403 " in await world.ask(f"CONNECT {name}:{port} HTTP/1.1\r\n\r\n".encode())
    assert world.looked_up == ["inwards.example", "a.example"]


async def test_what_cannot_be_reached_is_said_so(world: World) -> None:
    await world.allow(LOOPBACK, NAMED)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert b" 502 " in await world.ask(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
    assert b" 502 " in await world.ask(f"CONNECT nowhere.example:{port} HTTP/1.1\r\n\r\n".encode())


async def test_without_rules_nothing_listens(world: World) -> None:
    await world.allow()
    with pytest.raises(ConnectionRefusedError):
        await world.box.connect()


async def test_a_tighter_policy_ends_what_it_no_longer_allows_and_nothing_else(world: World) -> None:
    await world.allow(LOOPBACK, NAMED)
    async with serving(echo) as port:
        by_address, by_name = await world.tunnel(f"127.0.0.1:{port}"), await world.tunnel(f"a.example:{port}")
        await world.allow(LOOPBACK)
        with contextlib.suppress(ConnectionError):
            assert await by_name[0].read() == b""
        by_address[1].write(b"on")
        by_address[1].write_eof()
        assert await by_address[0].read() == b"on<end>"
        assert b" 403 " in await world.ask(f"CONNECT a.example:{port} HTTP/1.1\r\n\r\n".encode())
        await world.allow()
        assert b" 403 " in await world.ask(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
        for _, writer in (by_name, by_address):
            writer.close()


async def test_a_policy_that_changes_while_a_name_is_looked_up_holds(a_world: Worlds) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def resolve(_name: str) -> list[str]:
        started.set()
        await go_on.wait()
        return ["127.0.0.1"]

    async with a_world() as world, serving(echo) as port:
        world.gateway = Gateway(on_decision=world.decisions.append, resolve=resolve)
        await world.allow(LOOPBACK, NAMED)
        asking = asyncio.create_task(world.ask(f"CONNECT a.example:{port} HTTP/1.1\r\n\r\n".encode()))
        await started.wait()
        await world.allow(LOOPBACK)
        go_on.set()
        assert b" 403 " in await asking


async def test_a_refused_policy_leaves_the_old_one(world: World) -> None:
    await world.allow(LOOPBACK)
    with pytest.raises(InvalidArgumentError):
        await world.allow(NetworkRule(cidr="everything"))
    async with serving(echo) as port:
        _, writer = await world.tunnel(f"127.0.0.1:{port}")
        writer.close()


async def test_a_detached_sandbox_reaches_nothing_and_may_be_attached_again(world: World) -> None:
    await world.allow(LOOPBACK)
    async with serving(echo) as port:
        reader, writer = await world.tunnel(f"127.0.0.1:{port}")
        await world.gateway.detach(BOX)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await world.box.connect()
        await world.allow(LOOPBACK)
        (await world.tunnel(f"127.0.0.1:{port}"))[1].close()


class Shelf:
    """A keeper in this process."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    async def put(self, key: str, fd: int) -> None:
        self.kept[key] = os.dup(fd)

    async def drop(self, key: str) -> None:
        os.close(self.kept.pop(key))

    def copies(self) -> dict[str, int]:
        return {key: os.dup(fd) for key, fd in self.kept.items()}


async def test_a_listener_outlives_its_gateway_and_serves_who_waited(world: World) -> None:
    shelf = Shelf()
    await world.gateway.adopt(shelf, {}, ())
    await world.allow(LOOPBACK)
    await world.gateway.close()
    with pytest.raises(OSError, match="in use"):
        world.box.listen()
    async with serving(echo) as port:
        waiting = asyncio.create_task(world.ask(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode()))
        world.gateway = Gateway(on_decision=world.decisions.append)
        kept = shelf.copies()
        await world.gateway.adopt(shelf, kept, [BOX])
        assert kept == {}
        await world.allow()
        assert b" 403 " in await waiting
        await world.allow(LOOPBACK)
        (await world.tunnel(f"127.0.0.1:{port}"))[1].close()
    await world.gateway.detach(BOX)
    assert shelf.kept == {}
    world.box.listen().close()


async def test_the_listener_of_a_sandbox_that_died_meanwhile_is_given_up(world: World) -> None:
    shelf = Shelf()
    await world.gateway.adopt(shelf, {}, ())
    await world.allow(LOOPBACK)
    await world.gateway.close()
    await Gateway().adopt(shelf, shelf.copies(), ())
    assert shelf.kept == {}
    world.box.listen().close()


async def test_a_sandbox_that_took_the_port_is_found_out(world: World) -> None:
    with world.box.listen(), pytest.raises(StateError, match="3128"):
        await world.allow(LOOPBACK)
    await world.allow(LOOPBACK)


async def test_the_hosts_own_network_is_never_listened_on(world: World) -> None:
    child = await asyncio.create_subprocess_exec("/bin/sleep", "60")
    guest = os.pidfd_open(child.pid)
    for _ in ("alive", "gone"):
        with pytest.raises(SandboxLostError):
            await world.gateway.apply(BOX, lambda: os.dup(guest), NetworkPolicy(rules=(LOOPBACK,)))
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    os.close(guest)


async def test_connections_of_one_sandbox_are_bounded(a_world: Worlds) -> None:
    async with a_world(sandbox_connections_count_max=2) as world, serving(echo) as port:
        await world.allow(LOOPBACK)
        held = [await world.tunnel(f"127.0.0.1:{port}") for _ in range(2)]
        reader, writer = await world.box.connect()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        held[0][1].write_eof()
        assert await held[0][0].read() == b"<end>"
        for _, held_writer in held:
            held_writer.close()
        assert [d.reason for d in world.decisions if not d.allowed] == ["too many connections"]


@pytest.mark.parametrize(
    "sent", [b"", b"GET", b"GET http://a.example/ HTTP/1.1\r\n" + b"a: b\r\n" * 100, b"\x05", b"\x05\xff\x00"]
)
async def test_a_client_that_never_ends_its_request_is_let_go(a_world: Worlds, sent: bytes) -> None:
    async with a_world(request_timeout_s=0.05) as world:
        await world.allow(LOOPBACK)
        assert await world.ask(sent) == b""


async def test_an_idle_connection_and_one_that_reads_nothing_end(a_world: Worlds) -> None:
    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()

    async with a_world(idle_timeout_s=0.3) as world, serving(flood) as loud, serving(echo) as quiet:
        await world.allow(LOOPBACK)
        for port in (quiet, loud):
            _, writer = await world.tunnel(f"127.0.0.1:{port}")
            writer.transport.pause_reading()
            ended = await world.ended.get()
            assert ended.port == port
            assert ended.received_bytes < 32 << 20
            writer.close()


async def test_a_head_without_end_is_refused(world: World) -> None:
    await world.allow(LOOPBACK)
    assert b" 400 " in await world.ask(b"GET http://a.example/ HTTP/1.1\r\n" + b"a: b\r\n" * 30_000)


async def test_decisions_are_told_up_to_a_rate_and_then_counted(a_world: Worlds) -> None:
    async with a_world(decisions_burst_max=3, decisions_per_s_max=1e-9) as world:
        await world.allow(LOOPBACK)
        for _ in range(10):
            assert b" 403 " in await world.ask(b"CONNECT a.example:80 HTTP/1.1\r\n\r\n")
        assert [decision.untold_count for decision in world.decisions] == [0, 0, 0]


async def test_decisions_are_lines_of_the_log_that_nobody_inside_can_break(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.gateway = Gateway()
    await world.allow(LOOPBACK)
    with caplog.at_level("INFO"):
        await world.ask(b"GET http://a\x1b\xffb/ HTTP/1.1\r\n\r\n")
        await world.ask(b"CONNECT A.example.:80 HTTP/1.1\r\n\r\n")
    told = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["sandbox_id"], line["host"], line["allowed"]) for line in told] == [
        (BOX, "", False),
        (BOX, "a.example", False),
    ]
    assert [record for record in caplog.records if not record.getMessage().isprintable()] == []


async def test_lookups_of_one_sandbox_are_bounded(a_world: Worlds) -> None:
    running: list[str] = []
    two = asyncio.Event()

    async def resolve(name: str) -> list[str]:
        running.append(name)
        if len(running) == 2:
            two.set()
        await asyncio.Event().wait()
        return []

    async with a_world(resolves_in_flight_max=2, resolve_timeout_s=0.2) as world:
        world.gateway = Gateway(NetworkConfig(resolves_in_flight_max=2), resolve=resolve)
        await world.allow(NAMED)
        writers = [(await world.box.connect())[1] for _ in range(5)]
        for index, writer in enumerate(writers):
            writer.write(f"CONNECT {index}.example:80 HTTP/1.1\r\n\r\n".encode())
        await two.wait()
        await world.gateway.detach(BOX)
        assert len(running) == 2
        for writer in writers:
            writer.close()
