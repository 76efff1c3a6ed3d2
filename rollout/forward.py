"""Routing of gRPC calls: a call about a job goes to whoever has the job, here or at another worker.

It sits in front of every method of the protocol and knows none of them: a request that names a request, or a rollout,
whose id begins with its request's, goes by that name; one that names none is this worker's own. What goes to another
worker passes through as bytes, with its deadline and its metadata, and goes no further than one step.

See: rollout/worker.py for who has what; proto/rollout/pb/v1/rollout.proto.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from dsec.errors import UnreachableError
from dsec.wire import status_of
from rollout.pb.v1.rollout_pb2 import DESCRIPTOR
from rollout.service import RolloutService
from rollout.worker import Worker

RETRY_MS = "500"
FORWARDED = "dsec-forwarded"
_PUSHBACK = "grpc-retry-pushback-ms"
"""gRPC's own word for: try again after so long."""
_CREATES = frozenset({"Submit"})
"""Methods whose request id may be new."""
_OWN_METADATA = ("grpc-", ":", "user-agent", "te", "content-type")
_SERVICE = DESCRIPTOR.services_by_name["RolloutService"]
Context = grpc.aio.ServicerContext[Any, Any]


class Router(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no class to subscript at run time
    """For the server of a `worker`, which is set once it is open; `handlers_of` makes what answers for a service."""

    def __init__(self, handlers_of: Callable[[RolloutService], Any], request_bytes_max: int) -> None:
        self.worker: Worker | None = None
        self._methods = {f"/{_SERVICE.full_name}/{method.name}": method for method in _SERVICE.methods}
        self._handlers_of = handlers_of
        self._options = [
            ("grpc.max_send_message_length", request_bytes_max),
            ("grpc.max_receive_message_length", request_bytes_max),
        ]
        self._handlers: WeakKeyDictionary[RolloutService, Any] = WeakKeyDictionary()
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Let go of the other workers."""
        for channel in self._channels.values():
            await channel.close(None)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler of a method, with the routing in front."""
        details, method = handler_call_details, self._methods.get(handler_call_details.method)
        if method is None:
            return await continuation(details)

        async def answer(data: bytes, context: Context) -> bytes:
            where = await self._locate(method, data, context)
            if isinstance(where, str):
                return await self._ask(where, details.method, data, context)
            handler = self._handler(where, details)
            reply: bytes = handler.response_serializer(await handler.unary_unary(data, context))
            return reply

        async def stream(data: bytes, context: Context) -> AsyncIterator[bytes]:
            where = await self._locate(method, data, context)
            if isinstance(where, str):
                async for passed in self._follow(where, details.method, data, context):
                    yield passed
                return
            handler = self._handler(where, details)
            async for reply in handler.unary_stream(data, context):
                yield handler.response_serializer(reply)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)

    async def _ask(self, where: str, path: str, data: bytes, context: Context) -> bytes:
        try:
            reply: bytes = await self._channel(where).unary_unary(path, None, None)(data, **_passed_on(context))
        except grpc.aio.AioRpcError as error:
            await _pass_back(error, where, context)
        return reply

    async def _follow(self, where: str, path: str, data: bytes, context: Context) -> AsyncIterator[bytes]:
        call = self._channel(where).unary_stream(path, None, None)(data, **_passed_on(context))
        try:
            async for reply in call:
                yield reply
        except grpc.aio.AioRpcError as error:
            await _pass_back(error, where, context)
        finally:
            call.cancel()

    async def _locate(self, method: MethodDescriptor, data: bytes, context: Context) -> RolloutService | str:
        try:
            if self.worker is None:
                raise UnreachableError("this worker is starting: ask again")
            named = "" if self.worker.is_alone else request_of(method, data)
            where = await self.worker.locate(named, creates=method.name in _CREATES)
            if isinstance(where, str) and FORWARDED in dict(context.invocation_metadata() or ()):
                raise UnreachableError("the partition of this request changes hands: ask again")
        except UnreachableError as error:
            await context.abort(*status_of(error), trailing_metadata=((_PUSHBACK, RETRY_MS),))
        return where

    def _handler(self, service: RolloutService, details: Any) -> Any:
        if service not in self._handlers:
            self._handlers[service] = self._handlers_of(service)
        return self._handlers[service].service(details)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=self._options)
        return self._channels[address]


def request_of(method: MethodDescriptor, data: bytes) -> str:
    """The request id that a message is about; "" if it is about none, or cannot be read (a service will say so)."""
    try:
        request: Any = GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        return ""
    fields = method.input_type.fields_by_name
    rollout_ids: list[str] = [request.rollout_id] if "rollout_id" in fields else []
    for holder in (request, getattr(request, "rollouts", None)):
        rollout_ids += getattr(holder, "rollout_ids", ())
    if rollout_ids and rollout_ids[0]:  # before its own request id: what is asked about a rollout belongs to its log
        return rollout_ids[0].partition("/")[0]
    return request.request_id if "request_id" in fields else ""


async def _pass_back(error: grpc.aio.AioRpcError, where: str, context: Context) -> NoReturn:
    code, details = error.code(), error.details() or ""
    trailing: tuple[Any, ...] = tuple(error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and not trailing:
        trailing, details = ((_PUSHBACK, RETRY_MS),), f"UNREACHABLE: the worker at {where}: {details}"
    await context.abort(code, details, trailing_metadata=trailing)
    raise AssertionError(details)


def _passed_on(context: Context) -> dict[str, Any]:
    """Of a call, for the next worker: the time that is left, and the caller's own metadata."""
    metadata = [(key, value) for key, value in context.invocation_metadata() or () if not key.startswith(_OWN_METADATA)]
    return {"timeout": context.time_remaining(), "metadata": (*metadata, (FORWARDED, "1"))}
