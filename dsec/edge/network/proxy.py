"""The connections of one sandbox: asked for, checked against the allowlist, carried, counted, ended.

Bytes go through this process in pieces, each written out before the next is read: a side that does not
read slows the other, and costs no memory.  The address that was checked is the one that is connected
to; a name is not looked up twice.

Invariants:
    1. No byte reaches an address that the allowlist in force does not allow; it is asked again after the
       connection stands, and for every open connection when it is replaced.
    2. What a client does ends at most its own connection.

See: docs/adr/0007-network-by-proxy.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Protocol

import msgspec

from dsec.edge.network.config import NetworkConfig
from dsec.edge.network.decisions import Decision
from dsec.edge.network.dialects import HEAD_BYTES_MAX, PIECE_BYTES, Client, Refusal, Request, copy_body
from dsec.edge.network.listener import open_listener
from dsec.edge.network.rules import Address, Allowlist, Host
from dsec.errors import InvalidArgumentError
from dsec.types import SandboxId

ADDRESSES_COUNT_MAX = 8
KEY_PREFIX = "network/"
REASON_CHARACTERS_MAX = 256
GUARDED_HINT = ": loopback, private and the host's own addresses need a CIDR that means them, such as 127.0.0.1/32:8765"
_LINGER_S = 1.0

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

Resolver = Callable[[str], Awaitable[list[str]]]
"""The addresses of a name, the best first.  OSError."""


class Keeper(Protocol):
    """Holds copies of descriptors for the next process (`dsec.edge.keeper`)."""

    async def put(self, key: str, fd: int) -> None:
        """Keep a copy of `fd`."""
        ...

    async def drop(self, key: str) -> None:
        """Keep it no more."""
        ...


class Shared:
    """What the proxies of all sandboxes have in common."""

    keeper: Keeper | None = None

    def __init__(self, config: NetworkConfig, resolve: Resolver, on_decision: Callable[[Decision], None]) -> None:
        self.config = config
        self.resolve = resolve
        self.on_decision = on_decision
        self.connections_count = 0


class Proxy:
    """The way out of one sandbox; closed until `apply`.  `listener`: as an earlier process left it in the keeper."""

    def __init__(self, sandbox_id: SandboxId, shared: Shared, listener: socket.socket | None = None) -> None:
        self.sandbox_id = sandbox_id
        self.shared = shared
        self.resolves = asyncio.Semaphore(shared.config.resolves_in_flight_max)
        self.allowlist: Allowlist | None = None
        self._key = KEY_PREFIX + sandbox_id
        self._listener = listener
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._is_closed = False
        self._tellable = float(shared.config.decisions_burst_max)
        self._told_at_s = time.monotonic()
        self._untold_count = 0

    async def apply(self, allowlist: Allowlist, open_guest: Callable[[], int]) -> None:
        """Obey `allowlist` from now on, and listen.  Raises as `open_guest` and `open_listener` do."""
        self.allowlist = allowlist
        for task, connection in self._connections.items():
            if not connection.is_allowed():
                task.cancel()
        async with self._opening:
            if self._server is not None or self._is_closed:
                return
            if self._listener is None:
                self._listener = await self._open_listener(open_guest())
            self._server = await asyncio.start_server(self._on_client, sock=self._listener, limit=HEAD_BYTES_MAX)

    async def _open_listener(self, guest: int) -> socket.socket:
        try:
            listener = await open_listener(guest)
        finally:
            os.close(guest)
        try:
            if self.shared.keeper is not None:
                await self.shared.keeper.put(self._key, listener.fileno())
        except BaseException:
            listener.close()
            raise
        return listener

    async def close(self, *, is_over: bool) -> None:
        """End every connection and stop listening; the keeper's copy stays for the next process unless it `is_over`."""
        self._is_closed = True
        for task in self._connections:
            task.cancel()
        async with self._opening:
            if is_over and self._listener is not None and self.shared.keeper is not None:
                await self.shared.keeper.drop(self._key)
            if self._server is not None:
                self._server.close()
            if self._listener is not None:
                self._listener.close()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shared, config = self.shared, self.shared.config
        is_full = len(self._connections) >= config.sandbox_connections_count_max
        if is_full or self._is_closed or shared.connections_count >= config.connections_count_max:
            writer.transport.abort()
            self.tell(Decision(at_s=time.time(), sandbox_id=self.sandbox_id, reason="too many connections"))
            return
        connection = _Connection(self, reader, writer)
        task = asyncio.create_task(connection.run(), name=f"connection of {self.sandbox_id}")
        self._connections[task] = connection
        shared.connections_count += 1
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()
        self.shared.connections_count -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": "a proxied connection failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    def tell(self, decision: Decision) -> None:
        """Tell of a decision, or count it where there are too many."""
        config, now_s = self.shared.config, time.monotonic()
        grown = self._tellable + (now_s - self._told_at_s) * config.decisions_per_s_max
        self._tellable, self._told_at_s = min(grown, config.decisions_burst_max), now_s
        if self._tellable < 1:
            self._untold_count += 1
            return
        self._tellable -= 1
        untold, self._untold_count = self._untold_count, 0
        self.shared.on_decision(msgspec.structs.replace(decision, untold_count=untold))


class _RefusedError(Exception):
    """Why a request that can be understood gets no connection."""

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(text)
        self.refusal = refusal


class _Connection:
    """One client, from its first byte to the last byte of either side."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._config = proxy.shared.config
        self._reader = reader
        self._writer = writer
        self._other: asyncio.StreamWriter | None = None
        self._request: Request | None = None
        self._reached: tuple[Host, Address, int] | None = None
        self._sent_bytes = 0
        self._received_bytes = 0
        writer.transport.set_write_buffer_limits(0)  # what was drained is in the kernel, and a close loses nothing

    def is_allowed(self) -> bool:
        """False if this connection stands and the allowlist in force does not allow it."""
        return self._reached is None or self._allows(*self._reached)

    def close(self) -> None:
        """Let go of both sides at once."""
        for writer in (self._writer, self._other):
            if writer is not None:
                writer.transport.abort()

    async def run(self) -> None:
        """Serve the one request of this connection."""
        with contextlib.suppress(OSError, EOFError):
            client = Client(self._reader, self._writer)
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    self._request = await client.read_request()
                reader, other = await self._reach(self._request)
            except (InvalidArgumentError, _RefusedError) as error:
                refusal = error.refusal if isinstance(error, _RefusedError) else Refusal.MALFORMED
                await self._refuse(client, refusal, str(error)[:REASON_CHARACTERS_MAX])
            else:
                await self._carry(self._request, reader, other)

    def _tell(self, reason: str = "", *, is_end: bool = False) -> None:
        request, reached = self._request, self._reached
        self._proxy.tell(
            Decision(
                at_s=time.time(),
                sandbox_id=self._proxy.sandbox_id,
                host=str(request.host) if request else "",
                port=request.port if request else 0,
                address=str(reached[1]) if reached else "",
                allowed=reached is not None,
                reason=reason,
                is_end=is_end,
                sent_bytes=self._sent_bytes,
                received_bytes=self._received_bytes,
            )
        )

    async def _refuse(self, client: Client, refusal: Refusal, reason: str) -> None:
        """Say why not; and read on a little, because closing with bytes unread would take the answer back."""
        self._tell(reason)
        client.refuse(refusal, reason)
        self._writer.write_eof()
        async with asyncio.timeout(_LINGER_S):
            await self._discard()

    async def _discard(self) -> None:
        while await self._reader.read(PIECE_BYTES):
            pass

    def _allows(self, host: Host, address: Address, port: int) -> bool:
        allowlist = self._proxy.allowlist
        return allowlist is not None and allowlist.allows(host, address, port)

    async def _reach(self, request: Request) -> _Streams:
        """Connect to the first allowed address that answers."""
        host, port = request.host, request.port
        found = await self._find(host, port)
        allowed = [address for address in found if self._allows(host, address, port)]
        if not allowed:
            allowlist = self._proxy.allowlist
            hint = GUARDED_HINT if allowlist is not None and any(map(allowlist.guards, found)) else ""
            raise _RefusedError(Refusal.DENIED, f"the sandbox's network policy does not allow {host} port {port}{hint}")
        for address in allowed[:ADDRESSES_COUNT_MAX]:
            try:
                async with asyncio.timeout(self._config.connect_timeout_s):
                    reader, other = await asyncio.open_connection(str(address), port, limit=HEAD_BYTES_MAX)
            except OSError:
                continue
            self._other = other
            if not self._allows(host, address, port):
                raise _RefusedError(Refusal.DENIED, f"the sandbox's network policy no longer allows {host} port {port}")
            self._reached = (host, address, port)
            return reader, other
        raise _RefusedError(Refusal.UNREACHABLE, f"{host} port {port} cannot be reached")

    async def _find(self, host: Host, port: int) -> list[Address]:
        if not isinstance(host, str):
            return [host]
        if self._proxy.allowlist is None or not self._proxy.allowlist.may_resolve(host, port):
            return []
        await self._proxy.resolves.acquire()
        lookup = asyncio.ensure_future(self._proxy.shared.resolve(host))
        lookup.add_done_callback(functools.partial(_finish_lookup, self._proxy.resolves))
        try:
            async with asyncio.timeout(self._config.resolve_timeout_s):
                return [ip_address(text) for text in await asyncio.shield(lookup)]
        except TimeoutError as error:
            raise _RefusedError(Refusal.LATE, f"looking up {host} took too long") from error
        except OSError as error:
            raise _RefusedError(Refusal.UNREACHABLE, f"{host} cannot be looked up") from error

    async def _carry(self, request: Request, reader: asyncio.StreamReader, other: asyncio.StreamWriter) -> None:
        self._tell()
        reason = "closed by the host"
        try:
            await self._copy(request, reader, other)
            reason = ""
        except* (OSError, EOFError, InvalidArgumentError) as failures:
            reason = str(failures.exceptions[0])[:REASON_CHARACTERS_MAX] or "idle for too long"
        finally:
            self._tell(reason, is_end=True)

    async def _copy(self, request: Request, reader: asyncio.StreamReader, other: asyncio.StreamWriter) -> None:
        """Both ways at once; of a plain HTTP request until the answer ends, else until both sides have ended."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._config.connection_s_max
        other.transport.set_write_buffer_limits(0)
        async with asyncio.timeout(self._config.idle_timeout_s) as patience:

            async def forward(writer: asyncio.StreamWriter, piece: bytes) -> None:
                writer.write(piece)
                await writer.drain()
                patience.reschedule(min(loop.time() + self._config.idle_timeout_s, ends_at))

            async def send(piece: bytes) -> None:
                await forward(other, piece)
                self._sent_bytes += len(piece)

            async def send_all() -> None:
                await send(request.head)
                await copy_body(self._reader, request.body, send)
                if request.body == "tunnel":
                    other.write_eof()
                else:
                    await self._discard()

            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(send_all())
                await forward(self._writer, request.granted)
                while piece := await reader.read(PIECE_BYTES):
                    await forward(self._writer, piece)
                    self._received_bytes += len(piece)
                self._writer.write_eof()
                if request.body != "tunnel":
                    sending.cancel()


def _finish_lookup(resolves: asyncio.Semaphore, lookup: asyncio.Future[list[str]]) -> None:
    resolves.release()
    if not lookup.cancelled():
        lookup.exception()  # whoever asked may be gone, and then nobody else takes it
