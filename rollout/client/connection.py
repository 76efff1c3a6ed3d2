"""A channel to the rollout service: messages out and in, typed errors, and calls that are asked again.

Every call of the protocol may be repeated, so a call that was lost, or whose server is going or coming, is sent
again, after a delay that grows, until `patience_s` seconds passed without an answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from dsec.address import parse_address
from dsec.client.channel import ROLLOUTS, given, open_channel
from dsec.errors import DsecError, InvalidArgumentError, ResourceExhaustedError, UnreachableError
from rollout.errors import EngineError, RolloutError
from rollout.pb.v1.rollout_pb2_grpc import RolloutServiceStub
from rollout.rpc.messages import MESSAGE_BYTES_MAX

DEFAULT_URL = "tcp:127.0.0.1:7710"
DELAY_S_MIN, DELAY_S_MAX = 0.05, 2.0
_SHOWN_MAX = 200
_log = logging.getLogger(__name__)
ALIVE_S = 60.0
"""After so long somebody took the call: without a connection, or with a dead one (`_OPTIONS`), it ends sooner."""
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]


def _leaves(root: type[Any]) -> dict[str, type[Exception]]:
    found: dict[str, type[Exception]] = {root.code: root}
    for leaf in root.__subclasses__():
        found |= _leaves(leaf)
    return found


_ERRORS = _leaves(DsecError) | _leaves(RolloutError)
_RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""What the caller itself cancels is no status; a server that stops cancels what it cannot answer any more."""
_WITHOUT_CODE: dict[grpc.StatusCode, type[DsecError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnreachableError,
    grpc.StatusCode.CANCELLED: UnreachableError,
}


def error_of(error: grpc.aio.AioRpcError) -> Exception:
    """The error that the server answered with, by the code in its details."""
    details = str(error.details())
    code, _, sentence = details.partition(": ")
    if code in _ERRORS:
        return _ERRORS[code](sentence)
    if "larger than max" in details:
        return InvalidArgumentError(f"the message is too large to be sent ({details})")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return InvalidArgumentError(f"{details}: set {ROLLOUTS}_KEY, or give the client its token")
    return _WITHOUT_CODE.get(error.code(), RolloutError)(details)


class Retry:
    """How often something is asked again: until `patience_s` passed since the last sign of life.

    A call that stood for longer than `ALIVE_S` is one, however long ago it brought something.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self.begin()
        self.reset()

    def begin(self) -> None:
        """It is asked."""
        self._began = self._clock()

    def reset(self) -> None:
        """The server answered."""
        self._delay_s = DELAY_S_MIN
        self._until = self._clock() + self._patience_s

    async def wait(self, error: Exception | None = None) -> None:
        """A while, longer each time; raises `error` instead once patience is at its end."""
        if self._clock() - self._began > ALIVE_S:
            self.reset()
        if error is not None and self._clock() > self._until:
            raise error
        await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - only spreads callers
        self._delay_s = min(2 * self._delay_s, DELAY_S_MAX)


class Connection:
    """One channel."""

    def __init__(self, url: str, token: str, patience_s: float) -> None:
        """To where these or the environment say, else to this host's service.  InvalidArgumentError."""
        self.patience_s = patience_s
        url, token = given(ROLLOUTS, url, token, DEFAULT_URL)
        self._address = parse_address(url, is_bare_tcp=True)
        self._is_away = False
        self._channel, self._metadata = open_channel(ROLLOUTS, self._address, token, _OPTIONS)
        self._stub: Any = RolloutServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def call(self, name: str, request: Any, *, retries_engine: bool = False, draws: bool = False) -> Any:
        """A unary call, or all messages of a stream, asked again if it was lost (or if the engine failed it).

        What a paused engine `draws` may never be answered: it stands no longer than patience lasts, or `ALIVE_S`.
        """
        retry, bound_s = Retry(self.patience_s), max(self.patience_s, ALIVE_S)
        while True:
            retry.begin()
            try:
                timeout = bound_s if draws else None
                called = getattr(self._stub, name)(request, metadata=self._metadata, timeout=timeout)
                is_stream = isinstance(called, grpc.aio.UnaryStreamCall)
                answer = [message async for message in called] if is_stream else await called
                self._is_away = False
                return answer
            except grpc.aio.AioRpcError as error:
                ours = self._may_retry(error)
                if draws and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    why = "a paused engine gives none before ResumeEngine"
                    raise UnreachableError(f"{name}: no answer for {bound_s:g} s; {why}") from None
                if isinstance(ours, EngineError) and not retries_engine:
                    raise ours from None
                await self._tell(error)
                await retry.wait(ours)

    async def stream(self, make: Callable[[], tuple[str, Any]], retry: Retry) -> AsyncGenerator[Any, None]:
        """The messages of a stream that `make` names the call and the request of, each time that it breaks."""
        while True:
            retry.begin()
            name, request = make()
            called = getattr(self._stub, name)(request, metadata=self._metadata)
            try:
                async for message in called:
                    retry.reset()
                    self._is_away = False
                    yield message
            except grpc.aio.AioRpcError as error:
                ours = self._may_retry(error, is_stream=True)
                await self._tell(error)
                await retry.wait(ours)
            else:
                return
            finally:
                called.cancel()

    def _may_retry(self, error: grpc.aio.AioRpcError, *, is_stream: bool = False) -> Exception:
        """The error, to be raised when patience ends; raises it now if asking again is no use."""
        ours = error_of(error)
        is_slow = is_stream and isinstance(ours, ResourceExhaustedError)
        if error.code() not in _RETRIED and not is_slow:
            raise ours from None
        return ours

    async def _tell(self, error: grpc.aio.AioRpcError) -> None:
        """Say once that the server is away.  InvalidArgumentError if it will never be there."""
        if self._is_away or error.code() is not grpc.StatusCode.UNAVAILABLE:
            return
        details, where = str(error.details()), self._address.target
        if "http1.x" in details or "Expected SETTINGS frame" in details:
            raise InvalidArgumentError(f"{where} does not speak gRPC: give the address of --listen") from error
        if "resol" in details and await _is_nobody(where.rpartition(":")[0]):
            raise InvalidArgumentError(f"{where}: there is no host of that name") from error
        self._is_away = True
        _log.warning("%s: %s; it is asked again for %g s", where, details[:_SHOWN_MAX], self.patience_s)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close(None)


async def _is_nobody(host: str) -> bool:
    """Whether it is certain that no host has the name."""
    try:
        await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), None)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    return False
