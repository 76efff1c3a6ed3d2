"""Checks of the way out: none without rules, and with rules what they allow and nothing else.

The destinations are servers of the checking process on this host's loopback, which only a CIDR that
means them opens; so these checks need no network, and the substrate must be on this host.
"""

# ruff: noqa: D103  (a check is described by its name)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dsec.conformance.check import Check, check, fresh, line, python, refusal_of, require, script
from dsec.conformance.processes import ready
from dsec.errors import InvalidArgumentError
from dsec.sandbox import Sandbox, Substrate
from dsec.types import NetworkPolicy, NetworkRule, SandboxSpec

NOWHERE = NetworkPolicy()

# `reach(host, port)`: a connected socket, or the proxy's refusal as a number.
_REACH = """
import os, socket
def reach(host, port):
    proxy = os.environ["https_proxy"].removeprefix("http://").rstrip("/").split(":")
    s = socket.create_connection((proxy[0], int(proxy[1])), 20)
    s.sendall(f"CONNECT {host}:{port} HTTP/1.1\\r\\nHost: {host}:{port}\\r\\n\\r\\n".encode())
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        more = s.recv(1)
        if not more: return 0
        head += more
    status = int(head.split()[1])
    return s if status == 200 else status
def echo(host, port):
    s = reach(host, port)
    if isinstance(s, int): return s
    s.sendall(b"ping"); return s.recv(4).decode()
"""


@asynccontextmanager
async def _echo_server() -> AsyncIterator[int]:
    """A server on this host's loopback that says what it is told; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _allow(*ports: int) -> NetworkPolicy:
    return NetworkPolicy(rules=(NetworkRule(cidr="127.0.0.1/32", ports=ports),))


async def _echo(sandbox: Sandbox, host: str, port: int) -> str:
    return (await python(sandbox, f"{_REACH}\nprint(echo({host!r}, {port}))")).strip()


@check("network")
async def without_rules_there_is_no_way_out(substrate: Substrate) -> None:
    async with _echo_server() as port, fresh(substrate) as sandbox:
        require(await line(sandbox, "env | grep -ci proxy || true") == "0", "a proxy without rules")
        direct = "(echo > /dev/tcp/127.0.0.1/{}) 2>/dev/null && echo open || echo shut"
        for each in (port, 3128):
            require(await line(sandbox, direct.format(each)) == "shut", each)


@check("network")
async def what_a_rule_allows_is_reached_and_nothing_else(substrate: Substrate) -> None:
    async with _echo_server() as allowed, _echo_server() as other:
        async with fresh(substrate, SandboxSpec(network=_allow(allowed))) as sandbox:
            require(await _echo(sandbox, "127.0.0.1", allowed) == "ping", "an allowed address")
            for host, port in (("127.0.0.1", other), ("localhost", allowed), ("127.0.0.2", allowed),
                               ("169.254.169.254", 80), ("1.1.1.1", allowed), ("example.org", allowed)):  # fmt: skip
                require(await _echo(sandbox, host, port) == "403", f"{host}:{port}")
            direct = f"(echo > /dev/tcp/127.0.0.1/{allowed}) 2>/dev/null && echo open || echo shut"
            require(await line(sandbox, direct) == "shut", "past the proxy")
        async with fresh(substrate) as beside:
            require(await line(beside, "env | grep -ci proxy || true") == "0", "another sandbox got the rule")


@check("network")
async def a_rule_for_everything_does_not_open_the_host(substrate: Substrate) -> None:
    wide = NetworkPolicy(rules=(NetworkRule(cidr="0.0.0.0/0"), NetworkRule(cidr="::/0"), NetworkRule(host="*")))
    async with _echo_server() as port, fresh(substrate, SandboxSpec(network=wide)) as sandbox:
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "0.0.0.0"):  # noqa: S104
            require(await _echo(sandbox, host, port) not in ("ping", "200"), host)


@check("network")
async def a_policy_can_be_given_and_taken_away(substrate: Substrate) -> None:
    hold = f"{_REACH}\ns = reach('127.0.0.1', PORT)\nprint('ready', flush=True)\nprint(s.recv(1) == b'')"
    async with _echo_server() as port, fresh(substrate) as sandbox:
        await sandbox.update_network(_allow(port))
        require(await _echo(sandbox, "127.0.0.1", port) == "ping", "a policy given later")
        holder = await sandbox.start(script("exec python3 -", stdin=hold.replace("PORT", str(port)).encode()))
        await ready(holder)
        await sandbox.update_network(NOWHERE)
        result = await holder.wait()  # its connection was closed: else it would read until its timeout
        require(not result.timed_out, result)
        direct = (
            f"exec 3<>/dev/tcp/127.0.0.1/3128 && printf 'CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\n\\r\\n' >&3 && cat <&3"
        )
        require("200" not in await line(sandbox, f"({direct}) 2>/dev/null | head -c 12; true"), "taken away")


@check("network")
async def a_rule_that_makes_no_sense_is_refused_and_changes_nothing(substrate: Substrate) -> None:
    bad = (
        NetworkRule(), NetworkRule(host="a.example", cidr="10.0.0.0/8"), NetworkRule(cidr="10.0.0.0/33"),
        NetworkRule(cidr="example"), NetworkRule(host="10.0.0.1"), NetworkRule(host="a b"), NetworkRule(host="a..b"),
        NetworkRule(host="a.example", ports=(0,)), NetworkRule(host="a.example", ports=(65_536,)),
    )  # fmt: skip
    async with _echo_server() as port, fresh(substrate, SandboxSpec(network=_allow(port))) as sandbox:
        for rule in bad:
            policy = NetworkPolicy(rules=(rule,))
            require(isinstance(await refusal_of(sandbox.update_network(policy)), InvalidArgumentError), rule)
            made = substrate.create(SandboxSpec(network=policy))
            require(isinstance(await refusal_of(made), InvalidArgumentError), rule)
        require(await _echo(sandbox, "127.0.0.1", port) == "ping", "the old policy is gone")


CHECKS: tuple[Check, ...] = (
    without_rules_there_is_no_way_out,
    what_a_rule_allows_is_reached_and_nothing_else,
    a_rule_for_everything_does_not_open_the_host,
    a_policy_can_be_given_and_taken_away,
    a_rule_that_makes_no_sense_is_refused_and_changes_nothing,
)
