"""Many calls on one stream: each is a task that runs the method's own handler, and is answered when it has ended.

A call by itself costs gRPC's Python server several changes of threads, a message on an open stream one or two; and what
ends at the same time goes out in one message.

Invariants:
1. A stream has at most CALLS_COUNT_MAX calls under way, answers that its client has not taken included: beyond that
   nothing is read, and gRPC's flow control stops the client.
2. No call outlives its stream.

See: proto/dsec/pb/v1/edge.proto, "Calls"; dsec/client/calls.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import NoReturn, TypeVar

from google.protobuf.message import DecodeError, Message

from dsec.errors import InvalidArgumentError, ResourceExhaustedError
from dsec.pb.v1 import edge_pb2 as pb
from dsec.wire import JOINED_COUNT_MAX, SHORT_BYTES_MAX, CodedError, Status, status_of

CALLS_COUNT_MAX = 1024
MESSAGE_BYTES_MAX = JOINED_COUNT_MAX * (SHORT_BYTES_MAX + 4096)
"""Of requests; our client never sends more, and a larger one might hold millions."""
JOINED_BYTES = 1 << 20
"""Of answers in one message, the last of which may exceed it."""


Received = TypeVar("Received", bound=Message)
Method = Callable[[bytes, "CallContext"], Awaitable[bytes]]
"""Gives the answer to a request, or aborts."""


def read_message(what: str, parse: Callable[[bytes], Received], data: bytes, bytes_max: int) -> Received:
    """A message that came in.  InvalidArgumentError for what is none, or too large: that is not parsed."""
    if len(data) > bytes_max:
        raise InvalidArgumentError(f"{what} has {len(data)} bytes, more than {bytes_max}")
    try:
        return parse(data)
    except DecodeError:
        raise InvalidArgumentError(f"{what} cannot be parsed") from None


class RefusedCallError(Exception):
    """How a call ends that gives no message."""

    def __init__(self, status: Status, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


class CallContext:
    """What a handler has of gRPC's context."""

    async def abort(self, status: Status, details: str = "") -> NoReturn:
        """Answer with an error."""
        raise RefusedCallError(status, details)


_CONTEXT = CallContext()


class Calls:
    """The calls of one stream; `everybodys` are those of all streams, of which there are at most `count_max`."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        write: Callable[[pb.CallReplies], Awaitable[None]],
        everybodys: set[asyncio.Task[None]],
        count_max: int,
    ) -> None:
        self._methods = methods
        self._write = write
        self._everybodys = everybodys
        self._count_max = count_max
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._answers: list[pb.CallReply] = []
        self._is_writing = False
        self._has_room = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def serve(self, messages: AsyncIterator[bytes]) -> None:
        """Until the client has no more and all is answered, or `stop`.  InvalidArgumentError."""
        reading = self._reading = asyncio.create_task(self._read(messages), name="read calls")
        try:
            await asyncio.wait([reading])
            if not reading.cancelled() and reading.exception() is not None:
                for task in self._under_way.values():  # not who writes: gRPC must have done with that
                    task.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            left = [reading, *self._tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        if not reading.cancelled():
            reading.result()

    def stop(self) -> None:
        """Take no more calls; those under way go on to their ends."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for data in messages:
            message = read_message("a message of calls", pb.CallRequests.FromString, data, MESSAGE_BYTES_MAX)
            if len(message.requests) > JOINED_COUNT_MAX:
                raise InvalidArgumentError(
                    f"{len(message.requests)} requests in a message, more than {JOINED_COUNT_MAX}"
                )
            for request in message.requests:
                while len(self._tasks) + len(self._answers) >= CALLS_COUNT_MAX:
                    self._has_room.clear()
                    await self._has_room.wait()
                self._take(request)

    def _take(self, request: pb.CallRequest) -> None:
        task = self._under_way.get(request.id)
        if not request.method:
            if task is not None:
                task.cancel()
            return
        if task is not None:
            raise InvalidArgumentError(f"a call with the id {request.id} is under way already")
        has_place = len(self._everybodys) < self._count_max
        task = self._under_way[request.id] = asyncio.create_task(self._perform(request, has_place=has_place))
        for tasks in (self._tasks, self._everybodys):
            tasks.add(task)
        task.add_done_callback(partial(self._on_done, request.id))

    def _on_done(self, number: int, task: asyncio.Task[None]) -> None:
        if self._under_way.get(number) is task:
            del self._under_way[number]
        for tasks in (self._tasks, self._everybodys):
            tasks.discard(task)
        self._has_room.set()

    async def _perform(self, request: pb.CallRequest, *, has_place: bool) -> None:
        answer = await self._answer(request, has_place=has_place)
        self._answers.append(answer)
        del self._under_way[request.id]  # from here on it cannot be abandoned: it may write for others
        if not self._is_writing:
            self._is_writing = True
            try:
                while self._answers:
                    joined = self._joined()
                    await self._write(pb.CallReplies(replies=joined))
                    del self._answers[: len(joined)]
                    self._has_room.set()
            finally:
                self._is_writing = False

    def _joined(self) -> list[pb.CallReply]:
        """What goes out in one message."""
        count, size = 0, 0
        while count < len(self._answers) and (not count or size < JOINED_BYTES):
            size += len(self._answers[count].reply)
            count += 1
        return self._answers[:count]

    async def _answer(self, request: pb.CallRequest, *, has_place: bool) -> pb.CallReply:
        try:
            reply = await self._reply(request, has_place=has_place)
        except RefusedCallError as refusal:
            return pb.CallReply(id=request.id, status=refusal.status.value[0], details=refusal.details)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return pb.CallReply(id=request.id, status=Status.CANCELLED.value[0])  # the Edge let go of it
        return pb.CallReply(id=request.id, reply=reply)

    async def _reply(self, request: pb.CallRequest, *, has_place: bool) -> bytes:
        """What the method gives.  RefusedCallError."""
        if not has_place:
            raise _refusal(ResourceExhaustedError(f"the Edge has {self._count_max} calls under way: try again later"))
        method = self._methods.get(request.method)
        if method is None:
            raise RefusedCallError(
                Status.UNIMPLEMENTED, f"there is no method {request.method[:80]!r} for a shared stream"
            )
        return await method(request.request, _CONTEXT)


def _refusal(error: CodedError) -> RefusedCallError:
    return RefusedCallError(*status_of(error))
