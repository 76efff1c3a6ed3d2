"""Who may call over HTTP, how much they may send, and how long that may take: an ASGI application before another.

A body is read whole before anything looks at it.  All bodies that are being answered share one bound, so that no
number of callers can fill the memory; who comes too late is told to come again.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

BODY_BYTES_MAX = 32 << 20
BODIES_BYTES_MAX = 256 << 20
"""Of all requests that are being answered."""
BODY_S = 60.0
"""For a body to arrive in."""
RETRY_S = 1
PROBES = {"/health", "/live"}
"""Open to everybody, with nothing to read or to tell."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """The application behind it sees requests with a whole body, of callers that may call."""

    def __init__(self, app: App, token: str = "") -> None:
        """With `token` every call but a probe needs it as a bearer; without one, no page in a browser may call."""
        self._app, self._token = app, token
        self._bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _refuse(send, *refusal)
            return
        length = int(headers.get("content-length", "0"))
        self._bytes += length
        try:
            if self._bytes > BODIES_BYTES_MAX:
                await _refuse(send, 429, "the bodies of running requests fill their room: ask again")
                return
            try:
                async with asyncio.timeout(BODY_S):
                    body = await _body(receive)
            except TimeoutError:
                await _refuse(send, 408, f"the body did not arrive within {BODY_S:g} s")
                return
            if body is not None:
                await self._app(scope, _after(body, receive), send)
        finally:
            self._bytes -= length

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        given, is_probe = headers.get("authorization", "").encode(), scope["path"] in PROBES
        scope["may_call"] = not self._token or secrets.compare_digest(given, f"Bearer {self._token}".encode())
        if not is_probe and not scope["may_call"]:
            return 401, "give the service's token: Authorization: Bearer TOKEN"
        if not self._token and not is_probe and "origin" in headers:
            return 403, "a page of another origin may not call this service"
        if "transfer-encoding" in headers:
            return 411, "send a Content-Length"
        length, bytes_max = headers.get("content-length", "0"), 0 if is_probe else BODY_BYTES_MAX
        if len(length) > 20 or int(length) > bytes_max:  # that it is a number, the protocol has checked
            return 413, f"a body has at most {bytes_max} bytes"
        return None


def error_body(message: str, code: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_headers(status: int) -> dict[str, str]:
    """Says when to ask again, where that can help."""
    return {"retry-after": str(RETRY_S)} if status in {429, 503} else {}


async def _body(receive: Receive) -> bytes | None:
    """The whole of it; None if the caller went away."""
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(parts)


def _after(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body once, then whatever comes."""
    left = [body]

    async def next_message() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return next_message


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(message, "REFUSED", status)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(status)}
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
