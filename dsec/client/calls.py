"""Calls that share one stream to an Edge: each has a number, and its answer comes when it has ended.

What is asked for in the same turn of the event loop, or while a message is on its way, goes out together.  A stream
that ends answers every call with its own status, so nobody need know how a call travelled.

See: dsec/edge/calls.py; proto/dsec/pb/v1/edge.proto, "Calls".
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc

from dsec.pb.v1 import edge_pb2 as pb
from dsec.wire import JOINED_COUNT_MAX, Status

CALLS_COUNT_MAX = 1000
"""Under way, and a little below the bound at which an Edge reads no more: the next call goes by itself."""

END_S = 0.05
"""Until gRPC has let go of a stream that was cancelled, of which it says nothing."""


class Calls:
    """One stream; `stream` is gRPC's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[pb.CallReply]] = {}
        self._unsent: dict[int, pb.CallRequest] = {}
        self._writing: asyncio.Task[None] | None = None
        self._reading = asyncio.create_task(self._read(), name="read answers")

    @property
    def has_ended(self) -> bool:
        """Whether it can carry no more calls; its reader is cancelled by the loop's end only."""
        return self._reading.done() or self._reading.cancelling() > 0

    @property
    def has_room(self) -> bool:
        """Whether it can carry one more call."""
        return len(self._waiting) < CALLS_COUNT_MAX

    async def ask(self, method: str, request: bytes, timeout_s: float | None) -> pb.CallReply:
        """The answer, or a status: the stream's own, if that ends first, or DEADLINE_EXCEEDED."""
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        answer: asyncio.Future[pb.CallReply] = loop.create_future()
        self._waiting[number] = answer
        timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire, number)
        self._send(pb.CallRequest(id=number, method=method, request=request))
        try:
            return await answer
        except asyncio.CancelledError:
            self._abandon(number)
            raise
        finally:
            del self._waiting[number]
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """End it, and with it every call."""
        self._stream.cancel()

    def _expire(self, number: int) -> None:
        self._settle(pb.CallReply(id=number, status=Status.DEADLINE_EXCEEDED.value[0], details="Deadline Exceeded"))
        self._abandon(number)

    def _abandon(self, number: int) -> None:
        if self._unsent.pop(number, None) is None:
            self._send(pb.CallRequest(id=number))

    def _send(self, request: pb.CallRequest) -> None:
        self._unsent[request.id] = request
        if self.has_ended:
            return
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="write calls")

    async def _write(self) -> None:
        while self._unsent and not self.has_ended:
            numbers = list(itertools.islice(self._unsent, JOINED_COUNT_MAX))
            requests = [self._unsent.pop(number) for number in numbers]
            try:
                await self._stream.write(pb.CallRequests(requests=requests))
            except (grpc.RpcError, asyncio.InvalidStateError):
                return  # it has ended: reading says how

    async def _read(self) -> None:
        status, details = Status.UNAVAILABLE, "the Edge stops"
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]  # stub lags behind
                for reply in message.replies:
                    self._settle(reply)
        except grpc.aio.AioRpcError as error:
            status, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            status, details = Status.CANCELLED, "the stream was closed"
            if self.has_ended:  # with the loop, to which gRPC would bring back later what it has under way
                self._stream.cancel()
                await asyncio.sleep(END_S)
            raise
        finally:
            for number in self._waiting:
                self._settle(pb.CallReply(id=number, status=status.value[0], details=details))

    def _settle(self, reply: pb.CallReply) -> None:
        answer = self._waiting.get(reply.id)
        if answer is not None and not answer.done():
            answer.set_result(reply)
