"""What a client of the proxy asks for, in three dialects: HTTP CONNECT, plain HTTP, and SOCKS 5.

The client is hostile.  A plain HTTP request is taken apart and written anew, and its body is followed to
its end, so that nothing but this one request to the host that was checked can be in it: a second
request on the same connection would go past the check.

Invariants:
    1. One request a connection; what follows a plain HTTP request's body is thrown away.
    2. Bytes of the request reach the other side only through `_render_head` and `copy_body`.

See: RFC 9110, 9112 (HTTP); RFC 1928 (SOCKS 5).
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

import msgspec

from dsec.edge.network.rules import Host, parse_host
from dsec.errors import InvalidArgumentError

HEAD_BYTES_MAX = 64 << 10
PIECE_BYTES = 64 << 10
_CHUNK_LINE_BYTES_MAX = 256
_TRAILERS_COUNT_MAX = 64
_SOCKS_VERSION = 5
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)")
_URL = re.compile(r"http://([^/?#@]+)([/?][^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")
_OF_THE_HOP = {b"connection", b"proxy-connection", b"keep-alive", b"proxy-authorization", b"te", b"trailer", b"upgrade"}

Body = int | Literal["chunked", "tunnel"]
"""How many bytes follow the head; or chunks; or whatever comes, both ways."""


class Refusal(enum.Enum):
    """Why there is no connection: the HTTP status and the SOCKS reply that say it."""

    MALFORMED = (b"400 Bad Request", 1)
    DENIED = (b"403 Forbidden", 2)
    UNREACHABLE = (b"502 Bad Gateway", 4)
    LATE = (b"504 Gateway Timeout", 6)


class Request(msgspec.Struct, frozen=True):
    """A destination, what the client is told when it is reached, what the other side is told first."""

    host: Host
    port: int
    granted: bytes = b""
    head: bytes = b""
    body: Body = "tunnel"


class Client:
    """One client's side of a connection, until its request is known."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._is_socks = False

    async def read_request(self) -> Request:
        """What it asks for.  InvalidArgumentError, or EOFError if it goes away before."""
        first = await self._reader.readexactly(1)
        self._is_socks = first[0] == _SOCKS_VERSION
        return await (self._read_socks() if self._is_socks else self._read_http(first))

    def refuse(self, refusal: Refusal, text: str) -> None:
        """Tell it why not; `text` is one line."""
        status, reply = refusal.value
        if self._is_socks:
            self._writer.write(_socks_reply(reply))
            return
        body = f"dsec: {text}\n".encode("ascii", "backslashreplace")
        self._writer.write(
            b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (status, len(body), body)
        )

    async def _read_http(self, first: bytes) -> Request:
        try:
            head = first + await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:
            raise InvalidArgumentError(f"the request's head has more than {HEAD_BYTES_MAX} bytes") from error
        return parse_http(head)

    async def _read_socks(self) -> Request:
        methods = await self._reader.readexactly((await self._reader.readexactly(1))[0])
        if 0 not in methods:
            self._writer.write(bytes((_SOCKS_VERSION, 0xFF)))
            raise InvalidArgumentError("SOCKS: only the method without authentication is served")
        self._writer.write(bytes((_SOCKS_VERSION, 0)))
        version, command, _, kind = await self._reader.readexactly(4)
        if version != _SOCKS_VERSION or command != 1:
            raise InvalidArgumentError("SOCKS: only CONNECT of version 5 is served")
        host = await self._read_socks_host(kind)
        port = int.from_bytes(await self._reader.readexactly(2), "big")
        return Request(host, port, granted=_socks_reply(0))

    async def _read_socks_host(self, kind: int) -> Host:
        if kind == 1:
            return parse_host(str(IPv4Address(await self._reader.readexactly(4))))
        if kind == 4:
            return parse_host(str(IPv6Address(await self._reader.readexactly(16))))
        if kind != 3:
            raise InvalidArgumentError(f"SOCKS: there is no address type {kind}")
        name = await self._reader.readexactly((await self._reader.readexactly(1))[0])
        return parse_host(_ascii(name))


def _socks_reply(reply: int) -> bytes:
    return bytes((_SOCKS_VERSION, reply, 0, 1)) + bytes(6)


def _ascii(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{data!r} is no host: names are sent in IDNA form") from error


def parse_http(head: bytes) -> Request:
    """The request that a head with its empty line asks for.  InvalidArgumentError."""
    line, *rows = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise InvalidArgumentError("this is no request of HTTP/1.0 or HTTP/1.1, nor SOCKS 5")
    method, target, minor = found[1], found[2].decode(), int(found[3])
    if method == b"CONNECT":
        host, port = _parse_authority(target, None)
        return Request(host, port, granted=b"HTTP/1.1 200 Connection established\r\n\r\n")
    url = _URL.fullmatch(target)
    if url is None:
        raise InvalidArgumentError("this is a proxy: ask by CONNECT, by http://... or by SOCKS 5")
    host, port = _parse_authority(url[1], 80)
    fields = [_parse_field(row) for row in rows]
    _check_host(fields, host, port, minor)
    path = url[2] or "/"
    return Request(
        host,
        port,
        head=_render_head(method, path if path.startswith("/") else "/" + path, minor, url[1], fields),
        body=_parse_body(fields, minor),
    )


Field = tuple[bytes, bytes]
"""A lower case name and a value without space around it."""


def _parse_field(row: bytes) -> Field:
    found = _FIELD.fullmatch(row)
    if found is None:
        raise InvalidArgumentError("a header line of the request is malformed")
    return found[1].lower(), found[2].strip(b" \t")


def _values(fields: list[Field], name: bytes) -> list[bytes]:
    return [value for field, value in fields if field == name]


def _parse_authority(text: str, default_port: int | None) -> tuple[Host, int]:
    found = _AUTHORITY.fullmatch(text)
    if found is None or (found[3] is None and default_port is None):
        raise InvalidArgumentError(f"{text!r} is not a host and a port")
    return parse_host(found[1] or found[2]), int(found[3] or default_port or 0)


def _check_host(fields: list[Field], host: Host, port: int, minor: int) -> None:
    named = _values(fields, b"host")
    if len(named) > 1 or (not named and minor == 1):
        raise InvalidArgumentError("a request of HTTP/1.1 has one Host header")
    if named and _parse_authority(_ascii(named[0]), 80) != (host, port):
        raise InvalidArgumentError("the Host header is not the host of the URL")


def _parse_body(fields: list[Field], minor: int) -> Body:
    lengths, codings = _values(fields, b"content-length"), _values(fields, b"transfer-encoding")
    if codings:
        if lengths or minor == 0 or [coding.lower() for coding in codings] != [b"chunked"]:
            raise InvalidArgumentError("the end of the request's body is not told in one way")
        return "chunked"
    if len(lengths) > 1 or not all(re.fullmatch(rb"[0-9]{1,18}", length) for length in lengths):
        raise InvalidArgumentError("Content-Length is not one number")
    return int(lengths[0]) if lengths else 0


def _render_head(method: bytes, path: str, minor: int, authority: str, fields: list[Field]) -> bytes:
    named = {name.strip().lower() for value in _values(fields, b"connection") for name in value.split(b",")}
    dropped = _OF_THE_HOP | (named - {b"content-length", b"transfer-encoding"}) | {b"host"}
    kept = [b"%b: %b\r\n" % field for field in fields if field[0] not in dropped]
    line = b"%b %b HTTP/1.%d\r\n" % (method, path.encode(), minor)
    return b"".join((line, b"Host: %b\r\n" % authority.encode(), *kept, b"Connection: close\r\n\r\n"))


Send = Callable[[bytes], Awaitable[None]]


async def copy_body(reader: asyncio.StreamReader, body: Body, send: Send) -> None:
    """Send what the client sends, to the end of its request.  InvalidArgumentError, EOFError."""
    if isinstance(body, int):
        await _copy_bytes(reader, body, send)
    elif body == "chunked":
        await _copy_chunks(reader, send)
    else:
        while piece := await reader.read(PIECE_BYTES):
            await send(piece)


async def _copy_bytes(reader: asyncio.StreamReader, count: int, send: Send) -> None:
    while count:
        piece = await reader.read(min(count, PIECE_BYTES))
        if not piece:
            raise EOFError("the client went away in the middle of its request")
        count -= len(piece)
        await send(piece)


async def _copy_chunks(reader: asyncio.StreamReader, send: Send) -> None:
    while True:
        size = int((await _read_line(reader, rb"([0-9a-fA-F]{1,15})[ \t]*(;.*)?"))[1], 16)
        if size == 0:
            break
        await send(b"%x\r\n" % size)
        await _copy_bytes(reader, size, send)
        await _read_line(reader, rb"")
        await send(b"\r\n")
    for _ in range(_TRAILERS_COUNT_MAX):
        if not (await _read_line(reader, rb".*"))[0]:
            await send(b"0\r\n\r\n")
            return
    raise InvalidArgumentError("the request has too many trailers")


async def _read_line(reader: asyncio.StreamReader, pattern: bytes) -> re.Match[bytes]:
    try:
        line = (await reader.readuntil(b"\r\n"))[:-2]
    except asyncio.LimitOverrunError as error:
        raise InvalidArgumentError("a line of a chunked body has no end") from error
    found = re.fullmatch(pattern, line)
    if found is None or len(line) > _CHUNK_LINE_BYTES_MAX:
        raise InvalidArgumentError("a line of a chunked body is malformed")
    return found
