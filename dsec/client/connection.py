"""A connection to an Edge: one channel for each event loop and address, calls that are repeated, typed errors.

Short calls share one stream, which costs three fifths of what a call by itself does; large ones would hold the others
up and go by themselves, and so does every call to an Edge that has no such stream yet.

What is repeated: a call whose connection broke, when its repetition is exact (the same request id, key or
offset), for a while that grows from milliseconds; and a call that the host refused for lack of room, if the
caller wants to wait.  A peer that says nothing is noticed by keepalive, so no call waits for ever.

See: proto/dsec/pb/v1/edge.proto, "Idempotent".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import re
from collections.abc import AsyncIterator
from typing import Any
from weakref import WeakKeyDictionary

import grpc
import msgspec

from dsec.address import default_url, parse_address
from dsec.client.calls import Calls
from dsec.client.channel import EDGE, given, open_channel
from dsec.errors import DsecError, InvalidArgumentError, ResourceExhaustedError, StateError, UnreachableError
from dsec.pb.v1.edge_pb2_grpc import EdgeStub
from dsec.wire import REPLIES, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, SHORT_BYTES_MAX, STATUSES, Status, error_of

CALL_TIMEOUT_S = 60.0
"""For calls that wait for no command."""
_DELAY_S_MIN, _DELAY_S_MAX = 0.02, 2.0
_TELL_S = 2.0
"""After so long without an answer, a call says that it still asks."""
_REASON = re.compile(r".*(error: |connect: |remote host: )|\s*\(\d+\)$", re.DOTALL)
"""What gRPC writes around the kernel's own words for a connection that it did not get."""
_LOG = logging.getLogger("dsec")
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]


class Patience(msgspec.Struct, frozen=True):
    """How long a call is repeated: where no Edge ever answered, where it was lost, and where it is full."""

    connect_s: float = 3.0
    lost_s: float = 60.0
    busy_s: float = 0.0


class Connection:
    """A channel and who uses it; made by `connect`."""

    def __init__(self, url: str, token: str) -> None:
        address = parse_address(url)
        self.url = url
        self._users_count = 0
        self._has_answered = False
        self._calls: Calls | None = None
        self._has_stream = True
        self._has_broken = False
        self._channel, self._metadata = open_channel(EDGE, address, token, _OPTIONS)
        self.stub: Any = EdgeStub(self._channel)  # type: ignore[no-untyped-call]

    async def call(
        self,
        name: str,
        request: Any,
        *,
        timeout_s: float | None = CALL_TIMEOUT_S,
        is_repeatable: bool = True,
        is_short: bool = True,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> Any:
        """One unary call, repeated as the module says.  Raises the server's errors, and UnreachableError.

        One that is not to be repeated is not sent before there is a connection; one that may be answered with megabytes
        is not short.
        """
        retry = Retry(self, patience, is_repeatable=is_repeatable)
        if not is_repeatable:
            await self._connected(patience)
        while True:
            self._require_open()
            try:
                reply = await self._ask(name, request, timeout_s, is_short=is_short)
            except DsecError as error:
                self._require_open()
                await retry.wait_or_raise(error)
            except asyncio.CancelledError:
                self._require_open_unless_cancelled()
                raise
            else:
                self._has_answered = True
                return reply

    async def _ask(self, name: str, request: Any, timeout_s: float | None, *, is_short: bool) -> Any:
        """Once, on the stream or by itself.  DsecError."""
        if is_short and (calls := self._shared_stream()) is not None:
            data = request.SerializeToString()
            if len(data) <= SHORT_BYTES_MAX:
                answer = await calls.ask(name, data, timeout_s)
                if not answer.status:
                    return REPLIES[name].FromString(answer.reply)
                if answer.status != Status.UNIMPLEMENTED.value[0]:
                    raise self._failure(STATUSES.get(answer.status, Status.UNKNOWN), answer.details)
                self._has_stream = not calls.has_ended
        try:
            return await getattr(self.stub, name)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.code(), error.details()) from None

    def _shared_stream(self) -> Calls | None:
        """None if the Edge knows of none, or it is full."""
        if not self._has_stream:
            return None
        if self._calls is None or self._calls.has_ended:
            self._calls = Calls(self.stub.Calls(metadata=self._metadata))
        return self._calls if self._calls.has_room else None

    async def stream(self, name: str, request: Any) -> AsyncIterator[Any]:
        """One streaming call, not repeated once it has begun.  Raises as `call`."""
        self._require_open()
        call = getattr(self.stub, name)(request, metadata=self._metadata)
        try:
            async for message in call:
                self._has_answered = True
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.code(), error.details()) from None
        except asyncio.CancelledError:
            self._require_open_unless_cancelled()
            raise
        finally:
            call.cancel()

    async def exchange(self, name: str, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """One call that answers each request, which is sent when the one before was answered, and then its last word.

        Not repeated.  Raises as `call`, and what `requests` raises.  (A server that refuses while a message is on its
        way would be lost in an error of gRPC's own.)
        """
        await self._connected(Patience())
        call = getattr(self.stub, name)(metadata=self._metadata)
        try:
            async for request in requests:
                with contextlib.suppress(asyncio.InvalidStateError):  # it ended while we made this: reading says why
                    await call.write(request)
                yield await call.read()
                self._has_answered = True
            await call.done_writing()
            yield await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error.code(), error.details()) from None
        finally:
            call.cancel()

    def _require_open(self) -> None:
        """StateError after the last user's `close`."""
        if self._users_count == 0:
            what = "kill(), close() or the end of a with block"
            raise StateError(f"the connection to the Edge at {self.url} was closed here, by {what}")

    def _require_open_unless_cancelled(self) -> None:
        """The same for a call that was on its way, which gRPC cancels as if its caller's task were."""
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            self._require_open()

    async def _connected(self, patience: Patience) -> None:
        self._require_open()
        broken = self._unreachable("no connection")
        try:
            async with asyncio.timeout(self.patience_s(broken, patience)):
                await self._channel.channel_ready()
        except TimeoutError:
            raise broken from None

    def patience_s(self, error: DsecError, patience: Patience) -> float:
        """How long a call that met this error may be repeated."""
        if isinstance(error, UnreachableError):
            return patience.lost_s if self._has_answered else patience.connect_s
        return patience.busy_s if isinstance(error, ResourceExhaustedError) else 0.0

    def _failure(self, status: Status, details: str | None) -> DsecError:
        failure = error_of(status, details or "")
        if status is Status.UNAUTHENTICATED:
            # Later than as its first word it refuses only to say what became of calls before, which may have run.
            if self._has_answered or self._has_broken:
                return self._unreachable("it refuses the token now: set DSEC_API_KEY")
            return InvalidArgumentError(f"{self.url} refuses the token: set DSEC_API_KEY")
        if not isinstance(failure, UnreachableError):
            self._has_answered = True
            return failure
        self._has_broken = True
        return self._unreachable(_REASON.sub("", str(failure)))

    def _unreachable(self, why: str) -> UnreachableError:
        if self._has_answered:
            return UnreachableError(f"the connection to the Edge at {self.url} broke: {why}")
        if os.strerror(errno.EACCES) in why:
            return UnreachableError(
                f"we may not open the Edge's socket {self.url} ({why}): be the user that serves it (sudo), or set "
                "DSEC_API_URL to a tcp or tls address that it serves"
            )
        other = "correct" if os.environ.get("DSEC_API_URL") else "set"
        return UnreachableError(
            f"no Edge answers at {self.url} ({why}): start one with `dsec edge serve`, or {other} DSEC_API_URL"
        )

    def use(self) -> Connection:
        """Count one more user."""
        self._users_count += 1
        return self

    async def close(self) -> None:
        """Count one user less; the last one closes the channel."""
        self._users_count -= 1
        if self._users_count == 0:
            connections = _connections.get(asyncio.get_running_loop(), {})
            for key in [key for key, connection in connections.items() if connection is self]:
                del connections[key]
            if self._calls is not None:
                self._calls.close()
            await self._channel.close(None)


class Retry:
    """When a call is made again: after a delay that doubles, with jitter, while the patience lasts."""

    def __init__(self, connection: Connection, patience: Patience, *, is_repeatable: bool = True) -> None:
        self._connection = connection
        self._patience = patience
        self._is_repeatable = is_repeatable
        self._failed_at_s: float | None = None
        self._has_told = False
        self._delay_s = _DELAY_S_MIN

    async def wait_or_raise(self, error: DsecError) -> None:
        """Wait before the next attempt, or raise the error of the last one."""
        now_s = asyncio.get_running_loop().time()
        if self._failed_at_s is None:
            self._failed_at_s = now_s
        left_s = self._failed_at_s + self._connection.patience_s(error, self._patience) - now_s
        if not self._is_repeatable or left_s <= 0:
            raise error
        is_lost = isinstance(error, UnreachableError) and left_s >= _TELL_S
        if is_lost and not self._has_told and now_s - self._failed_at_s >= _TELL_S:
            self._has_told = True
            _LOG.warning("no answer from the Edge at %s: asking again for %.0f s", self._connection.url, left_s)
        await asyncio.sleep(min(left_s, random.uniform(self._delay_s / 2, self._delay_s)))  # noqa: S311 - jitter
        self._delay_s = min(2 * self._delay_s, _DELAY_S_MAX)


_connections: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Connection]] = WeakKeyDictionary()


def connect(url: str = "", token: str = "") -> Connection:
    """The running loop's connection to `url` (default: DSEC_API_URL, else this host's Edge); `close` it once each."""
    url, token = given(EDGE, url, token, default_url())
    connections = _connections.setdefault(asyncio.get_running_loop(), {})
    if (url, token) not in connections:
        connections[url, token] = Connection(url, token)
    return connections[url, token].use()
