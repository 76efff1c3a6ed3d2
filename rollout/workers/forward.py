"""Routing of gRPC calls: a call about a job goes to whoever has the job, here or at another worker.

It sits in front of every method of the protocol and knows none of them: a request that names a request, or a rollout,
whose id begins with its request's, goes by that name; one that names none is this worker's own. What goes to another
worker passes through as bytes, with its deadline and its metadata, and goes no further than one step. A request that
names rollouts of several logs is cut in parts, whose answers are merged; a list goes through the logs one by one.

See: rollout/workers/worker.py for who has what; proto/rollout/pb/v1/rollout.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from dsec.client.channel import ROLLOUTS, open_channel
from dsec.errors import UnreachableError
from dsec.wire import status_of
from rollout.errors import ConflictError
from rollout.pb.v1.rollout_pb2 import DESCRIPTOR
from rollout.rpc.listening import address_of
from rollout.service import RolloutService
from rollout.workers.worker import Place, Worker

RETRY_MS = "500"
FORWARDED = "dsec-partition"
"""Metadata of what another worker passed on: for which of this one's partitions."""
_PUSHBACK = "grpc-retry-pushback-ms"
"""gRPC's own word for: try again after so long."""
_CREATES = frozenset({"Submit"})
"""Methods whose request id may be new."""
_EVERYWHERE = frozenset({"Preempt", "Resume"})
"""Methods that, if they name nothing, are about every log of this worker."""
_OF_THE_ROOT = "UpdatePolicy"
"""The method that is about every log that somebody owns; who opens one later learns of it from the index."""
_ASKS_ABOUT = "QuickInstruction"
"""The method whose request is a new job in the log that it asks about."""
_OWN_METADATA = frozenset({"user-agent", "te", "content-type", "authorization"})
_OWN_PREFIXES = ("grpc-", ":")
_SERVICE = DESCRIPTOR.services_by_name["RolloutService"]
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class Router(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no class to subscript at run time
    """For the server of a `worker`, which is set once it is open; `handlers_of` makes what answers for a service."""

    def __init__(self, handlers_of: Callable[[RolloutService], Any], request_bytes_max: int, token: str = "") -> None:
        """`token` is what the other workers ask for."""
        self._token = token
        self.worker: Worker | None = None
        self._methods = {_path(method): method for method in _SERVICE.methods}
        self._handlers_of = handlers_of
        self._options = [
            ("grpc.max_send_message_length", request_bytes_max),
            ("grpc.max_receive_message_length", request_bytes_max),
        ]
        self._handlers: WeakKeyDictionary[RolloutService, Any] = WeakKeyDictionary()
        self._channels: dict[str, tuple[grpc.aio.Channel, list[tuple[str, str]]]] = {}

    async def close(self) -> None:
        """Let go of the other workers."""
        for channel, _ in self._channels.values():
            await channel.close(None)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler of a method, with the routing in front."""
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return await continuation(handler_call_details)

        async def answer(data: bytes, context: Context) -> bytes:
            if method.name == "List":
                page = await self._located(self._list(method, data, context), context)
                if page is not None:
                    return page
            parts = await self._located(self._split(method, data, context), context)
            answers = [await self._ask(place, method, part, context) for place, part in parts]
            if method.name == _OF_THE_ROOT:
                await self._located(self._opened().news.tell_policy(), context)  # who opens a log from now on has them
                asked = {place.partition for place, _ in parts}
                parts = await self._located(self._split(method, data, context), context)
                opened = [(place, part) for place, part in parts if place.partition not in asked]
                answers += [await self._ask(place, method, part, context) for place, part in opened]
            return merged(method, answers)

        async def stream(data: bytes, context: Context) -> AsyncIterator[bytes]:
            ((place, _),) = await self._located(self._split(method, data, context), context)
            async with aclosing(self._follow(place, method, data, context)) as replies:
                async for reply in replies:
                    yield reply

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)

    async def _split(self, method: MethodDescriptor, data: bytes, context: Context) -> list[tuple[Place, bytes]]:
        """Who is asked what: one place, unless the request names rollouts of several, or is about all that is here."""
        worker = self._opened()
        if (partition := dict(context.invocation_metadata() or ()).get(FORWARDED)) is not None:
            place = await worker.find(str(partition))
            if place.service is None:
                raise UnreachableError("the partition of this request changes hands: ask again")
            return [(place, data)]
        if worker.is_alone:
            return [(await worker.place_of(""), data)]
        if method.name == _OF_THE_ROOT:
            return [(place, data) for place in await worker.places()]
        asked = Asked(method, data)
        if method.name == _ASKS_ABOUT:
            return [(await worker.place_beside(asked.message.request_id, asked.first), data)]
        if not asked.request_ids and method.name in _EVERYWHERE:
            here = [Place(each.name, each.service) for each in worker.owned.values()]
            return [(place, data) for place in here or [await worker.place_of("")]]
        creates = method.name in _CREATES
        names = sorted(asked.request_ids) or [""]
        places = {name: await worker.place_of(name, creates=creates) for name in names}
        grouped = {place.partition: place for place in places.values()}
        if len(grouped) == 1 or method.server_streaming:
            return [(places[asked.first], data)]
        names_at = {each: {n for n, place in places.items() if place.partition == each} for each in grouped}
        return [(place, asked.about(names_at[each])) for each, place in grouped.items()]

    async def _list(self, method: MethodDescriptor, data: bytes, context: Context) -> bytes | None:
        """A page of all logs of the root, one after another; None if the request is about one of them."""
        worker, asked = self._opened(), Asked(method, data)
        if worker.is_alone or asked.request_ids or FORWARDED in dict(context.invocation_metadata() or ()):
            return None
        names = await worker.partitions()
        name, separator, token = asked.message.page_token.partition("|")
        if asked.message.page_token and (name not in names or not separator):
            return None  # that is no token of ours, and a service will say so
        name = name or names[0]
        asked.message.page_token = token
        part = asked.message.SerializeToString()
        page = await self._ask(await worker.find(name), method, part, context)
        reply: Any = GetMessageClass(method.output_type).FromString(page)
        later = [each for each in names if each > name]
        if reply.next_page_token:
            reply.next_page_token = f"{name}|{reply.next_page_token}"
        elif later:
            reply.next_page_token = f"{later[0]}|"
        serialized: bytes = reply.SerializeToString()
        return serialized

    def _opened(self) -> Worker:
        if self.worker is None:
            raise UnreachableError("this worker is starting: ask again")
        return self.worker

    async def _located(self, finding: Awaitable[T], context: Context) -> T:
        try:
            return await finding
        except UnreachableError as error:
            await context.abort(*status_of(error), trailing_metadata=((_PUSHBACK, RETRY_MS),))
            raise
        except ConflictError as error:
            await context.abort(*status_of(error))
            raise

    async def _ask(self, place: Place, method: MethodDescriptor, data: bytes, context: Context) -> bytes:
        if place.service is not None:
            handler = self._handler(place.service, method)
            reply: bytes = handler.response_serializer(await handler.unary_unary(data, context))
            return reply
        channel, own = self._channel(place.address)
        call = channel.unary_unary(_path(method), None, None)(data, **_passed_on(place, context, own))
        async with self._while_there(place, call, context):
            return bytes(await call)

    async def _follow(
        self, place: Place, method: MethodDescriptor, data: bytes, context: Context
    ) -> AsyncGenerator[bytes, None]:
        if place.service is not None:
            handler = self._handler(place.service, method)
            async with aclosing(handler.unary_stream(data, context)) as replies:
                async for reply in replies:
                    yield handler.response_serializer(reply)
            return
        channel, own = self._channel(place.address)
        call = channel.unary_stream(_path(method), None, None)(data, **_passed_on(place, context, own))
        async with self._while_there(place, call, context):
            async for passed in call:
                yield passed

    @asynccontextmanager
    async def _while_there(self, place: Place, call: Any, context: Context) -> AsyncIterator[None]:
        """A call to another worker, ended when that lost the partition: it may be frozen, and will say nothing."""
        moved = asyncio.create_task(self._opened().until_moved(place))
        moved.add_done_callback(lambda _: call.cancel())
        try:
            yield
        except grpc.aio.AioRpcError as error:
            await _pass_back(error, place, context)
        except asyncio.CancelledError:
            if not moved.done():
                raise
            why = UnreachableError(f"worker {place.address} lost partition {place.partition}: ask again")
            await context.abort(*status_of(why), trailing_metadata=((_PUSHBACK, RETRY_MS),))
        finally:
            moved.cancel()
            call.cancel()

    def _handler(self, service: RolloutService, method: MethodDescriptor) -> Any:
        if service not in self._handlers:
            self._handlers[service] = self._handlers_of(service)
        return self._handlers[service].service(_Details(_path(method)))

    def _channel(self, address: str) -> tuple[grpc.aio.Channel, list[tuple[str, str]]]:
        if address not in self._channels:
            self._channels[address] = open_channel(ROLLOUTS, address_of(address), self._token, self._options)
        return self._channels[address]


class _Details(NamedTuple):
    """What a generic handler is asked by."""

    method: str
    invocation_metadata: tuple[()] = ()


class Asked:
    """What a request is about.  One that cannot be read is about nothing: a service will say what is wrong with it."""

    def __init__(self, method: MethodDescriptor, data: bytes) -> None:
        self.message: Any = GetMessageClass(method.input_type)()
        with contextlib.suppress(DecodeError):
            self.message.ParseFromString(data)
        message = self.message
        holder = getattr(message, "rollouts", message)
        one = getattr(
            message, "rollout_id", ""
        )  # before its own request id: what is asked about a rollout is in its log
        named = [
            *getattr(holder, "rollout_ids", ()),
            one or getattr(message, "request_id", "") or getattr(message, "group_id", ""),
        ]
        named = [each.partition("/")[0] for each in named if each]
        self.request_ids = set(named)
        self.first = named[0] if named else ""

    def about(self, request_ids: set[str]) -> bytes:
        """The request without the rollouts of other jobs."""
        part = type(self.message)()
        part.CopyFrom(self.message)
        rollout_ids = getattr(part, "rollouts", part).rollout_ids
        rollout_ids[:] = [each for each in rollout_ids if each.partition("/")[0] in request_ids]
        serialized: bytes = part.SerializeToString()
        return serialized


def merged(method: MethodDescriptor, answers: Sequence[bytes]) -> bytes:
    """The answers of several logs as one: lists end to end, numbers added up, of what each tells whole the last."""
    if len(answers) == 1:
        return answers[0]
    numbers = [field.name for field in method.output_type.fields if field.cpp_type == field.CPPTYPE_UINT32]
    whole: Any = GetMessageClass(method.output_type)()
    for answer in answers:
        part = type(whole).FromString(answer)
        sums = {name: getattr(whole, name) + getattr(part, name) for name in numbers}
        for field, _ in part.ListFields():
            if field.message_type and not field.is_repeated:
                whole.ClearField(field.name)
        whole.MergeFrom(part)
        for name, number in sums.items():
            setattr(whole, name, number)
    serialized: bytes = whole.SerializeToString()
    return serialized


async def _pass_back(error: grpc.aio.AioRpcError, place: Place, context: Context) -> NoReturn:
    code, details = error.code(), error.details() or ""
    trailing: tuple[Any, ...] = tuple(error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and not trailing:
        trailing, details = ((_PUSHBACK, RETRY_MS),), f"UNREACHABLE: the worker at {place.address}: {details}"
    await context.abort(code, details, trailing_metadata=trailing)
    raise AssertionError(details)


def _passed_on(place: Place, context: Context, own: list[tuple[str, str]]) -> dict[str, Any]:
    """Of a call, for the next worker: the time that is left, the caller's own metadata, and what it is wanted for."""
    metadata = [
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key not in _OWN_METADATA and not key.startswith(_OWN_PREFIXES)
    ]
    return {"timeout": context.time_remaining(), "metadata": (*metadata, *own, (FORWARDED, place.partition))}


def _path(method: MethodDescriptor) -> str:
    return f"/{_SERVICE.full_name}/{method.name}"
