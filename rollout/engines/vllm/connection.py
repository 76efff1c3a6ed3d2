"""HTTP to one vLLM: JSON calls, and streams of lines.

Everything has a bound: connecting, a call, a body, a line; a stream, or a score, may be silent for as long as its
reader likes, who has a patience of his own (`engines/guard.py`).  What goes wrong is an EngineError, and what the
server says is wrong with a request a RequestError.  Leaving a stream closes its connection, which ends the request
there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from rollout.engines.vllm.wire import Lines, decode_json, error_of, words
from rollout.errors import EngineError, RequestError

CONNECT_S_MAX = 10.0
CALL_S_MAX = 60.0
KEEP_ALIVE_S = 2.0
"""Of a connection that nobody uses: shorter than the server's 5, or a call meets its end."""
BODY_BYTES_MAX = 4 << 20
"""Of an answer whose length is not that of a prompt: the longest is what a server says of its own model."""
_HEADERS = {"accept-encoding": "identity"}
_JSON = {"content-type": "application/json"}
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, RuntimeError)
"""RuntimeError: it was closed before it was asked or read."""
_encoder = msgspec.json.Encoder()


def check_url(url: str) -> str:
    """The URL without a slash at its end.  RequestError unless it is http://HOST[:PORT][/PATH], or https."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or parts.username is not None or parts.query or parts.fragment or not url.isprintable():
        shown = re.sub(r"//[^/]*@", "//…@", url)  # what stands there may be a key
        raise RequestError(
            f"{shown!r} is no engine: write http://HOST:PORT, or https:// (a key goes into DSEC_ENGINE_KEY)"
        )
    return url.rstrip("/")


class Connection:
    """A pool of connections to one server; not open yet."""

    def __init__(self, url: str, key: str) -> None:
        self.url = check_url(url)
        self._headers = _HEADERS | ({"authorization": f"Bearer {key}"} if key else {})
        self._session: aiohttp.ClientSession | None = None
        self._responses: set[aiohttp.ClientResponse] = set()
        """Those that are being read."""

    @property
    def is_open(self) -> bool:
        """From `open` to `close`."""
        return self._session is not None

    async def open(self) -> None:
        """Ready to call; connects when it does."""
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
        )

    async def close(self) -> None:
        """Break every stream."""
        session, self._session = self._session, None
        for response in self._responses:
            response.close()  # a session that closes does not wake who waits for more of one
        if session is not None:
            await asyncio.shield(session.close())  # to its end: nobody could close it again

    async def get(self, path: str, *, call_s_max: float = CALL_S_MAX) -> Any:
        """The JSON of an answer.  EngineError, RequestError."""
        return await self._call("GET", path, b"", call_s_max, BODY_BYTES_MAX)

    async def post(
        self, path: str, body: Any = None, *, call_s_max: float | None = CALL_S_MAX, bytes_max: int = BODY_BYTES_MAX
    ) -> Any:
        """As `get`; without `call_s_max` it is the caller who loses his patience."""
        return await self._call("POST", path, _encoder.encode(body if body is not None else {}), call_s_max, bytes_max)

    @asynccontextmanager
    async def stream(
        self, path: str, body: Any, line_bytes_max: int, headers: Mapping[str, str] = _JSON
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """The payloads of the events that answer a body.  EngineError, RequestError, also from the iterator."""
        session = self._open_session()
        try:
            response = await session.post(
                self.url + path, data=_encoder.encode(body), headers={**_JSON, **headers}, allow_redirects=False
            )
        except _FAILURES as error:
            raise _failed(error) from error
        self._responses.add(response)
        try:
            if response.status != 200:
                raise error_of(await self._body(response, BODY_BYTES_MAX), response.status)
            async with aclosing(self._payloads(response, line_bytes_max)) as payloads:
                yield payloads
        finally:
            self._responses.discard(response)
            response.close()

    async def _payloads(self, response: aiohttp.ClientResponse, line_bytes_max: int) -> AsyncGenerator[bytes, None]:
        lines = Lines(line_bytes_max)
        while data := await _read(response):
            for payload in lines.feed(data):
                yield payload

    async def _call(self, method: str, path: str, data: bytes, call_s_max: float | None, bytes_max: int) -> Any:
        session = self._open_session()
        timeout = aiohttp.ClientTimeout(total=call_s_max, sock_connect=CONNECT_S_MAX)
        try:
            async with session.request(
                method, self.url + path, data=data, headers=_JSON, timeout=timeout, allow_redirects=False
            ) as response:
                self._responses.add(response)
                try:
                    body = await self._body(response, bytes_max)
                finally:
                    self._responses.discard(response)
        except _FAILURES as error:
            raise _failed(error) from error
        if response.status != 200:
            raise error_of(body, response.status)
        return decode_json(body, f"{path}: its answer is no JSON") if body else None

    async def _body(self, response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
        body = bytearray()
        while data := await _read(response):
            body += data
            if len(body) > bytes_max:
                raise EngineError(f"an answer of more than {bytes_max} bytes")
        return bytes(body)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineError("the engine is closed")
        return self._session


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """What has come; nothing at the end.  EngineError."""
    try:
        return await response.content.readany()
    except _FAILURES as error:
        raise _failed(error) from error


def _failed(error: BaseException) -> EngineError:
    if isinstance(error, TimeoutError):
        failure = EngineError("it does not answer")
    elif isinstance(error, aiohttp.ClientConnectorError):
        failure = EngineError(f"nobody answers there: {words(str(error.os_error).encode())}")
    else:
        failure = EngineError(f"the connection broke: {words(str(error).encode())}".rstrip(": "))
    failure.is_absent = True
    return failure
