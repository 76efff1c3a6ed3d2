"""A worker that listens and is not open yet: every call is asked to come again, whatever it is about."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor

from rollout.pb.v1.rollout_pb2 import DESCRIPTOR
from rollout.rpc.grpc_server import REQUEST_BYTES_MAX, handlers_of, start_server
from rollout.rpc.listening import listen_at
from rollout.workers.forward import Router

METHODS = list(DESCRIPTOR.services_by_name["RolloutService"].methods)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    router = Router(handlers_of, REQUEST_BYTES_MAX)
    server = await start_server(None, listen_at("127.0.0.1:0"), [router])
    yield server.address
    await server.stop()
    await router.close()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_a_call_to_a_worker_that_starts_is_unavailable_and_says_when_to_ask_again(
    address: str, method: MethodDescriptor
) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(f"/{method.containing_service.full_name}/{method.name}")(b"", timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (call.read() if method.server_streaming else call)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "this worker is starting: ask again" in (refused.value.details() or "")
    assert dict(refused.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "500"
