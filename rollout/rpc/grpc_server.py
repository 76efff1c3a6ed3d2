"""gRPC in front of the rollout service: bytes to calls, errors to statuses, health and reflection.

What a call does stands in `rollout/rpc/calls.py`.  Requests are parsed here, not by gRPC, so that a bad one
is told which field is bad.

See: proto/rollout/pb/v1/rollout.proto; dsec/wire.py for the statuses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dsec.errors import DsecError
from dsec.listen import KEEPALIVE, Listen, TokenInterceptor, bind, claim_socket
from dsec.wire import status_of
from rollout.errors import RequestError, RolloutError
from rollout.pb.v1.rollout_pb2 import DESCRIPTOR
from rollout.rpc.calls import Calls
from rollout.rpc.listening import told
from rollout.rpc.messages import parse
from rollout.service import RolloutService
from toolcall_dsl import DslError
from wal import WalError

REQUEST_BYTES_MAX = 128 << 20
CALLS_COUNT_MAX = 10_000
"""Calls that are answered at once, streams that follow jobs among them; gRPC refuses more as RESOURCE_EXHAUSTED."""
STOP_GRACE_S = 1.0
SERVICE = DESCRIPTOR.services_by_name["RolloutService"]
_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


def handlers_of(service: RolloutService) -> Any:
    """A handler for each method of the protocol; the call has its name in snake case."""
    calls = Calls(service)
    return grpc.method_handlers_generic_handler(
        SERVICE.full_name,
        {method.name: _handler(method, calls) for method in SERVICE.methods},
    )


def _handler(method: MethodDescriptor, calls: Calls) -> Any:
    kind = GetMessageClass(method.input_type)
    call = getattr(calls, _snake(method.name))

    async def answer(data: bytes, context: Context) -> Any:
        async with _answering(context, method.name):
            return await call(parse(kind, data))

    async def stream(data: bytes, context: Context) -> AsyncIterator[Any]:
        async with _answering(context, method.name), aclosing(call(parse(kind, data))) as replies:
            async for reply in replies:
                yield reply

    serializer = GetMessageClass(method.output_type).SerializeToString
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, response_serializer=serializer)
    return grpc.unary_unary_rpc_method_handler(answer, response_serializer=serializer)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


@asynccontextmanager
async def _answering(context: Context, call: str) -> AsyncIterator[None]:
    """Turn what a call raises into its status; what is not an error of ours goes to the log, not to the client."""
    try:
        yield
    except (RolloutError, DsecError, WalError, DslError) as error:
        await context.abort(*status_of(error))
    except Exception:
        _log.exception("%s failed", call)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has it")


class Server:
    """A server that listens."""

    def __init__(self, server: grpc.aio.Server, checks: health.aio.HealthServicer, where: Listen, port: int) -> None:  # type: ignore[name-defined]
        self._server = server
        self._checks = checks
        self.port = port
        self.address = told(where.url_with(port))

    async def serve(self) -> None:
        """Say SERVING, of the process and of the service."""
        await self._checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.tell(is_ready=True)

    async def tell(self, *, is_ready: bool) -> None:
        """Say whether the service can carry out what it is asked."""
        answer = health_pb2.HealthCheckResponse
        await self._checks.set(SERVICE.full_name, answer.SERVING if is_ready else answer.NOT_SERVING)

    async def stop(self) -> None:
        """Say NOT_SERVING, take no more calls, give running ones a second; the log keeps what they watched."""
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)


async def start_server(
    service: RolloutService | None,
    where: Listen,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
    calls_count_max: int = CALLS_COUNT_MAX,
) -> Server:
    """Serve an open service (port 0: any) with health, which needs no token, and reflection.

    Without a service an interceptor answers (rollout/workers/forward.py), from when `Server.serve` says so.

    RequestError if the address cannot be bound.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
        ("grpc.so_reuseport", 0),
        *KEEPALIVE,
    ]
    asks = [TokenInterceptor(where.token, health.SERVICE_NAME)] if where.token else []
    server = grpc.aio.server(
        options=options, interceptors=[*asks, *interceptors], maximum_concurrent_rpcs=calls_count_max
    )
    if service is not None:
        server.add_generic_rpc_handlers((handlers_of(service),))
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stub lags behind the package
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        with claim_socket(where):
            port = bind(server, where)
    except RuntimeError as error:
        raise RequestError(
            f"cannot listen on {told(where.address.url)}: the port is in use or the host is not ours; choose another "
            "with --listen"
        ) from error
    await server.start()
    started = Server(server, checks, where, port)
    if service is not None:
        await started.serve()
    return started
