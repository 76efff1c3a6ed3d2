"""gRPC in front of the Edge: translation only, no decision is made here.

See: proto/dsec/pb/v1/edge.proto; dsec/wire.py for the statuses; dsec/messages.py for the values.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dsec import messages
from dsec.edge.attach import Chunk, attach
from dsec.edge.calls import CallContext, Calls, RefusedCallError, read_message
from dsec.edge.creation import CREATE_BYTES_MAX
from dsec.edge.images.service import Images
from dsec.edge.service import Edge
from dsec.errors import DsecError, HostUnfitError, InvalidArgumentError
from dsec.listen import KEEPALIVE, Listen, TokenInterceptor, bind, claim_socket
from dsec.pb.v1 import edge_pb2 as pb
from dsec.pb.v1 import edge_pb2_grpc as pb_grpc
from dsec.types import Stream
from dsec.wire import READ_BYTES_MAX, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, REQUESTS, SERVICE, status_of
from wal import WalError

STREAMS_COUNT_MAX = 4096
CALLS_COUNT_MAX = 16384
STOP_GRACE_S = 1.0
SMALL_BYTES_MAX = 2 * CREATE_BYTES_MAX
"""Of a request that carries no data: the journal's way to write the largest one is not protobuf's."""
_BYTES_MAX = dict.fromkeys(("Exec", "Start", "WriteStdin"), REQUEST_BYTES_MAX)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", REPLY_BYTES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_COUNT_MAX),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 600_000),
    *KEEPALIVE,
]
_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""gRPC's record of what serves a method."""


class EdgeServicer(pb_grpc.EdgeServicer):
    """The calls of edge.proto, each on the open Edge."""

    def __init__(self, edge: Edge, images: Images | None) -> None:
        self._edge = edge
        self._images = images
        self._methods = {name: partial(self._call, name, request.FromString) for name, request in REQUESTS.items()}
        self._streams: set[Calls] = set()
        self._calls: set[asyncio.Task[None]] = set()

    def handlers(self, generated: Mapping[str, Handler]) -> dict[str, Handler]:
        """The generated handlers, which parse whatever comes, with readers that do not."""
        handlers = {"Calls": generated["Calls"]._replace(request_deserializer=None)}
        for name, call in self._methods.items():
            own = {"unary_unary": call, "request_deserializer": None, "response_serializer": None}
            handlers[name] = generated[name]._replace(**own)
        return {**generated, **handlers}

    async def _call(
        self, name: str, parse: Callable[[bytes], Message], data: bytes, context: Context | CallContext
    ) -> bytes:
        """Any method that takes one message and gives one, by itself or on a shared stream."""
        async with _answering(context, name):
            request = read_message(f"the request of {name}", parse, data, _BYTES_MAX.get(name, SMALL_BYTES_MAX))
            reply: Message = await getattr(self, name)(request, context)
            return reply.SerializeToString()

    async def stop(self) -> None:
        """Take no more calls on shared streams, which end when those under way have ended."""
        for calls in self._streams:
            calls.stop()

    # ruff: noqa: N802  (the names are the protocol's; their documentation is in edge.proto)
    # ruff: noqa: D102

    async def Create(self, request: pb.CreateRequest, _context: object) -> pb.Sandbox:
        return messages.sandbox_message(await self._edge.create(messages.create_of(request)))

    async def Get(self, request: pb.SandboxRef, _context: object) -> pb.Sandbox:
        return messages.sandbox_message(self._edge.get(request.sandbox_id))

    async def List(self, request: pb.ListRequest, context: Context) -> AsyncIterator[pb.Sandbox]:
        async with _answering(context, "List"):
            if (size := request.ByteSize()) > SMALL_BYTES_MAX:
                raise InvalidArgumentError(f"the request of List has {size} bytes, more than {SMALL_BYTES_MAX}")
            for view in self._edge.list(dict(request.labels)):
                yield messages.sandbox_message(view)

    async def Destroy(self, request: pb.SandboxRef, _context: object) -> pb.Done:
        return await _done(self._edge.destroy(request.sandbox_id))

    async def Pause(self, request: pb.SandboxRef, _context: object) -> pb.Done:
        return await _done(self._edge.pause(request.sandbox_id))

    async def Resume(self, request: pb.SandboxRef, _context: object) -> pb.Done:
        return await _done(self._edge.resume(request.sandbox_id))

    async def Snapshot(self, request: pb.SnapshotRequest, _context: object) -> pb.Layer:
        take = partial(self._edge.snapshot, request.sandbox_id)
        if request.name:
            layer = await self._store().snapshot(request.name, take, self._edge.get(request.sandbox_id))
        else:
            layer = await take()
        return pb.Layer(layer_id=layer)

    async def Fork(self, request: pb.ForkRequest, _context: object) -> pb.Sandboxes:
        views = await self._edge.fork(request.sandbox_id, request.count, messages.create_of(request.create))
        return pb.Sandboxes(sandboxes=map(messages.sandbox_message, views))

    async def Branch(self, request: pb.BranchRequest, _context: object) -> pb.Sandbox:
        view = await self._edge.branch(request.sandbox_id, request.key, messages.create_of(request.create))
        return messages.sandbox_message(view)

    async def Cancel(self, request: pb.CancelRequest, _context: object) -> pb.Done:
        return await _done(self._edge.cancel(request.request_id))

    async def UpdateNetwork(self, request: pb.UpdateNetworkRequest, _context: object) -> pb.Done:
        await self._edge.update_network(request.sandbox_id, messages.policy_of(request.policy))
        return pb.Done()

    async def Exec(self, request: pb.ExecRequest, _context: object) -> pb.ExecResult:
        command = messages.command_of(request.command)
        return messages.result_message(await self._edge.exec(request.sandbox_id, command, request.key))

    async def Start(self, request: pb.ExecRequest, _context: object) -> pb.CommandInfo:
        command = messages.command_of(request.command)
        return _brief(messages.info_message(await self._edge.start(request.sandbox_id, command, request.key)))

    async def Wait(self, request: pb.CommandRef, _context: object) -> pb.ExecResult:
        return messages.result_message(await self._edge.wait(request.sandbox_id, request.key))

    async def Attach(self, request: pb.AttachRequest, context: Context) -> None:
        async with _answering(context, "Attach"):

            async def put(chunk: Chunk) -> None:
                await context.write(pb.AttachEvent(chunk=_chunk_message(chunk)))

            offsets: dict[Stream, int] = {"stdout": request.stdout_offset, "stderr": request.stderr_offset}
            result = await attach(self._edge, request.sandbox_id, request.key, offsets, put)
            await context.write(pb.AttachEvent(result=messages.result_message(result)))

    async def ReadOutput(self, request: pb.ReadOutputRequest, _context: object) -> pb.Chunk:
        if not 0 < request.bytes_max <= READ_BYTES_MAX:
            raise InvalidArgumentError(f"bytes_max {request.bytes_max} is not in [1, {READ_BYTES_MAX}]")
        if (stream := messages.STREAMS.get(request.stream)) is None:
            raise InvalidArgumentError(f"{request.stream} is no stream of a command")
        data = await self._edge.read_output(request.sandbox_id, request.key, stream, request.offset, request.bytes_max)
        return _chunk_message(Chunk(stream, request.offset, data))

    async def WriteStdin(self, request: pb.WriteStdinRequest, _context: object) -> pb.Done:
        write = self._edge.write_stdin(request.sandbox_id, request.key, request.data)
        return await _done(write)

    async def CloseStdin(self, request: pb.CommandRef, _context: object) -> pb.Done:
        return await _done(self._edge.close_stdin(request.sandbox_id, request.key))

    async def Kill(self, request: pb.CommandRef, _context: object) -> pb.Done:
        return await _done(self._edge.kill(request.sandbox_id, request.key))

    async def Signal(self, request: pb.SignalRequest, _context: object) -> pb.Done:
        return await _done(self._edge.signal(request.sandbox_id, request.key, request.number))

    async def Resize(self, request: pb.ResizeRequest, _context: object) -> pb.Done:
        size = request.size
        resize = self._edge.resize(request.sandbox_id, request.key, size.rows, size.columns)
        return await _done(resize)

    async def ListCommands(self, request: pb.SandboxRef, context: Context) -> AsyncIterator[pb.CommandInfo]:
        async with _answering(context, "ListCommands"):
            for view in self._edge.commands(request.sandbox_id):
                yield _brief(messages.info_message(view))

    async def GetTrajectory(self, request: pb.SandboxRef, context: Context) -> None:
        async with _answering(context, "GetTrajectory"), aclosing(self._edge.trajectory(request.sandbox_id)) as views:
            async for view in views:
                await context.write(messages.info_message(view))

    async def GrantLease(self, request: pb.GrantLeaseRequest, _context: object) -> pb.Done:
        grant = self._edge.grant_lease(request.owner, request.epoch, request.ttl_s)
        return await _done(grant)

    async def EndLease(self, request: pb.EndLeaseRequest, _context: object) -> pb.Done:
        return await _done(self._edge.end_lease(request.owner, request.epoch))

    async def GetHost(self, request: pb.GetHostRequest, _context: object) -> pb.Host:
        return messages.host_message(self._edge.status())

    def _store(self) -> Images:
        if self._images is None:
            raise HostUnfitError("this Edge's substrate has no store of images: images are Docker's own there")
        return self._images

    async def ListImages(self, request: pb.ListImagesRequest, context: Context) -> AsyncIterator[pb.Image]:
        async with _answering(context, "ListImages"):
            for image in await self._store().images():
                yield messages.image_message(image)

    async def ListLayers(self, request: pb.ListLayersRequest, context: Context) -> AsyncIterator[pb.LayerFacts]:
        async with _answering(context, "ListLayers"):
            for layer in await self._store().layers():
                yield messages.layer_message(layer)

    async def ImportImage(self, requests: AsyncIterator[pb.ImportImageRequest], context: Context) -> None:
        async with _answering(context, "ImportImage"):
            first = await anext(requests, None)
            if first is None or not first.HasField("options"):
                raise InvalidArgumentError("the first message says the options, and those after it the archive's bytes")

            async def pieces() -> AsyncIterator[bytes]:
                total = 0
                await context.write(pb.ImportImageReply(received_bytes=total))
                async for request in requests:
                    yield request.data
                    total += len(request.data)
                    await context.write(pb.ImportImageReply(received_bytes=total))

            image = await self._store().receive(messages.import_of(first.options), pieces())
            await context.write(pb.ImportImageReply(image=messages.image_message(image)))

    async def TagImage(self, request: pb.TagImageRequest, _context: object) -> pb.Image:
        return messages.image_message(await self._store().tag(request.name, request.references))

    async def RemoveImage(self, request: pb.RemoveImageRequest, _context: object) -> pb.Done:
        await self._store().remove(request.reference)
        return pb.Done()

    async def CollectLayers(self, request: pb.CollectLayersRequest, _context: object) -> pb.CollectedLayers:
        return pb.CollectedLayers(layer_ids=await self._store().collect())

    async def Calls(self, requests: AsyncIterator[bytes], context: Context) -> None:
        async with _answering(context, "Calls"):

            async def write(replies: pb.CallReplies) -> None:
                async with _answering(context, "Calls"):
                    await context.write(replies)

            calls = Calls(self._methods, write, self._calls, CALLS_COUNT_MAX)
            self._streams.add(calls)
            try:
                await calls.serve(requests)
            finally:
                self._streams.discard(calls)


def _chunk_message(chunk: Chunk) -> pb.Chunk:
    return pb.Chunk(stream=messages.STREAM_NUMBERS[chunk.stream], offset=chunk.offset, data=chunk.data)


def _brief(info: pb.CommandInfo) -> pb.CommandInfo:
    """A command as lists show it: what it read and wrote stays where it is."""
    info.command.ClearField("stdin")
    for output in (info.result.stdout, info.result.stderr) if info.HasField("result") else ():
        output.dropped_bytes += len(output.head) + len(output.tail)
        output.ClearField("head")
        output.ClearField("tail")
    return info


async def _done(doing: Awaitable[None]) -> pb.Done:
    await doing
    return pb.Done()


@asynccontextmanager
async def _answering(context: Context | CallContext, call: str) -> AsyncIterator[None]:
    """Turn what a call raises into its status; what is not an error of ours goes to the log, not to the client."""
    try:
        yield
    except (DsecError, WalError) as error:
        await context.abort(*status_of(error))
    except (grpc.aio.AbortError, RefusedCallError):
        raise
    except grpc.aio.InternalError as error:  # of gRPC's own: a chunk could not be sent, for its reader is gone
        raise asyncio.CancelledError from error
    except Exception:
        _log.exception("%s failed", call)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")


class Server:
    """One address that is served."""

    def __init__(
        self,
        server: grpc.aio.Server,
        servicer: EdgeServicer,
        checks: health.aio.HealthServicer,  # type: ignore[name-defined]
        url: str,
    ) -> None:
        self._server = server
        self._servicer = servicer
        self._checks = checks
        self.url = url

    async def stop(self) -> None:
        """Say NOT_SERVING, take no more calls, give running ones a second; what was logged goes on."""
        await self._checks.enter_graceful_shutdown()
        await asyncio.gather(self._server.stop(STOP_GRACE_S), self._servicer.stop())  # no stream begins in between


async def start_server(edge: Edge, listen: Listen, images: Images | None = None) -> Server:
    """Serve an open Edge and its images at an address, with health and reflection.

    InvalidArgumentError if it cannot be bound.
    """
    interceptors = [TokenInterceptor(listen.token)] if listen.token else []
    server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS, maximum_concurrent_rpcs=CALLS_COUNT_MAX)
    name, servicer = SERVICE.full_name, EdgeServicer(edge, images)
    # With every call grpc.aio waits anew for each registered method; the generic handlers serve the same methods.
    server.add_registered_method_handlers = lambda _service, _handlers: None  # type: ignore[attr-defined]
    generated: dict[str, Handler] = {}
    taker = SimpleNamespace(
        add_generic_rpc_handlers=lambda _handlers: None,
        add_registered_method_handlers=lambda _service, handlers: generated.update(handlers),
    )
    pb_grpc.add_EdgeServicer_to_server(servicer, taker)  # type: ignore[no-untyped-call]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, servicer.handlers(generated))])
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stub lags behind the package
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        with claim_socket(listen):
            port = bind(server, listen)
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"cannot listen on {listen.address.url}: it is in use or not ours; choose another with --listen"
        ) from error
    await server.start()
    for served in ("", name):
        await checks.set(served, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, servicer, checks, listen.url_with(port))
